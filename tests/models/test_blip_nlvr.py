"""BLIP for NLVR2 as a whole: sharing of pictures, independence of the batch, what it costs, and where gradients reach."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from engine.flop_table import fvcore_gflops
from engine.results import count_parameters
from madtp.blocks import Guidance
from madtp.flops import GIGA
from madtp.rule import OFF, PruneSetting, PruningRule
from models.bert import FIRST_MERGE_LAYER
from tests import tiny
from tests.executed import counting_products
from utils import leave_process_group

INSTANCE = PruningRule(keep="instance")
SETTING = PruneSetting(6.0)
TARGETS = torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize("setting", [OFF, SETTING], ids=["dense", "pruned"])
@torch.no_grad()
def test_a_batch_of_one_is_a_batch_of_32(setting):
    model, number = tiny.nlvr(INSTANCE), 32
    images, lengths = tiny.images(number), [4 + i % 9 for i in range(number)]
    ids, mask = tiny.text(lengths)
    together = model(images, ids, mask, Guidance(setting))
    costs, kept = model.gflops(together), model.tokens_kept(together)
    assert together.logits.std(dim=0).min() > 0.01  # the samples have an effect
    if setting is SETTING:
        for tower in (together.vision, together.language):
            shares = tower.leaving[-1] / tower.entering[0]
            assert shares.max() - shares.min() > 0.1  # and they differ in what is kept
    for i in range(0, number, 4):
        length = lengths[i]
        alone = model(images[i : i + 1], ids[i : i + 1, :length], mask[i : i + 1, :length], Guidance(setting))
        torch.testing.assert_close(together.logits[i], alone.logits[0], atol=1e-5, rtol=1e-5)
        assert int(kept[i]) == int(model.tokens_kept(alone))
        assert float(costs[i]) == float(model.gflops(alone))


@pytest.mark.parametrize("setting", [OFF, SETTING], ids=["dense", "pruned"])
def test_statements_about_one_pair_share_its_pictures(setting):
    model = tiny.nlvr(INSTANCE).train()
    images = tiny.images(2)
    ids, mask = tiny.text([5, 9, 7, 6, 8, 9])
    shared = model(images, ids, mask, Guidance(setting, align=True))
    repeated = model(images.repeat_interleave(3, dim=0), ids, mask, Guidance(setting, align=True))
    torch.testing.assert_close(shared.logits, repeated.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shared.similarity, repeated.similarity)
    assert torch.equal(model.tokens_kept(shared), model.tokens_kept(repeated))
    assert torch.equal(model.gflops(shared), model.gflops(repeated))
    assert len(shared.vision.entering[0]) == 4 and len(repeated.vision.entering[0]) == 12
    assert (shared.logits[0] - shared.logits[3]).abs().max() > 1e-3


@torch.no_grad()
def test_left_and_right_are_told_apart_and_kept_apart():
    model, images = tiny.nlvr(INSTANCE), tiny.images(3)
    ids, mask = tiny.text([6, 6, 6])
    out, swapped = (model(pictures, ids, mask, Guidance(SETTING)) for pictures in (images, images.flip(1)))
    assert (out.logits - swapped.logits).abs().min() > 1e-4
    assert torch.equal(out.vision.leaving[-1], swapped.vision.leaving[-1].roll(3))


@torch.no_grad()
def test_the_similarity_compares_the_mean_of_both_pictures_with_the_text():
    model = tiny.nlvr(INSTANCE)
    out = model(tiny.images(4), *tiny.text([5, 9, 7, 6]), Guidance(SETTING, align=True))
    values = []
    for i in range(4):
        for k in range(tiny.LEARNABLE):
            vision = (out.vision.features[i, k] + out.vision.features[4 + i, k]) / 2
            language = out.language.features[i, k]
            values.append(1 - float(vision @ language / (vision.norm() * language.norm())))
    assert float(out.similarity) == pytest.approx(sum(values) / len(values), abs=1e-6)


def twice_one_picture() -> tuple[torch.Tensor, ...]:
    """A batch of one whose two pictures are equal: nothing is padded, so that counting operators counts no padding."""
    return tiny.images(1)[:, :1].expand(-1, 2, -1, -1, -1), *tiny.text([11])


SETTINGS = [PruneSetting(0.0), PruneSetting(2.0), PruneSetting(20.0), PruneSetting(500.0), PruneSetting(2.0, prune_from=1)]
RULES = [  # each with a temperature at which the first blocks prune
    (PruningRule(), 2.0),
    (PruningRule(merge=False), 2.0),
    (PruningRule(terms=("token",)), 2.0),
    (PruningRule(method="random"), 1.0),
    (PruningRule(method="stp"), 3.0),
    (PruningRule(method="stp", mag=False), 3.0),
    (PruningRule(mag=False), 1.0),
    (PruningRule(every=2), 2.0),
    (PruningRule(variant="released"), 500.0),
]


@torch.no_grad()
def assert_both_counts_agree(model, setting):
    inputs = twice_one_picture()
    torch.manual_seed(0)  # for the random method
    out = model(*inputs, Guidance(setting))
    closed = {name: float(value) for name, value in model.gflops_by_module(out).items()}
    torch.manual_seed(0)
    assert closed == pytest.approx(fvcore_gflops(model, inputs, Guidance(setting)), rel=1e-9)
    return out


@pytest.mark.parametrize("setting", [OFF, SETTING], ids=["dense", "pruned"])
def test_the_closed_form_is_what_fvcore_counts(setting):
    """The text layers are of both kinds."""
    assert_both_counts_agree(tiny.nlvr(INSTANCE, layers=FIRST_MERGE_LAYER + 1), setting)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"T={s.temperature}_from={s.prune_from}")
def test_the_closed_form_is_what_fvcore_counts_at_any_temperature(setting):
    assert_both_counts_agree(tiny.nlvr(INSTANCE), setting)


@pytest.mark.parametrize(("rule", "temperature"), RULES)
def test_the_closed_form_is_what_fvcore_counts_under_any_rule(rule, temperature):
    out = assert_both_counts_agree(tiny.nlvr(rule), PruneSetting(temperature))
    assert all(int(record.leaving[0][0]) < int(record.entering[0][0]) for record in (out.vision, out.language))


@torch.no_grad()
def test_different_temperatures_cost_differently_and_less_than_dense():
    """So that the comparison above compares different things."""
    model, inputs = tiny.nlvr(INSTANCE), twice_one_picture()
    dense, *costs = (float(model.gflops(model(*inputs, Guidance(setting)))) for setting in [OFF, *SETTINGS])
    assert len(set(costs)) == len(costs) and max(costs) < dense


@pytest.mark.parametrize("rule", [None, INSTANCE, PruningRule(method="random")], ids=["dense", "dtp", "random"])
@torch.no_grad()
def test_the_closed_form_is_what_runs(rule):
    """Another counter, of what is executed rather than traced: dead code counts. Layer norms it does not count."""
    model, inputs = tiny.nlvr(rule), twice_one_picture()
    setting = OFF if rule is None else SETTING
    with counting_products() as counter:
        out = model(*inputs, Guidance(setting))
    norms = [  # (elements) of every layer norm, from the true lengths
        *((before + after) * 20 for before, after in both(out.vision)), out.vision.leaving[-1] * 20,
        *((before + 2 * after) * 16 for before, after in both(out.language)), out.language.entering[0] * 16,
    ]  # fmt: skip
    counted = counter.get_total_flops() / 2 + 5 * sum(int(n.sum()) for n in norms)
    assert counted / GIGA == pytest.approx(float(model.gflops(out)), rel=1e-9)


def both(record):
    return zip(record.entering, record.leaving, strict=True)


@torch.no_grad()
def test_training_counts_the_alignment_features():
    """E_v of both towers, and the products where nothing is pruned."""
    model, inputs = tiny.nlvr(INSTANCE), twice_one_picture()
    for setting in (OFF, SETTING):
        out = model(*inputs, Guidance(setting, align=True))
        extra = float(model.gflops(out) - model.gflops(model(*inputs, Guidance(setting)))) * GIGA
        tokens = {
            20: sum(int((n - 1).sum()) for n in out.vision.entering),
            16: sum(int((n - 1).sum()) for n in out.language.entering),
        }
        features = sum(tokens.values()) * tiny.LEARNABLE * tiny.TOKEN_DIM
        products = sum(n * (width + tiny.LEARNABLE) * tiny.TOKEN_DIM for width, n in tokens.items())
        assert extra == pytest.approx(features + (products if setting is OFF else 0))


def train_step(model, setting=SETTING, dtype=None):
    inputs = tiny.images(4), *tiny.text([5, 9, 7, 6])
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        out = model.train()(*inputs, Guidance(setting, align=True))
        losses = {"task": cross_entropy(out.logits.float(), TARGETS), "similarity": out.similarity}
    return losses


def test_the_similarity_loss_reaches_the_learnable_tokens():
    model = tiny.nlvr(INSTANCE)
    train_step(model)["similarity"].backward()
    assert model.learnable_tokens.grad.abs().sum(dim=1).min() > 0


@pytest.mark.parametrize("setting", [OFF, SETTING, PruneSetting(6.0, prune_from=2)], ids=str)
@pytest.mark.parametrize("method", ["dtp", "random"])
def test_every_parameter_gets_a_gradient(method, setting):
    """DistributedDataParallel waits for each."""
    model = tiny.nlvr(PruningRule(method=method, keep="instance"), dropout=0.1)
    losses = train_step(model, setting)
    (losses["task"] + 0.1 * losses["similarity"]).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_the_dense_model_has_neither_learnable_tokens_nor_pruners():
    model = tiny.nlvr(None)
    assert model.learnable_tokens is None and not any("pruner" in name or "space" in name for name in model.state_dict())
    out = model(tiny.images(4), *tiny.text([5, 9, 7, 6]))
    cross_entropy(out.logits, TARGETS).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert count_parameters(model)["total"] < count_parameters(tiny.nlvr(INSTANCE))["total"]


def test_bfloat16_runs_close_to_float32():
    model = tiny.nlvr(INSTANCE)
    expected, losses = (train_step(model, OFF, dtype)["similarity"].item() for dtype in (None, torch.bfloat16))
    assert losses == pytest.approx(expected, abs=0.05) and losses != expected
    pruned = train_step(model, SETTING, torch.bfloat16)
    sum(pruned.values()).backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = model.eval()(tiny.images(4), *tiny.text([5, 9, 7, 6]), Guidance(SETTING))
    assert out.logits.isfinite().all() and int(out.vision.leaving[-1].max()) < 17


@pytest.mark.parametrize("checkpoint_blocks", [0, 2])
def test_gradients_survive_distributed_training(checkpoint_blocks):
    """A process group of one, with the shared learnable tokens and with recomputed activations."""
    rule = PruningRule(keep="instance")
    plain = tiny.nlvr(rule)
    losses = train_step(plain)
    sum(losses.values()).backward()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = tiny.nlvr(rule, checkpoint_blocks=checkpoint_blocks).train()
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        out = wrapped(tiny.images(4), *tiny.text([5, 9, 7, 6]), Guidance(SETTING, align=True))
        (cross_entropy(out.logits, TARGETS) + out.similarity).backward()
    finally:
        leave_process_group()
    for (name, expected), parameter in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, msg=name)
