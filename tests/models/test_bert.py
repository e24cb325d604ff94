"""The text tower: without cross-attention it is BERT's; its cross-attention is torch's; padding never changes an answer."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from madtp.blocks import Guidance
from madtp.pruning import TokenPruner
from madtp.rule import PruneSetting, PruningRule
from models.bert import BertSize, Heads, PairedCrossAttention, TextEncoder
from tests.tiny import text, with_lively_weights

SIZE = BertSize(40, 24, 3, 3, 48, 32, dropout=0.0)
IMAGE_WIDTH = 20
LEARNABLE = 0.1 * torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
LENGTHS = [9, 4, 12, 7]


class NoCrossAttention(nn.Module):
    def forward(self, x, images, images_valid):
        return x


def encoder(rule: PruningRule | None = None, cross_attention=NoCrossAttention) -> TextEncoder:
    make_pruner = (lambda dim: None) if rule is None else (lambda dim: TokenPruner(dim, *LEARNABLE.shape, rule))
    return with_lively_weights(TextEncoder(SIZE, lambda i: cross_attention(), make_pruner)).eval()


def paired(merge: bool = False) -> PairedCrossAttention:
    return PairedCrossAttention(SIZE, IMAGE_WIDTH, merge)


def pictures(number: int = 4, tokens: int = 6) -> list[torch.Tensor]:
    return list(torch.randn(2, number, tokens, IMAGE_WIDTH, generator=torch.Generator().manual_seed(2)))


def whole(images: list[torch.Tensor]) -> list[tuple[torch.Tensor, None]]:
    """Image tokens without padding, as the encoder takes them."""
    return [(image, None) for image in images]


@torch.no_grad()
def test_without_cross_attention_it_is_bert():
    ours = encoder()
    config = BertConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=48, max_position_embeddings=32
    )
    bert = BertModel(config, add_pooling_layer=False).eval()
    bert.embeddings.token_type_embeddings.weight.zero_()
    loaded = bert.load_state_dict(ours.state_dict(), strict=False)
    assert loaded.missing_keys == ["embeddings.token_type_embeddings.weight"] and not loaded.unexpected_keys
    ids, mask = text(LENGTHS)
    expected = bert(ids, mask).last_hidden_state
    out, valid, _ = ours(ids, mask, [])
    assert torch.equal(valid, mask.bool())
    torch.testing.assert_close(out[valid], expected[valid], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_attention_to_a_picture_is_torchs_and_honours_its_mask():
    heads = with_lively_weights(Heads(SIZE, IMAGE_WIDTH)).eval()
    other = nn.MultiheadAttention(24, 3, kdim=IMAGE_WIDTH, vdim=IMAGE_WIDTH, batch_first=True)
    for name, part in (("q", heads.query), ("k", heads.key), ("v", heads.value)):
        getattr(other, f"{name}_proj_weight").copy_(part.weight)
    other.in_proj_bias.copy_(torch.cat([heads.query.bias, heads.key.bias, heads.value.bias]))
    other.out_proj.weight.copy_(torch.eye(24))
    other.out_proj.bias.zero_()
    x, picture = torch.randn(4, 5, 24), pictures()[0]
    valid = torch.arange(6) < torch.tensor([6, 2, 4, 1])[:, None]
    expected = other(x, picture, picture, key_padding_mask=~valid)[0]
    for enabled in (False, True):  # fused attention, and products
        with torch.set_grad_enabled(enabled):
            torch.testing.assert_close(heads(x, picture, None, valid)[0].detach(), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_attentions_to_two_pictures_meet_in_their_mean_or_in_a_linear_layer():
    x, images = torch.randn(4, 5, 24), pictures()
    for merge in (False, True):
        cross = with_lively_weights(paired(merge)).eval()
        first, second = (heads(x, image, None, None)[0] for heads, image in zip((cross.self0, cross.self1), images, strict=True))
        first, second = cross.output.dense0(first), cross.output.dense1(second)
        joined = cross.output.merge_layer(torch.cat([first, second], dim=-1)) if merge else (first + second) / 2
        expected = nn.functional.layer_norm(joined + x, (24,), cross.output.LayerNorm.weight, cross.output.LayerNorm.bias, 1e-12)
        torch.testing.assert_close(cross(x, None, whole(images)), expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(cross(x, None, whole(images[::-1])), expected, atol=1e-3)  # the pictures are told apart


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_switched_off_pruners_change_not_one_number(training):
    ids, mask = text(LENGTHS)
    inputs = ids, mask, whole(pictures())
    dense, sparse = encoder(cross_attention=paired).train(training), encoder(PruningRule(), paired).train(training)
    expected = dense(*inputs)[0]
    assert torch.equal(sparse(*inputs, Guidance(learnable_tokens=LEARNABLE))[0], expected)
    aligned, _, record = sparse(*inputs, Guidance(align=True, learnable_tokens=LEARNABLE))
    assert torch.equal(aligned, expected) and record.features.shape == (4, 5, 24)
    assert torch.equal(sparse(*inputs, Guidance(PruneSetting(1.0, prune_from=3), learnable_tokens=LEARNABLE))[0], expected)
    assert sparse(*inputs, Guidance(PruneSetting(1.0, prune_from=2), learnable_tokens=LEARNABLE))[0].shape[1] < expected.shape[1]


@pytest.mark.parametrize("setting", [PruneSetting(), PruneSetting(2.0), PruneSetting(30.0)], ids=str)
@torch.no_grad()
def test_padding_and_batch_mates_never_change_an_answer(setting):
    model = encoder(PruningRule(keep="instance"), paired)
    lengths = [9, 4, 12, 7, 12, 10, 11, 12]
    ids, mask = text(lengths, width=15)  # longer than any: padding for everyone
    images = pictures(8)
    images_valid = (torch.arange(6) < torch.tensor([6, 2, 4, 1, 3, 6, 5, 2])[:, None], None)
    guidance = Guidance(setting, align=True, learnable_tokens=LEARNABLE)
    out, valid, record = model(ids, mask, list(zip(images, images_valid, strict=True)), guidance)
    if setting.temperature is not None:
        full = [int(record.leaving[-1][i]) for i, length in enumerate(lengths) if length == 12]
        assert len(set(full)) > 1, "texts of one length differ in what is kept"
    for i, length in enumerate(lengths):
        here = [(images[0][i : i + 1], images_valid[0][i : i + 1]), (images[1][i : i + 1], None)]
        alone, _, alone_record = model(ids[i : i + 1, :length], mask[i : i + 1, :length], here, guidance)
        torch.testing.assert_close(out[i][valid[i]], alone[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(record.features[i : i + 1], alone_record.features, atol=1e-5, rtol=1e-5)
        assert [int(n[i]) for n in record.leaving] == [int(n[0]) for n in alone_record.leaving]


@torch.no_grad()
def test_padded_image_tokens_are_never_read():
    model, (ids, mask), images = encoder(cross_attention=paired), text(LENGTHS), pictures()
    short = torch.arange(6) < torch.tensor([3, 3, 3, 3])[:, None]
    out = model(ids, mask, [(image, short) for image in images])[0]
    torch.testing.assert_close(out, model(ids, mask, whole([image[:, :3] for image in images]))[0], atol=1e-5, rtol=1e-5)
    for image in images:
        image[:, 3:] = 1e4
    assert torch.equal(model(ids, mask, [(image, short) for image in images])[0], out)
