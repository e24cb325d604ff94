"""The whole BLIP for retrieval, `variant: released`, against the authors' published code, from captions to losses."""

from pathlib import Path

import pytest
import torch

from configs.schema import RetrievalConfig
from data.captions import PairCollate
from data.text import enc_token_id, load_tokenizer
from madtp.blocks import Guidance
from madtp.packing import class_tokens
from madtp.rule import OFF, PruneSetting
from models.blip_retrieval import BlipRetrieval
from models.weights.blip import load_retrieval_weights
from tasks.retrieval import retrieval_from_config
from tests import golden

ADDED = ("[DEC]", "[ENC]")  # to the words of the file, by the tokenizer
BERT = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")


def config_of(info: dict, vocabulary: Path) -> RetrievalConfig:
    theirs = info["config"]
    names = ("image_size", "sd_num", "sd_dim", "embed_dim", "queue_size", "momentum", "negative_all_rank", "alpha")
    vocabulary.write_text("\n".join(word for word in info["vocab"] if word not in ADDED))
    return RetrievalConfig(
        variant="released",
        tokenizer=vocabulary,
        vit={"patch_size": theirs["patch_size"], **theirs["vit"]},
        bert={"dropout": 0, **{name: theirs["med_config"][name] for name in BERT}},
        **{name: theirs[name] for name in names},
    )


def model_of(config: RetrievalConfig, weights: dict[str, torch.Tensor]) -> BlipRetrieval:
    tokenizer = load_tokenizer(config.tokenizer)
    model = retrieval_from_config(config, len(tokenizer), enc_token_id(tokenizer))
    load_retrieval_weights(model, weights, "the golden file")
    return model.eval()


def batch_of(config: RetrievalConfig, info: dict, t: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The batch that the data path makes of the captions, which does not pad them to the authors' length."""
    items = [
        {"image": image, "caption": caption, "image_id": int(number)}
        for image, caption, number in zip(t["images"], info["captions"], t["idx"].flatten(), strict=True)
    ]
    batch = PairCollate(load_tokenizer(config.tokenizer), config.max_text_tokens)(items)
    longest = batch["input_ids"].shape[1]
    assert longest < t["input_ids"].shape[1] == config.max_text_tokens
    assert torch.equal(batch["input_ids"], t["input_ids"][:, :longest])
    return tuple(batch[name] for name in ("image", "input_ids", "attention_mask"))


class Replay:
    """`torch.multinomial` that gives what the authors' run drew, and keeps the weights that it is asked to draw by."""

    def __init__(self, drawn: list[torch.Tensor]):
        self.drawn, self.weights = iter(drawn), []

    def __call__(self, weights: torch.Tensor, number: int) -> torch.Tensor:
        self.weights.append(weights)
        return next(self.drawn).unsqueeze(1)


@pytest.mark.parametrize("path", golden.cases("retrieval*"))
@torch.no_grad()
def test_retrieval(path, monkeypatch, tmp_path):
    info, t = golden.load(path)
    config = config_of(info, tmp_path / "vocab.txt")
    batch = batch_of(config, info, t)
    for temperature in info["config"]["temperatures"]:
        model, name = model_of(config, golden.published_weights(t)), f"T{temperature}"
        draw = Replay([t[f"{name}.neg_image"], t[f"{name}.neg_text"]])
        monkeypatch.setattr(torch, "multinomial", draw)
        setting = PruneSetting(float(temperature)) if temperature > 0 else OFF
        model.follow()
        passes = model.passes(*batch, t["idx"], Guidance(setting, align=True))
        losses = model.losses(passes, t["idx"], info["config"]["alpha"])
        model.enqueue(passes, t["idx"])
        golden.assert_close(passes.logits, t[f"{name}.itm_logits"])
        for side, encoded in (("image", passes.image), ("text", passes.text)):
            golden.assert_close(class_tokens(encoded.tokens, encoded.layout), t[f"{name}.{side}_cls"])
        golden.assert_close(draw.weights[0], t[f"{name}.weights_t2i"])
        golden.assert_close(draw.weights[1], t[f"{name}.weights_i2t"])
        golden.assert_close(passes.image.record.features, t[f"{name}.sd_img_ft"])
        golden.assert_close(passes.text.record.features, t[f"{name}.sd_txt_ft"])
        names = {"contrastive": "loss_ita", "matching": "loss_itm"}
        if temperature > 0:  # at 0 the published code repeats the contrastive loss in their place
            names |= {"similarity": "loss_fdt", "similarity_momentum": "loss_fdt_m"}
        for ours, theirs in names.items():
            torch.testing.assert_close(losses[ours], t[f"{name}.{theirs}"], rtol=1e-5, atol=1e-4)
        state = model.state_dict()
        for key, tensor in t.items():
            if key.startswith(f"{name}.after."):
                golden.assert_close(state[key.removeprefix(f"{name}.after.")], tensor)
        if temperature > 0:
            for part, encoded in (("image", passes.image), ("image_m", passes.image_momentum)):
                leaving = [int(n[0]) for n in encoded.record.leaving]
                assert leaving == t[f"{name}.{part}.tokens_per_layer"].tolist()
