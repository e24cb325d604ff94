"""The views of all tasks, and opening that of a run."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from configs.schema import CaptionConfig, Config, NlvrConfig, RetrievalConfig, VqaConfig
from data.captions import CaptionImages, CaptionTexts, FirstPairs, PairCollate, read_captioned
from data.nlvr import NlvrCollate
from data.nlvr import build_datasets as judged_statements
from data.text import Tokenizer, as_texts, dec_token_id
from data.vqa import QuestionCollate
from data.vqa import build_datasets as answered_questions
from engine.restore import Opened, restore, saved_setting
from tasks.writing import Answerer, Captioner
from models.blip_nlvr import NlvrOutput
from models.blip_vqa import Question
from models.weights.blip import read_checkpoint
from madtp.blocks import Encoded, TowerRecord
from tasks.view import Samples, View
from transform.images import eval_transform
from utils import UserError


class NlvrView(View):
    """NLVR2: two images and a sentence."""

    labels = ("left", "right")
    image_key = "images"
    timed = "the whole forward pass"

    @staticmethod
    def test_samples(config: NlvrConfig, tokenizer: Tokenizer) -> Samples:
        dataset = judged_statements(config)["test"]
        collate = NlvrCollate(tokenizer, config.bert_sizes.max_position_embeddings)
        return Samples(dataset, [entry["id"] for entry in dataset.entries], collate)

    def compute(self, batch: dict) -> NlvrOutput:
        return self.model(*self.inputs(batch), self.setting, packed=self.packed)

    def records(self, output: NlvrOutput) -> dict[str, TowerRecord]:
        return {"image": output.vision, "text": output.language}

    def headings(self, batch: dict, output: NlvrOutput) -> list[str]:
        scores = output.logits.float().softmax(dim=-1)[:, 1].tolist()
        said = [f"predicted {score > 0.5} ({score:.2f})" for score in scores]
        if "targets" not in batch:
            return said
        return [f"{start}, truth {truth}" for start, truth in zip(said, batch["targets"].bool().tolist(), strict=True)]

    def names(self, batch: dict) -> list[str]:
        return batch["ids"]


class PairView(View):
    """A picture and the first of its captions. A sample's id is its picture's path."""

    @staticmethod
    def test_samples(
        config: RetrievalConfig | CaptionConfig, tokenizer: Tokenizer, prompt: str = "", first_token_id: int | None = None
    ) -> Samples:
        """`prompt` and `first_token_id` as of data.captions.build_loaders."""
        entries = read_captioned(config.annotation_file(config.test_file))
        images = CaptionImages(entries, config.image_root, eval_transform(config.image_size, config.text_only))
        pairs = FirstPairs(images, CaptionTexts(entries), prompt)
        return Samples(pairs, images.names, PairCollate(tokenizer, config.max_text_tokens, first_token_id))

    def names(self, batch: dict) -> list[str]:
        return [self.ids[number] for number in batch["image_ids"].tolist()]


class TowersView(PairView):
    """Retrieval: picture and caption, each in its tower."""

    timed = "both towers once, of a picture and its first caption"

    def compute(self, batch: dict) -> tuple[Encoded, Encoded]:
        images, *text = self.inputs(batch)
        shared = {"setting": self.setting, "packed": self.packed}
        return self.model.encode_image(images, **shared), self.model.encode_text(*text, **shared)

    def records(self, output: tuple[Encoded, Encoded]) -> dict[str, TowerRecord]:
        image, text = output
        return {"image": image.record, "text": text.record}

    def headings(self, batch: dict, output: tuple[Encoded, Encoded]) -> list[str]:
        image, text = output
        return [f"similarity {value:.2f}" for value in (image.feature * text.feature).sum(dim=1).tolist()]


class RetrievalView(TowersView):
    timed = f"{TowersView.timed}, without the matching"

    def headings(self, batch: dict, output: tuple[Encoded, Encoded]) -> list[str]:
        _, *text = self.inputs(batch)
        logits, _ = self.model.match(*text, (output[0].tokens, output[0].layout), self.setting)
        matches = logits.float().softmax(dim=-1)[:, 1].tolist()
        return [f"{start}, match {match:.2f}" for start, match in zip(super().headings(batch, output), matches, strict=True)]


class ClipView(TowersView):
    def words(self, ids: list[int]) -> list[str]:
        """The class token is the end-of-text token: it comes first in memory, and the others follow in their order."""
        return self.tokenizer.convert_ids_to_tokens(ids)[:-1]


class CaptionView(PairView):
    """Captioning: a picture, whose caption the model writes."""

    timed = "captions written, of the config's way to write them"

    def __init__(self, opened: Opened, samples: Samples):
        super().__init__(opened, samples)
        self.write = Captioner(self.config, self.tokenizer)

    @staticmethod
    def test_samples(config: CaptionConfig, tokenizer: Tokenizer) -> Samples:
        return PairView.test_samples(config, tokenizer, config.prompt, dec_token_id(tokenizer))

    def compute(self, batch: dict) -> tuple[list[str], TowerRecord, Tensor]:
        return self.write(self.model, batch["image"], self.setting)

    def records(self, output: tuple[list[str], TowerRecord, Tensor]) -> dict[str, TowerRecord]:
        return {"image": output[1]}

    def said(self, batch: dict, output: tuple[list[str], TowerRecord, Tensor]) -> list[list[tuple[str, str]]]:
        """The truth is the first caption, where there is one."""
        written = [[("written", text)] for text in output[0]]
        if "input_ids" not in batch:
            return written
        truths = as_texts(self.tokenizer, batch["input_ids"][:, len(self.write.prompt) :])
        return [[*said, ("truth", truth)] for said, truth in zip(written, truths, strict=True)]

    def gflops(self, batch: dict, output: tuple[list[str], TowerRecord, Tensor]) -> Tensor:
        return output[2]


class VqaView(View):
    """VQA: a picture and a question. A sample's id is that of its question."""

    image_key = "images"
    text_keys = ("question_ids", "question_mask")
    timed = "questions answered, their pictures read anew for each"

    def __init__(self, opened: Opened, samples: Samples):
        super().__init__(opened, samples)
        self.answer = Answerer(self.config, self.tokenizer, self.run.device)

    @staticmethod
    def test_samples(config: VqaConfig, tokenizer: Tokenizer) -> Samples:
        dataset = answered_questions(config)["test"]
        collate = QuestionCollate(tokenizer, config.bert_sizes.max_position_embeddings)
        return Samples(dataset, [str(entry["question_id"]) for entry in dataset.entries], collate)

    def compute(self, batch: dict) -> tuple[list[str], Question, Tensor]:
        return self.answer(self.model, batch, self.setting)

    def records(self, output: tuple[list[str], Question, Tensor]) -> dict[str, TowerRecord]:
        return {"image": output[1].vision, "text": output[1].language}

    def names(self, batch: dict) -> list[str]:
        return [str(question) for question in batch["ids"]]

    def said(self, batch: dict, output: tuple[list[str], Question, Tensor]) -> list[list[tuple[str, str]]]:
        """The truth is what most annotators said, where that is known."""
        given = [[("truth", Counter(answers).most_common(1)[0][0])] if answers else [] for answers in batch["answers"]]
        return [[("answer", text), *truth] for text, truth in zip(output[0], given, strict=True)]

    def gflops(self, batch: dict, output: tuple[list[str], Question, Tensor]) -> Tensor:
        return output[2]


VIEWS: dict[str, type[View]] = {
    "nlvr": NlvrView,
    "retrieval": RetrievalView,
    "retrieval_clip": ClipView,
    "caption": CaptionView,
    "vqa": VqaView,
}


def open_view(config: Config, checkpoint: Path | str, device: str | None = None, temperature: float | None = None) -> View:
    """The view of a model at the temperature that its checkpoint was saved with, or at `temperature`.

    Raises:
        UserError: when the model prunes and there is no temperature.
    """
    saved = read_checkpoint(checkpoint)
    given = {} if temperature is None else {"temperature": temperature, "variant": config.variant}
    setting = saved_setting(config, {**saved, **given})
    if setting is None:
        raise UserError(f"{checkpoint}: holds no temperature; give one with --temperature, or a run's checkpoint")
    opened, _ = restore(config, saved, str(checkpoint), setting, device)
    kind = VIEWS[config.task]
    return kind(opened, kind.test_samples(config, opened.tokenizer))


def spread(ids: Sequence[str], number: int) -> list[str]:
    """`number` of `ids` (all, when there are fewer), evenly spaced."""
    number = min(number, len(ids))
    return [ids[(2 * i + 1) * len(ids) // (2 * number)] for i in range(number)]
