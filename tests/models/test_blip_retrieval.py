"""BLIP for retrieval: dense, it is transformers'; pruned, its answers do not depend on the batch; what it draws as negatives."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import BlipConfig, BlipForImageTextRetrieval

from madtp.blocks import Guidance
from madtp.packing import count_tokens
from madtp.rule import OFF, PruneSetting, PruningRule
from models.bert import BertSize, CrossAttention, TextEncoder
from models.blip_retrieval import BlipRetrieval
from models.momentum import hard_negatives
from models.vit import VisionTransformer
from models.weights.blip import load_retrieval_weights
from models.weights.reading import read_checkpoint
from tasks.registry import build_model, load_any_config
from tests import tiny

INSTANCE = PruningRule(keep="instance")
SETTING = PruneSetting(3.0)
LENGTHS = [5, 9, 7, 6]


def transformers_model(vision: dict, text: dict, embed_dim: int) -> BlipForImageTextRetrieval:
    """Builds transformers' model of these sizes with BLIP's epsilon and lively weights; its own would make all images alike."""
    vision = {**vision, "layer_norm_eps": 1e-6}
    config = BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=embed_dim)
    return tiny.with_lively_weights(BlipForImageTextRetrieval(config)).eval()


def our_model(other: BlipForImageTextRetrieval, enc_token: int) -> BlipRetrieval:
    """A model of the sizes and with the weights of `other`."""
    vision, text = other.config.vision_config, other.config.text_config
    encoder = VisionTransformer(
        vision.image_size, vision.patch_size, vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads,
        vision.intermediate_size / vision.hidden_size,
    )  # fmt: skip
    size = BertSize(**{name: getattr(text, name) for name in BertSize.__dataclass_fields__ if name != "dropout"}, dropout=0.0)
    reader = TextEncoder(size, lambda i: CrossAttention(size, vision.hidden_size))
    model = BlipRetrieval(encoder, reader, enc_token, other.config.image_text_hidden_size, queue_size=4).eval()
    load_retrieval_weights(model, other.state_dict(), "transformers")
    return model


SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
VISION, TEXT = (*SHAPE, "image_size", "patch_size"), (*SHAPE, "vocab_size", "max_position_embeddings")
SIZES = {
    "small": (dict(zip(VISION, (24, 96, 2, 3, 32, 8), strict=True)), dict(zip(TEXT, (16, 40, 2, 4, 40, 20), strict=True)), 12),
    "larger": (dict(zip(VISION, (32, 64, 3, 2, 48, 16), strict=True)), dict(zip(TEXT, (32, 64, 4, 2, 60, 33), strict=True)), 20),
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@torch.no_grad()
def test_dense_equals_transformers(sizes):
    other, enc_token = transformers_model(*sizes), sizes[1]["vocab_size"] - 1
    model = our_model(other, enc_token)
    images = torch.randn(4, 3, *2 * [sizes[0]["image_size"]], generator=torch.Generator().manual_seed(0))
    ids, mask = tiny.text(LENGTHS)
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": images}
    begun = {**inputs, "input_ids": torch.cat([torch.full_like(ids[:, :1], enc_token), ids[:, 1:]], dim=1)}  # it never puts [ENC]
    scores, logits = other(**inputs, use_itm_head=False).itm_score, other(**begun).itm_score
    turned = other(**{**begun, "pixel_values": images.flip(0)}).itm_score
    assert (logits - turned).abs().min() > 1e-2 and scores.diff(dim=0).abs().max() > 1e-2  # the comparison is not empty
    for packed in (False, True):
        image, text = model.encode_image(images, Guidance(packed=packed)), model.encode_text(ids, mask, Guidance(packed=packed))
        torch.testing.assert_close(image.feature @ text.feature.t(), scores, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.match(ids, mask, (image.tokens, image.layout))[0], logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.encode_image(images, slow=True).feature, model.encode_image(images).feature)


@pytest.mark.parametrize("setting", [OFF, SETTING, PruneSetting(3.0, prune_from=1)], ids=str)
@torch.no_grad()
def test_packed_padded_and_alone_agree(setting):
    """Features of both towers, online and slow, logits of pairs and negatives, and the tokens that all passes leave."""
    model, batch = tiny.retrieval(INSTANCE), tiny.pairs("blip", LENGTHS)
    together = {packed: model.passes(*batch, guidance=Guidance(setting, packed=packed)) for packed in (False, True)}
    for i, length in enumerate(LENGTHS):
        images, ids, mask = (part[i : i + 1] for part in batch)
        alone = model.passes(images, ids[:, :length], mask[:, :length], guidance=Guidance(setting))
        for packed, passes in together.items():
            for name in ("image", "text", "image_momentum", "text_momentum"):
                one, whole = getattr(alone, name), getattr(passes, name)
                torch.testing.assert_close(whole.feature[i], one.feature[0], atol=1e-5, rtol=1e-5)
                assert [int(n[i]) for n in whole.record.leaving] == [int(n[0]) for n in one.record.leaving]
            torch.testing.assert_close(passes.logits[i :: len(LENGTHS)], alone.logits, atol=3e-5, rtol=1e-5)
            (record, read), (record_alone, read_alone) = passes.matching[0], alone.matching[0]
            assert [int(n[i]) for n in record.leaving] == [int(n[0]) for n in record_alone.leaving]
            assert int(read[i]) == int(read_alone[0]) == int(count_tokens(alone.image.tokens, alone.image.layout)[0]), packed
    kept = together[True].image.record.leaving[-1], together[True].matching[0][0].leaving[-1]
    assert setting is not SETTING or all(int(n.max() - n.min()) > 1 for n in kept)  # they differ in what they keep


@torch.no_grad()
def test_a_batch_of_32_is_matched_as_each_pair_alone():
    model = tiny.retrieval(INSTANCE)
    lengths = torch.randint(4, 13, (32,), generator=torch.Generator().manual_seed(0)).tolist()
    images, ids, mask = tiny.pairs("blip", lengths)
    image = model.encode_image(images, Guidance(SETTING, packed=True))
    together, record = model.match(ids, mask, (image.tokens, image.layout), SETTING)
    assert len(set(record.leaving[-1].tolist())) > 3  # they differ in what they keep
    for i, length in enumerate(lengths):
        image = model.encode_image(images[i : i + 1], Guidance(SETTING, packed=True))
        alone, _ = model.match(ids[i : i + 1, :length], mask[i : i + 1, :length], (image.tokens, image.layout), SETTING)
        torch.testing.assert_close(together[i].softmax(dim=0), alone[0].softmax(dim=0), atol=1e-5, rtol=0)
        torch.testing.assert_close(together[i], alone[0], atol=3e-5, rtol=0)  # of numbers up to 4, by weights larger than usual


@torch.no_grad()
def test_the_shapes_model_matches_a_batch_of_32_as_each_pair_alone():
    """Compares the logits themselves, with trained weights."""
    config = load_any_config("configs/shapes/retrieval.yaml", {"amp": False})
    torch.manual_seed(0)
    model, _ = build_model(config)
    load_retrieval_weights(model, read_checkpoint(config.pretrained)["model"], "shapes")
    lengths = torch.randint(4, 20, (32,)).tolist()
    images, (ids, mask) = torch.rand(32, 3, 96, 96) * torch.rand(32, 1, 1, 1), tiny.text(lengths)
    setting = PruneSetting(2.0, prune_from=1)
    image = model.eval().encode_image(images, Guidance(setting, packed=True))
    together, record = model.match(ids, mask, (image.tokens, image.layout), setting)
    assert len(set(record.leaving[-1].tolist())) > 3 and together.abs().max() > 1
    for i, length in enumerate(lengths):
        image = model.encode_image(images[i : i + 1], Guidance(setting, packed=True))
        alone, _ = model.match(ids[i : i + 1, :length], mask[i : i + 1, :length], (image.tokens, image.layout), setting)
        torch.testing.assert_close(together[i], alone[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_by_the_authors_formulas_texts_are_read_at_one_length_whatever_that_of_their_batch():
    """Padding takes part in their scores, so that shorter rows would be other texts."""
    model, image, guidance = tiny.retrieval(PruningRule(variant="released")), tiny.images(2)[:, 0], Guidance(SETTING)
    shown = model.encode_image(image, guidance)

    def read(width: int) -> list[torch.Tensor]:
        text = tiny.text([5, 9], width=width)
        return [model.encode_text(*text, guidance).feature, model.match(*text, (shown.tokens, shown.layout), SETTING)[0]]

    unpadded, at_20 = read(9), read(20)
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(unpadded, at_20, strict=True))
    model.padded_to = 20
    assert all(torch.equal(a, b) for width in (9, 14, 20) for a, b in zip(read(width), at_20, strict=True))


@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_negatives_follow_the_pairs_first_another_image_then_another_text(packed):
    """With two pairs, each is the other's only negative."""
    model, (images, ids, mask) = tiny.retrieval(INSTANCE), tiny.pairs("blip", [5, 9])
    passes = model.passes(images, ids, mask, torch.tensor([3, 8]), Guidance(SETTING, packed=packed))
    assert passes.targets.tolist() == [1, 1, 0, 0, 0, 0]
    encoded = [model.encode_image(image[None], Guidance(SETTING)) for image in images]
    for row, (image, text) in enumerate([(0, 0), (1, 1), (1, 0), (0, 1), (0, 1), (1, 0)]):
        one = encoded[image].tokens, encoded[image].layout
        expected, _ = model.match(ids[text : text + 1], mask[text : text + 1], one, SETTING)
        torch.testing.assert_close(passes.logits[row], expected[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_of_one_image_has_no_negatives_and_matches_its_pairs_alone(packed):
    model = tiny.retrieval(INSTANCE).train()
    passes = model.passes(*tiny.pairs("blip", LENGTHS), torch.full((4,), 7), Guidance(SETTING, packed=packed))
    losses = model.losses(passes, torch.full((4,), 7), alpha=0.4)
    assert passes.logits.shape == (4, 2) and len(passes.matching) == 1
    torch.testing.assert_close(losses["matching"], cross_entropy(passes.logits, torch.ones(4, dtype=torch.long)))
    sum(losses.values()).backward()
    assert model.itm_head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("packed", [False, True])
def test_pairs_without_negatives_lack_them_alone(packed):
    """Nobody lacks one as long as there are two images in a batch."""
    passes = tiny.retrieval().passes(*tiny.pairs("blip", LENGTHS), torch.tensor([7, 7, 2, 7]), Guidance(packed=packed))
    assert passes.targets.tolist() == [1] * 4 + [0] * 8


DRAWS = 4000


def test_hard_negatives_are_drawn_by_similarity_and_never_of_the_same_image():
    torch.manual_seed(0)
    queries, others = torch.nn.functional.normalize(torch.randn(9, 6), dim=1).split([3, 6])
    query_ids, other_ids, temperature = torch.tensor([0, 1, 5]), torch.tensor([0, 0, 1, 2, 5, 3]), 0.5
    drawn = hard_negatives(
        queries.repeat_interleave(DRAWS, dim=0), others, query_ids.repeat_interleave(DRAWS), other_ids, temperature
    )  # fmt: skip
    for query, chosen in enumerate(drawn.split(DRAWS)):
        counts = chosen.bincount(minlength=6)
        allowed = other_ids != query_ids[query]
        assert not counts[~allowed].any() and counts[allowed].all()
        weights = torch.exp(queries[query] @ others.t() / temperature) * allowed
        expected = DRAWS * weights[allowed] / weights.sum()
        chi_square = ((counts[allowed] - expected) ** 2 / expected).sum()
        assert chi_square < 20  # of at most 4 degrees of freedom: by chance one in 2000 is above


def test_a_negative_is_found_where_all_are_unlikely_and_none_where_there_is_none():
    queries, others = torch.eye(2), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert hard_negatives(queries[:1], others, torch.tensor([0]), torch.tensor([0, 1]), 0.001).tolist() == [1]
    assert hard_negatives(queries, others, torch.tensor([0, 4]), torch.tensor([4, 4]), 1.0)[1] == -1


@torch.no_grad()
def test_momentum_encoders_that_recompute_activations_stay_encoders_of_their_own():
    images, _, _ = tiny.pairs("blip", LENGTHS)
    plain, wrapped = tiny.retrieval(), tiny.retrieval(checkpoint_blocks=2)
    assert (plain.encode_image(images).feature - plain.encode_image(images, slow=True).feature).abs().max() > 0.1
    for slow in (False, True):
        assert torch.equal(plain.encode_image(images, slow=slow).feature, wrapped.encode_image(images, slow=slow).feature)
