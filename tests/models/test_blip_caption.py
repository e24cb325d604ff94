"""Captioning: dense, it is transformers'; the decoder never reads padding; the costs are what is computed."""

import pytest
import torch
from transformers import BlipForConditionalGeneration

from engine.flop_table import fvcore_gflops
from madtp.blocks import Guidance
from madtp.distillation import Distillation
from madtp.pruning import TokenPruner
from madtp.rule import OFF, PruneSetting, PruningRule
from models import blip_caption
from models.bert import BertSize
from models.blip_caption import BlipCaption
from models.decoder import predicting
from models.vit import VisionTransformer
from tests.tiny import with_lively_weights
from tests.twin import transformers_twin

WORDS, START, END, PAD = 40, 38, 2, 0
PROMPT = [START, 5, 6]
SMALL = {"vit": (32, 8, 24, 2, 3), "bert": (24, 2, 3, 48)}
LARGER = {"vit": (48, 8, 32, 3, 4), "bert": (16, 3, 2, 32)}


def model_of(size: dict, rule: PruningRule | None = None) -> BlipCaption:
    make_pruner = (lambda dim: None) if rule is None else (lambda dim: TokenPruner(dim, 5, 24, rule))
    image_size, patch, *vit = size["vit"]
    vision = VisionTransformer(image_size, patch, *vit, make_pruner=make_pruner)
    width, layers, heads, inner = size["bert"]
    bert = BertSize(WORDS, width, layers, heads, inner, 32, 0.0)
    model = BlipCaption(vision, bert, PROMPT, END, PAD, 0.0, None if rule is None else (5, 24, 1.0))
    return with_lively_weights(model).eval()


def batch(size: dict, lengths=(9, 6, 12), seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(len(lengths), 3, size["vit"][0], size["vit"][0], generator=generator)
    ids = torch.randint(7, 37, (len(lengths), max(lengths)), generator=generator)
    ids[:, : len(PROMPT)] = torch.tensor(PROMPT)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return images, ids * mask, mask


# our name of a part of the image encoder -> transformers'
NAMES = {
    "visual_encoder.blocks.": "vision_model.encoder.layers.",
    "visual_encoder.patch_embed.proj.": "vision_model.embeddings.patch_embedding.",
    "visual_encoder.norm.": "vision_model.post_layernorm.", ".norm1.": ".layer_norm1.", ".norm2.": ".layer_norm2.",
    ".attn.qkv.": ".self_attn.qkv.", ".attn.proj.": ".self_attn.projection.",
    "visual_encoder.cls_token": "vision_model.embeddings.class_embedding",
    "visual_encoder.pos_embed": "vision_model.embeddings.position_embedding",
}  # fmt: skip


def twin(model: BlipCaption, size: dict) -> BlipForConditionalGeneration:
    words = {"vocab_size": WORDS, "bos_token_id": START, "sep_token_id": END, "eos_token_id": END, "pad_token_id": PAD}
    return transformers_twin(BlipForConditionalGeneration, model, size, NAMES, **words)


@torch.no_grad()
def test_the_decoders_alignment_is_a_plain_loop_over_layers_and_words():
    """E_l of what enters each layer, [DEC] and padding left out (Eq. 3), summed over the layers, against E_v (Eq. 12)."""
    model, lengths = model_of(SMALL, PruningRule(keep="instance")), (9, 6, 12)
    images, ids, mask = batch(SMALL, lengths)
    tokens, valid, record = model.encode(images, Guidance(align=True))
    learnable, similar = model.learnable_tokens, []
    for sample, length in enumerate(lengths):
        one = slice(sample, sample + 1)
        states = model.decode(tokens[one], None, ids[one, :length], mask[one, :length], hidden_states=True).hidden_states[:-1]
        language = torch.zeros_like(learnable)
        for alignment, entering in zip(model.decoder_alignment, states, strict=True):
            words = alignment.projection(entering[0, 1:])
            language += (learnable @ words.t() / learnable.shape[1] ** 0.5).softmax(dim=1) @ words
        similar.append(torch.cosine_similarity(record.features[sample], language, dim=1))
    expected = 1 - torch.stack(similar).mean()
    found = model(images, ids, mask, Guidance(align=True)).losses["similarity"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("align", [False, True])
def test_packed_captions_have_the_losses_logits_and_gradients_of_padded_ones(align):
    model = model_of(SMALL, PruningRule(keep="instance"))
    model.text_decoder.label_smoothing = 0.1
    images, ids, mask = batch(SMALL)
    ids, mask = torch.cat([ids, ids[:, :1]], dim=1), torch.cat([mask, 0 * mask[:, :1]], dim=1)  # the longest is padded too
    images = images * torch.tensor([0.2, 1, 3])[:, None, None, None]
    found = {}
    for packed in (False, True):
        output = model(images, ids, mask, Guidance(PruneSetting(0.0), align=align, packed=packed))
        model.zero_grad()
        sum(output.losses.values()).backward()
        gradients = {name: part.grad for name, part in model.named_parameters() if part.grad is not None}
        found[packed] = output.losses, output.logits, gradients, output.vision.leaving[-1].tolist()
    (losses, logits, gradients, left), (packed_losses, packed_logits, packed_gradients, packed_left) = found[False], found[True]
    assert packed_left == left and len(set(left)) > 1  # the images are padded to one another
    assert len(losses) == 1 + align
    torch.testing.assert_close(packed_losses, losses, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed_logits, logits[predicting(mask, len(PROMPT))], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(packed_gradients, gradients, atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_distillation_compares_the_logits_of_the_same_words_packed_and_padded():
    images, ids, mask = batch(SMALL)
    found = []
    for packed, valid in ((False, predicting(mask, len(PROMPT))), (True, None)):
        student, teacher = model_of(SMALL, PruningRule(keep="instance")).train(), model_of(SMALL)
        distillation = Distillation(teacher, student, 2.0)
        student(images, ids, mask, Guidance(PruneSetting(0.0), packed=packed))
        found.append(distillation.losses(lambda teacher, packed=packed: teacher(images, ids, mask, Guidance(packed=packed)), valid))
    assert float(found[0]["distill_logits"]) > 1e-3
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [SMALL, LARGER])
@torch.no_grad()
def test_dense_equals_transformers(size):
    model = model_of(size).double()  # lively weights give large logits: float32 would round them at the fourth digit
    other = twin(model, size).double()
    images, ids, mask = batch(size)
    images = images.double()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : len(PROMPT)] = -100
    expected = other(pixel_values=images, input_ids=ids, attention_mask=mask, labels=labels)
    output = model(images, ids, mask)
    real = mask.bool()
    torch.testing.assert_close(output.logits[real], expected.logits[real], atol=1e-8, rtol=0)
    torch.testing.assert_close(output.losses["task"], expected.loss, atol=1e-8, rtol=0)
    assert not torch.allclose(model(images.flip(0), ids, mask).logits, output.logits, atol=1e-2)  # the image matters


@pytest.mark.parametrize("size", [SMALL, LARGER])
@torch.no_grad()
def test_beams_equal_those_of_transformers(size):
    model = model_of(size)
    other = twin(model, size)
    images, _, _ = batch(size, lengths=(4,) * 8)
    written, _ = model.generate(images, num_beams=3, max_length=14, min_length=6)
    prompt = torch.tensor(PROMPT).expand(len(images), -1)
    states = other.vision_model(pixel_values=images).last_hidden_state
    ours, theirs = (
        decoder.generate(
            prompt, attention_mask=torch.ones_like(prompt), encoder_hidden_states=states, num_beams=3, do_sample=False,
            max_length=14, min_length=6, eos_token_id=END, pad_token_id=PAD, output_scores=True, return_dict_in_generate=True,
        )
        for decoder in (model.text_decoder, other.text_decoder)
    )  # fmt: skip
    assert written.tolist() == theirs.sequences.tolist() and len(ours.scores) == len(theirs.scores) > 3
    for mine, expected in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)
    assert len(set(written.flatten().tolist()) - {*PROMPT, END, PAD}) >= 5


@torch.no_grad()
def test_a_caption_is_the_same_alone_and_among_others():
    model = model_of(SMALL, PruningRule(keep="instance"))
    strength = torch.linspace(0.2, 3, 32)[:, None, None, None]
    images, ids, mask = batch(SMALL, lengths=[5 + i % 8 for i in range(32)])
    images, setting = images * strength, PruneSetting(0.0)
    together = model(images, ids, mask, Guidance(setting, packed=True))
    written, record = model.generate(images, Guidance(setting, packed=True))
    assert len(set(record.leaving[-1].tolist())) > 1  # the decoder has padding to read
    says = predicting(mask, len(PROMPT))
    logits = together.logits.split(says.sum(dim=1).tolist())
    for i in (0, 1, 13, 26, 31):
        length = int(mask[i].sum())
        alone = model(images[i : i + 1], ids[i : i + 1, :length], mask[i : i + 1, :length], Guidance(setting))
        torch.testing.assert_close(alone.logits[0, says[i, :length]], logits[i], atol=5e-5, rtol=1e-5)
        by_itself = model.generate(images[i : i + 1], Guidance(setting))[0][0].tolist()
        assert written[i].tolist()[: len(by_itself)] == by_itself


@pytest.mark.parametrize("setting", [OFF, PruneSetting(0.0)])
@torch.no_grad()
def test_closed_form_equals_fvcore(setting):
    model = model_of(SMALL, PruningRule(keep="instance"))
    inputs = batch(SMALL, lengths=(9,))
    closed = {name: float(part) for name, part in model.costs(*inputs, guidance=Guidance(setting))[0].items()}
    assert closed == pytest.approx(fvcore_gflops(model, inputs, Guidance(setting)), rel=1e-9)


@torch.no_grad()
def always_says(shares: dict[int, float]) -> BlipCaption:
    """A model whose next word is always drawn from the same distribution, id -> share."""
    model = model_of(SMALL)
    head = model.text_decoder.cls.predictions
    for parameter in (head.transform.LayerNorm.weight, head.transform.LayerNorm.bias):
        parameter.zero_()
    head.bias.fill_(-50)
    head.bias[list(shares)] = torch.tensor(list(shares.values())).log()
    return model


def sampled(model: BlipCaption, top_p: float, seed: int = 0) -> list[int]:
    ids, _ = model.generate(batch(SMALL)[0], top_p=top_p, seed=seed, max_length=23, min_length=23)
    return ids[:, len(PROMPT) :].flatten().tolist()


def test_sampling_draws_from_the_nucleus_alone():
    model = always_says({7: 0.15, 8: 0.5, 9: 0.3, 10: 0.05})
    assert set(sampled(model, 0.7)) == {8, 9}
    assert set(sampled(model, 1.0)) == {7, 8, 9, 10}


def test_sampling_depends_on_its_seed_alone():
    model = always_says({number: 0.1 for number in range(7, 17)})
    first = sampled(model, 0.9, seed=3)
    torch.rand(5)
    before = torch.get_rng_state()
    assert sampled(model, 0.9, seed=3) == first != sampled(model, 0.9, seed=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_smallest_nucleus_is_greedy_but_for_the_penalty_of_words_that_came_before(monkeypatch):
    model, images = model_of(SMALL), batch(SMALL)[0]
    assert not torch.equal(model.generate(images, top_p=1e-6)[0], model.generate(images, num_beams=1)[0])
    monkeypatch.setattr(blip_caption, "REPETITION_PENALTY", 1.0)
    assert torch.equal(model.generate(images, top_p=1e-6)[0], model.generate(images, num_beams=1)[0])
