"""Pictures with captions, as captioning and retrieval show and describe them."""

from configs.schema import CaptionConfig, RetrievalConfig
from data.captions import CaptionImages, CaptionTexts, FirstPairs, PairCollate, read_captioned
from data.text import Tokenizer
from tasks.view import Samples, View
from transform.images import eval_transform

SINGLES = "--eval-size 1000 --val-size 500"  # options of make_shapes for data of single pictures


class PairView(View):
    """A picture and the first of its captions. A sample's id is its picture's path."""

    @staticmethod
    def test_samples(
        config: RetrievalConfig | CaptionConfig, tokenizer: Tokenizer, prompt: str = "", first_token_id: int | None = None
    ) -> Samples:
        """`prompt` and `first_token_id` are as for data.captions.build_loaders."""
        entries = read_captioned(config.annotation_file(config.test_file))
        images = CaptionImages(entries, config.image_root, eval_transform(config.image_size, config.text_only, config.pictures))
        pairs = FirstPairs(images, CaptionTexts(entries), prompt)
        return Samples(pairs, images.names, PairCollate(tokenizer, config.max_text_tokens, first_token_id))

    def names(self, batch: dict) -> list[str]:
        return [self.ids[number] for number in batch["image_ids"].tolist()]
