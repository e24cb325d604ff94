"""CLIP's towers: dense, they are transformers'; pruned, the end-of-text token is read and sees the merged one."""

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from clip.model import Clip, ClipSize
from madtp.attention.attend import causal_mask
from madtp.attention.statistics import map_statistics
from madtp.blocks import Guidance
from madtp.packing import end_first, pack
from madtp.pruning import TokenPruner
from madtp.rule import CAUSAL_SCORES, OFF, PruneSetting, PruningRule
from models.clip_retrieval import ClipRetrieval
from models.weights.clip import load_clip_weights
from tests.tiny import ended_text, with_lively_weights

SMALL = ClipSize(32, 8, 24, 2, 3, 16, 2, 2, 12, 40, 20)
LARGER = ClipSize(48, 8, 32, 3, 4, 24, 4, 3, 16, 50, 28)
LEARNABLE = (5, 20, 1.0)


def pruned(causal_scores: str = "plain") -> Clip:
    rule = PruningRule(keep="instance", causal_scores=causal_scores)
    model = Clip(SMALL, lambda dim: TokenPruner(dim, *LEARNABLE[:2], rule, "on"), LEARNABLE)
    return with_lively_weights(model).eval()


@pytest.mark.parametrize("size", [SMALL, LARGER])
@torch.no_grad()
def test_dense_equals_transformers(size):
    shared = {"hidden_act": "quick_gelu", "initializer_range": 0.1, "initializer_factor": 5.0}
    config = CLIPConfig(
        vision_config={
            "hidden_size": size.vision_width, "intermediate_size": 4 * size.vision_width, "num_hidden_layers": size.vision_layers,
            "num_attention_heads": size.vision_heads, "image_size": size.image_size, "patch_size": size.patch_size, **shared,
        },
        text_config={
            "hidden_size": size.text_width, "intermediate_size": 4 * size.text_width, "num_hidden_layers": size.text_layers,
            "num_attention_heads": size.text_heads, "max_position_embeddings": size.context_length, "vocab_size": size.vocab_size,
            "eos_token_id": size.vocab_size - 1, "bos_token_id": size.vocab_size - 2, "pad_token_id": 0, **shared,
        },
        projection_dim=size.embed_dim,
    )  # fmt: skip
    torch.manual_seed(0)
    other = with_lively_weights(CLIPModel(config).eval())
    model = ClipRetrieval(size, queue_size=8)
    load_clip_weights(model, other.state_dict(), "CLIPModel")
    images, ids = torch.randn(3, 3, size.image_size, size.image_size), ended_text([4, size.context_length, 7], size=size)[0]
    expected = other(input_ids=ids, pixel_values=images)
    image, text = model.encode_image(images), model.encode_text(ids)
    assert not torch.allclose(expected.image_embeds[0], expected.image_embeds[1], atol=1e-2)  # the comparison is not empty
    assert not torch.allclose(expected.text_embeds[0], expected.text_embeds[1], atol=1e-2)
    torch.testing.assert_close(image.feature, expected.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(text.feature, expected.text_embeds, atol=1e-5, rtol=0)
    logits = text.feature @ image.feature.t() / model.contrastive_temperature
    torch.testing.assert_close(logits, expected.logits_per_text, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.encode_image(images, Guidance(packed=True)).feature, expected.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.encode_text(ids, Guidance(packed=True)).feature, expected.text_embeds, atol=1e-5, rtol=0)
    slow = model.encode_image(images, slow=True), model.encode_text(ids, slow=True)
    assert torch.equal(slow[0].feature, image.feature) and torch.equal(slow[1].feature, text.feature)


def test_the_end_of_text_token_sees_all_and_is_seen_by_none():
    mask = causal_mask(4, "class_last", torch.device("cpu"))
    assert mask.tolist() == [[True] * 4, [False, True, False, False], [False, True, True, False], [False, True, True, True]]


def test_end_first_moves_the_end_to_the_front_and_drops_what_follows():
    x = torch.arange(10.0).reshape(2, 5, 1)
    out, valid = end_first(x, torch.tensor([3, 1]))
    assert out[0, :, 0].tolist() == [3, 0, 1, 2] and valid.tolist() == [[True] * 4, [True, True, False, False]]
    assert out[1, :2, 0].tolist() == [6, 5]


@torch.no_grad()
def test_whatever_is_pruned_the_end_of_text_token_is_read_and_sees_the_merged_one():
    """A plain loop over one text in its natural order: the end-of-text token last, the merged one right before it."""
    model = pruned()
    ids = ended_text([11], size=SMALL)[0]
    setting = PruneSetting(0.0)
    encoded = model.encode_text(ids, Guidance(setting))
    assert encoded.record.leaving[-1] < encoded.record.entering[0]  # something was pruned
    length = 11
    x = (model.token_embedding(ids[0, :length]) + model.positional_embedding[:length])[None]
    for block in model.transformer.resblocks:
        n = x.shape[1]
        heads, dim = block.attn.num_heads, x.shape[2]
        q, k, v = torch.nn.functional.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, -1)
        q, k, v = (part.reshape(1, n, heads, dim // heads).transpose(1, 2) for part in (q, k, v))
        scores = q @ k.transpose(-1, -2) / (dim // heads) ** 0.5
        attention = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), float("-inf")).softmax(-1)
        out = attention @ v
        first = [n - 1, *range(n - 1)]  # the order in which a pruner takes them
        aligned, _ = block.pruner.align(x[:, first], None, model.learnable_tokens, False)
        statistics = map_statistics(attention[:, :, first][:, :, :, first], out[:, :, first], None, block.pruner.rule)
        x = x + block.attn.out_proj(out.transpose(1, 2).reshape(1, n, dim))
        importance, kept, _ = block.pruner.choose(aligned, statistics, torch.ones(1, n - 1, dtype=torch.bool), setting.temperature)
        body, pruned_ones = x[:, :-1], ~kept[0]
        if pruned_ones.any():
            weight = importance[0, pruned_ones] / (importance[0, pruned_ones].sum() + 1e-8)
            merged = (weight[:, None] * body[0, pruned_ones]).sum(0)[None, None]
            x = torch.cat([body[:, kept[0]], merged, x[:, -1:]], dim=1)
        x = x + block.mlp(block.ln_2(x))
    expected = model.ln_final(x)[:, -1] @ model.text_projection
    torch.testing.assert_close(encoded.feature, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_the_start_token_has_the_largest_self_attention_unless_queries_are_weighed(packed):
    """S_self of every word by a loop over the queries that see it."""
    words, width = 9, SMALL.text_width
    x = torch.randn(1, words, width)  # the end of text first, then the start
    found = {}
    for choice in CAUSAL_SCORES:
        block = pruned(choice).transformer.resblocks[0]
        found[choice] = block.attend(*(pack(x, None) if packed else (x, None)), block.pruner.rule)[1].columns[0].tolist()
    heads = block.attn.num_heads
    q, k, _ = torch.nn.functional.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, -1)
    q, k = (part[0, 1:].reshape(words - 1, heads, width // heads) for part in (q, k))
    weights = {"plain": lambda seen: 1.0, "relative": lambda seen: seen / (words - 1), "skip": lambda seen: float(seen > 1)}
    for choice, weight in weights.items():
        for token in range(words - 1):
            shares = [
                weight(query + 1) * float((k[: query + 1, head] @ q[query, head] / (width // heads) ** 0.5).softmax(0)[token])
                for query in range(token, words - 1)
                for head in range(heads)
            ]
            assert found[choice][token] == pytest.approx(max(shares), abs=1e-5)
    assert found["plain"][0] == 1.0 == max(found["plain"]) and max(found["relative"][0], found["skip"][0]) < 1


@torch.no_grad()
def test_a_batch_of_32_is_encoded_as_each_alone():
    model, setting = pruned(), PruneSetting(3.0)
    torch.manual_seed(0)
    images = torch.randn(32, 3, 32, 32) * torch.rand(32, 1, 1, 1) * 3
    ids = ended_text(torch.randint(3, SMALL.context_length + 1, (32,)).tolist(), size=SMALL)[0]
    for encode, inputs in ((model.encode_image, images), (model.encode_text, ids)):
        together = encode(inputs, Guidance(setting, packed=True))
        assert len(set(together.record.leaving[-1].tolist())) > 3  # they differ in what they keep
        alone = torch.cat([encode(one, Guidance(setting, packed=True)).feature for one in inputs.split(1)])
        torch.testing.assert_close(together.feature, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("setting", [OFF, PruneSetting(0.0), PruneSetting(20.0), PruneSetting(3.0, 1)])
@torch.no_grad()
def test_packed_alone_and_padded_agree(setting):
    model = pruned()
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32) * torch.tensor([0.3, 1, 2, 3])[:, None, None, None]
    ids = ended_text([3, 12, 6, 9], size=SMALL)[0]
    for encode, inputs in ((model.encode_image, images), (model.encode_text, ids)):
        padded, packed = encode(inputs, Guidance(setting)), encode(inputs, Guidance(setting, packed=True))
        torch.testing.assert_close(packed.feature, padded.feature, atol=1e-5, rtol=1e-5)
        assert [n.tolist() for n in packed.record.leaving] == [n.tolist() for n in padded.record.leaving]
        for i in range(4):
            alone = encode(inputs[i : i + 1], Guidance(setting, packed=True))
            torch.testing.assert_close(alone.feature[0], packed.feature[i], atol=1e-5, rtol=1e-5)


def test_in_mixed_precision_the_residual_stream_stays_exact():
    tower = Clip(ClipSize(image_size=16, patch_size=8, vision_width=32, vision_layers=1, vision_heads=2, vocab_size=9)).visual
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert tower.embed(torch.randn(2, 3, 16, 16)).dtype == torch.float32
