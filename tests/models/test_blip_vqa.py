"""VQA: read and answered without padding it is transformers'; padding is never read; ranking is a plain loop; costs are exact."""

import pytest
import torch
import torch.nn.functional as F
from transformers import BlipForQuestionAnswering

from engine.flop_table import fvcore_gflops
from madtp.attention import attend
from madtp.blocks import Guidance
from madtp.pruning import TokenPruner
from madtp.rule import OFF, PruneSetting, PruningRule
from models.bert import BertSize, CrossAttention, TextEncoder
from models.blip_vqa import BlipVqa, Question
from models.decoder import predicting
from models.vit import VisionTransformer
from tests.models.test_blip_caption import NAMES, SMALL
from tests.tiny import with_lively_weights
from tests.twin import transformers_twin

WORDS, START, END, PAD, ENC = 40, 38, 2, 0, 39
LARGER = {"vit": (48, 8, 16, 3, 2), "bert": (16, 3, 2, 32)}  # both encoders of one width, as transformers wants them


def model_of(size: dict, rule: PruningRule | None = None) -> BlipVqa:
    def make_pruner(dim: int) -> TokenPruner | None:
        return None if rule is None else TokenPruner(dim, 5, 24, rule)

    image_size, patch, *vit = size["vit"]
    vision = VisionTransformer(image_size, patch, *vit, make_pruner=make_pruner)
    width, layers, heads, inner = size["bert"]
    bert = BertSize(WORDS, width, layers, heads, inner, 32, 0.0)
    text = TextEncoder(bert, lambda i: CrossAttention(bert, vision.embed_dim), make_pruner)
    model = BlipVqa(vision, text, bert, START, END, PAD, 0.0, None if rule is None else (5, 24, 1.0))
    return with_lively_weights(model).eval()


def questions(size: dict, lengths: list[int], seed: int = 0):
    """images, question ids, question mask"""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.linspace(0.2, 3, len(lengths))[:, None, None, None]
    images = torch.randn(len(lengths), 3, size["vit"][0], size["vit"][0], generator=generator) * strength
    ids = torch.randint(5, 37, (len(lengths), max(lengths)), generator=generator)
    ids[:, 0] = ENC
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return images, ids * mask, mask


def answers(lengths: list[int], seed: int = 1):
    """ids that begin with [DEC] and end with [SEP], and their mask"""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 37, (len(lengths), max(lengths)), generator=generator)
    places, ends = torch.arange(max(lengths)), torch.tensor(lengths)[:, None] - 1
    ids = torch.where(places < ends, ids, PAD).masked_fill(places == ends, END)
    ids[:, 0] = START
    return ids, (places <= ends).long()


def twin(model: BlipVqa, size: dict) -> BlipForQuestionAnswering:
    words = {"vocab_size": WORDS, "bos_token_id": START, "sep_token_id": END, "eos_token_id": END, "pad_token_id": PAD}
    return transformers_twin(BlipForQuestionAnswering, model, size, NAMES, **words)


@pytest.mark.parametrize("size", [SMALL, LARGER])
@torch.no_grad()
def test_dense_equals_transformers(size):
    model = model_of(size).double()
    model.text_decoder.bert.embeddings.position_embeddings.weight.mul_(3)  # or it says one word again and again
    other = twin(model, size).double()
    images, ids, mask = questions(size, [7] * 16)
    images = images.double()
    states = other.vision_model(pixel_values=images).last_hidden_state
    expected = other.text_encoder(
        input_ids=ids, attention_mask=mask, encoder_hidden_states=states, encoder_attention_mask=torch.ones(states.shape[:2]).long()
    ).last_hidden_state
    question = model.encode(images, ids, mask)
    torch.testing.assert_close(question.tokens, expected, atol=1e-8, rtol=0)
    assert not torch.allclose(model.encode(images.flip(0), ids, mask).tokens, question.tokens, atol=1e-2)  # the image matters
    answered, answer_mask = answers([4] * 16)
    logits = other.text_decoder(
        answered, attention_mask=answer_mask, encoder_hidden_states=expected, encoder_attention_mask=mask
    ).logits
    output = model(images, ids, mask, answered, answer_mask, torch.ones(16, dtype=torch.long))
    torch.testing.assert_close(output.logits, logits, atol=1e-5, rtol=0)
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), answered[:, 1:], reduction="none").sum(dim=1)
    torch.testing.assert_close(output.answer_losses.double(), losses, atol=1e-5, rtol=0)  # which are float32 in any case
    written, _ = model.generate(question, num_beams=3, max_length=10)
    start = torch.full((16, 1), START)
    ours, theirs = (
        decoder.generate(
            start, attention_mask=torch.ones_like(start), encoder_hidden_states=expected, encoder_attention_mask=mask, num_beams=3,
            do_sample=False, max_length=10, min_length=1, eos_token_id=END, pad_token_id=PAD, output_scores=True,
            return_dict_in_generate=True,
        )
        for decoder in (model.text_decoder, other.text_decoder)
    )  # fmt: skip
    assert written.tolist() == theirs.sequences.tolist() and len(ours.scores) == len(theirs.scores)
    for mine, scores in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(mine, scores, atol=1e-5, rtol=1e-5)
    assert len(set(written.flatten().tolist()) - {START, END, PAD}) >= 5


def ranked(model: BlipVqa, question: Question, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Four candidates of each question, the likeliest first, and the GFLOPs of ranking them."""
    best, *_ = model.rank(question, ids, mask, number=4)
    return best, model.ranking_gflops(question.valid.sum(dim=1), mask.sum(dim=1)[best])


@pytest.mark.parametrize("setting", [OFF, PruneSetting(0.0)])
@torch.no_grad()
def test_a_question_is_answered_alone_as_among_longer_ones(setting):
    model = model_of(SMALL, PruningRule(keep="instance"))
    inputs = questions(SMALL, [9, 4, 6])
    answered, answer_mask = answers([3, 5, 4, 3])
    counts = torch.tensor([1, 2, 1])
    together = model(*inputs, answered, answer_mask, counts, Guidance(setting, packed=True))
    choices = answers([3, 4, 3, 5, 3, 4], seed=5)
    best, costs = ranked(model, together.question, *choices)
    written, _ = model.generate(together.question)
    first = 0
    for i, length in enumerate([9, 4, 6]):
        own = slice(first, first + int(counts[i]))
        first = own.stop
        images, ids, mask = (part[i : i + 1] for part in inputs)
        own_answers = answered[own], answer_mask[own], counts[i : i + 1]
        alone = model(images, ids[:, :length], mask[:, :length], *own_answers, Guidance(setting))
        torch.testing.assert_close(alone.answer_losses, together.answer_losses[own], atol=1e-4, rtol=1e-5)
        chosen, cost = ranked(model, alone.question, *choices)
        assert chosen.tolist() == best[i : i + 1].tolist() and float(cost) == float(costs[i])
        by_itself = model.generate(alone.question)[0][0].tolist()
        assert written[i].tolist()[: len(by_itself)] == by_itself


@pytest.mark.parametrize("group_cost", [1, 2**24])  # each sample in a group of its own, or all in one
@pytest.mark.parametrize("counts", [[1, 3, 2], [6]])
def test_packed_answers_have_the_losses_logits_and_gradients_of_padded_ones(counts, group_cost, monkeypatch):
    monkeypatch.setitem(attend.GROUP_COST, "cpu", group_cost)
    model = model_of(SMALL, PruningRule(keep="instance"))
    model.text_decoder.label_smoothing = 0.1
    inputs, counts = questions(SMALL, [9, 4, 6][: len(counts)]), torch.tensor(counts)
    answered, answer_mask = answers([3, 6, 4, 3, 7, 2])
    weights = torch.linspace(0.2, 1, len(answered))
    found = {}
    for packed in (False, True):
        output = model(*inputs, answered, answer_mask, counts, Guidance(PruneSetting(0.0), packed=packed))
        model.zero_grad()
        (weights * output.answer_losses).sum().backward()
        gradients = {name: part.grad for name, part in model.named_parameters() if part.grad is not None}
        found[packed] = output.answer_losses, output.logits, gradients
    (losses, logits, gradients), (packed_losses, packed_logits, packed_gradients) = found[False], found[True]
    torch.testing.assert_close(packed_losses, losses, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed_logits, logits[predicting(answer_mask)], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(packed_gradients, gradients, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("attention", ["attention", "crossattention"])
@torch.no_grad()
def test_attention_of_packed_answers_drops_out_in_training_alone(attention):
    model, inputs = model_of(SMALL).train(), questions(SMALL, [9, 4])
    for layer in model.text_decoder.bert.encoder.layer:
        getattr(layer, attention).self.dropout.p = 0.5

    def losses(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model(*inputs, *answers([5, 4, 6]), torch.tensor([1, 2]), Guidance(packed=True)).answer_losses

    assert torch.equal(losses(0), losses(0)) and not torch.allclose(losses(0), losses(1), atol=1e-3)
    model.eval()
    assert torch.equal(losses(0), losses(1))


@torch.no_grad()
def test_an_answer_is_the_same_alone_and_among_32():
    model, lengths, setting = model_of(SMALL, PruningRule(keep="instance")), [4 + i % 6 for i in range(32)], PruneSetting(0.0)
    images, ids, mask = questions(SMALL, lengths)
    choices = answers([3, 4, 3, 5, 3, 4], seed=5)
    question = model.encode(images, ids, mask, Guidance(setting, packed=True))
    assert len(set(question.vision.leaving[-1].tolist())) > 1
    best, losses, _ = model.rank(question, *choices, number=4)
    for i in (0, 1, 13, 26, 31):
        alone = model.encode(images[i : i + 1], ids[i : i + 1, : lengths[i]], mask[i : i + 1, : lengths[i]], Guidance(setting))
        by_itself, its_losses, _ = model.rank(alone, *choices, number=4)
        assert by_itself.tolist() == best[i : i + 1].tolist()
        torch.testing.assert_close(its_losses, losses[i : i + 1], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("at_a_time", [1, 4096])
@torch.no_grad()
def test_ranking_equals_a_plain_loop_over_the_likeliest_by_first_token(at_a_time, monkeypatch):
    monkeypatch.setattr("models.blip_vqa.TOKENS_AT_A_TIME", at_a_time)
    model = model_of(SMALL)
    model.text_decoder.label_smoothing = 0.1
    question = model.encode(*questions(SMALL, [6, 8]))
    ids, mask = answers([3, 4, 2, 5, 3, 4, 3, 3], seed=3)
    best, losses, likelihoods = model.rank(question, ids, mask, number=5)
    for i in range(2):
        tokens, valid = question.tokens[i : i + 1], question.valid[i : i + 1].long()

        def log_likelihood(row, tokens=tokens, valid=valid):
            text = ids[row : row + 1, : int(mask[row].sum())]
            logits = model.text_decoder(text, encoder_hidden_states=tokens, encoder_attention_mask=valid).logits
            return logits[0].log_softmax(dim=-1), text[0]

        first = [float(log_likelihood(row)[0][0, ids[row, 1]]) for row in range(len(ids))]
        likeliest = sorted(range(len(ids)), key=lambda row: -first[row])[:5]
        whole, smoothed = {}, {}
        for row in likeliest:
            scores, text = log_likelihood(row)
            whole[row] = sum(float(scores[place, text[place + 1]]) for place in range(len(text) - 1))
            smoothed[row] = float(F.cross_entropy(scores[:-1], text[1:], reduction="sum", label_smoothing=0.1))
        assert best[i].tolist() == sorted(smoothed, key=smoothed.get)
        assert losses[i].tolist() == pytest.approx(sorted(smoothed.values()), abs=1e-4)
        assert likelihoods[i].tolist() == pytest.approx([whole[row] for row in best[i].tolist()], abs=1e-4)


@torch.no_grad()
def test_candidates_share_the_keys_of_their_question():
    model, mapped = model_of(SMALL), []
    question = model.encode(*questions(SMALL, [6, 8]))
    key = model.text_decoder.bert.encoder.layer[0].crossattention.self.key
    key.register_forward_hook(lambda module, inputs, output: mapped.append(len(inputs[0])))
    model.rank(question, *answers([3, 4, 3, 5], seed=3), number=3)
    assert mapped == [2, 2]  # for the first token, and for whole answers


class Ranker(torch.nn.Module):
    """A model that ranks one set of candidates, as fvcore can trace it."""

    def __init__(self, model: BlipVqa, question: Question, number: int):
        super().__init__()
        self.model, self.question, self.number = model, question, number

    def traced(self, ids: torch.Tensor, mask: torch.Tensor, guidance: Guidance) -> torch.Tensor:
        return self.model.rank(self.question, ids, mask, self.number)[0]


@torch.no_grad()
def test_the_cost_of_ranking_equals_fvcore():
    model = model_of(SMALL)
    question = model.encode(*questions(SMALL, [8]))
    ids, mask = answers([3, 4, 2, 5, 3, 4], seed=3)
    closed = float(model.ranking_gflops(question.valid.sum(dim=1), mask.sum(dim=1).unsqueeze(0)))
    assert sum(fvcore_gflops(Ranker(model, question, len(ids)), (ids, mask)).values()) == pytest.approx(closed, rel=1e-9)


@pytest.mark.parametrize("setting", [OFF, PruneSetting(0.0)])
@torch.no_grad()
def test_closed_form_equals_fvcore(setting):
    model = model_of(SMALL, PruningRule(keep="instance"))
    inputs = *questions(SMALL, [8]), *answers([4]), torch.tensor([1])
    closed = {name: float(part) for name, part in model.costs(*inputs, guidance=Guidance(setting))[0].items()}
    assert closed == pytest.approx(fvcore_gflops(model, inputs, Guidance(setting)), rel=1e-9)
