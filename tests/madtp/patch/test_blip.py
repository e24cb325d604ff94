"""Pruning BLIP of transformers: image and text encoder, with cross-attention and decoders that read what is left."""

from dataclasses import replace

import pytest
import torch
import transformers
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

import madtp
from tests.madtp.patch.test_transformers import P, lively, pictures

SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT = {
    **SIZES, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 50, "encoder_hidden_size": 48,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 48, "eos_token_id": 2, "sep_token_id": 49,
}  # fmt: skip
MODELS = {
    "matching": transformers.BlipForImageTextRetrieval,
    "question answering": transformers.BlipForQuestionAnswering,
    "captioning": transformers.BlipForConditionalGeneration,
}


@pytest.fixture(params=MODELS)
def kind(request) -> str:
    return request.param


def model_of(kind: str) -> nn.Module:
    # An answer's decoder is as wide as the question's encoder.
    text = TEXT | ({"hidden_size": 48, "num_attention_heads": 4} if kind == "question answering" else {})
    config = transformers.BlipConfig(text_config=text, vision_config={**SIZES, "image_size": 32, "patch_size": 8})
    return lively(lambda: MODELS[kind](config))


def batch_of(kind: str, number: int = 6) -> dict[str, Tensor]:
    ids = torch.randint(3, 40, (number, 9), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(9) < torch.tensor([9, 7, 5, 9, 8, 6])[:number, None]).long()
    words = {} if kind == "captioning" else {"input_ids": ids * mask, "attention_mask": mask}
    return {"pixel_values": pictures(number), **words}


def outputs(kind: str, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What a caller reads: the matching scores, or the scores of the next words."""
    torch.manual_seed(0)
    if kind == "matching":
        return model(**batch).itm_score
    start = torch.tensor([[48, 7, 9]]).expand(len(batch["pixel_values"]), -1)
    seen = []
    decoder = model.text_decoder
    with torch.no_grad():
        hook = decoder.cls.register_forward_hook(lambda module, inputs, out: seen.append(out))
        if kind == "captioning":
            model(pixel_values=batch["pixel_values"], input_ids=start)
        else:
            model(**batch, decoder_input_ids=start)
        hook.remove()
    return seen[0].flatten(1)


@torch.no_grad()
def test_off_it_is_the_original_to_the_bit_and_restored_it_is_the_same_object(kind):
    model, batch = model_of(kind), batch_of(kind)
    expected, names = outputs(kind, model, batch), list(model.state_dict())
    pruning = madtp.prune(model, batch, p=P)
    assert not torch.equal(outputs(kind, model, batch), expected)
    assert [name for name in model.state_dict() if not name.startswith("madtp.")] == names
    pruning.setting = madtp.OFF
    assert torch.equal(outputs(kind, model, batch), expected)
    assert madtp.restore(model) is model and list(model.state_dict()) == names
    assert torch.equal(outputs(kind, model, batch), expected)
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@torch.no_grad()
def test_a_pass_that_prunes_nothing_is_the_original_pass(kind, packed):
    model, batch = model_of(kind), batch_of(kind)
    whole = {name: values[:1] for name, values in batch.items()}  # without padding, which the original reads
    expected = outputs(kind, model, whole)
    pruning = madtp.prune(model, batch, p=P, packed=packed)
    for block in pruning.blocks:
        block.pruner.rule = replace(block.pruner.rule, share=1.0)
    torch.testing.assert_close(outputs(kind, model, whole), expected, atol=1e-5, rtol=1e-5)
    assert set(pruning.records) == ({"vision"} if kind == "captioning" else {"vision", "language"})


@torch.no_grad()
def test_packed_padded_and_alone_agree_also_for_the_decoder_behind(kind, rule):
    model, batch = model_of(kind), batch_of(kind)
    pruning = madtp.prune(model, batch, p=P, rule=rule)
    packed = outputs(kind, model, batch)
    assert pruning.record.packed and len(pruning.record.leaving[-1].unique()) > 1
    pruning.packed = False
    torch.testing.assert_close(outputs(kind, model, batch), packed, atol=1e-5, rtol=1e-5)
    pruning.packed = True
    each = [outputs(kind, model, {name: values[i : i + 1] for name, values in batch.items()}) for i in range(len(packed))]
    torch.testing.assert_close(torch.cat(each), packed, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_is_generated_from_a_batch_with_beams_is_what_is_generated_alone():
    for kind in ("question answering", "captioning"):
        model, batch = model_of(kind), batch_of(kind)
        madtp.prune(model, batch, p=P)
        options = {"num_beams": 3, "max_new_tokens": 5, "min_new_tokens": 5}
        together = model.generate(**batch, **options)
        for i in range(len(together)):
            alone = model.generate(**{name: values[i : i + 1] for name, values in batch.items()}, **options)
            assert torch.equal(alone[0], together[i]), (kind, i)


@torch.no_grad()
def test_p_of_the_gflops_go_and_the_dense_count_is_fvcores(rule):
    model, batch = model_of("matching"), batch_of("matching")
    one = {name: values[:1] for name, values in batch.items()}

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
            return self.model(pixel_values=images, input_ids=ids, attention_mask=mask).itm_score

    counter = FlopCountAnalysis(Call(), tuple(one.values())).unsupported_ops_warnings(False).tracer_warnings("none")
    counted = counter.total() / 1e9
    pruning = madtp.prune(model, batch, p=P, rule=rule)
    assert float(pruning.gflops(one, madtp.OFF)) == pytest.approx(counted, rel=1e-9)
    assert float(pruning.gflops(batch).mean()) == pytest.approx((1 - P) * pruning.dense_gflops, rel=0.01)


@torch.no_grad()
def test_a_text_encoder_that_stays_whole_does_not_read_padding():
    model, batch = model_of("matching"), batch_of("matching")
    pruning = madtp.prune(model, batch["pixel_values"], p=P)
    assert list(pruning.records) == ["vision"]
    words = {"input_ids": torch.randint(3, 40, (6, 9)), "attention_mask": torch.ones(6, 9, dtype=torch.long)}
    together = outputs("matching", model, batch | words)
    each = [outputs("matching", model, {name: values[i : i + 1] for name, values in (batch | words).items()}) for i in range(6)]
    torch.testing.assert_close(torch.cat(each), together, atol=1e-5, rtol=1e-5)
