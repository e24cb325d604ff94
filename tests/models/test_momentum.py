"""The part that both models of pairs share: momentum weights, queues that wrap around, losses, costs, side effects."""

import math

import pytest
import torch
from torch import nn

from engine.flop_table import fvcore_gflops
from madtp.blocks import Guidance
from madtp.rule import OFF, PruneSetting, PruningRule
from models.momentum import NO_IMAGE, can_number
from tests import tiny

INSTANCE = PruningRule(keep="instance")
SETTING = PruneSetting(3.0)
LENGTHS = [5, 9, 7, 6]
IDS = torch.tensor([3, 8, 3, 5])
KINDS = pytest.mark.parametrize("kind", tiny.PAIR_MODELS)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    """The names of the weights and buffers that are others than before, bit for bit."""
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def online_name(name: str) -> str | None:
    """Returns the name that a momentum weight is a copy of; None for any other weight."""
    part, *rest = name.split(".")
    return ".".join([part.removesuffix("_m"), *rest]) if part.endswith("_m") else None


@KINDS
def test_momentum_weights_are_a_moving_average_of_the_online_ones(kind):
    model = tiny.PAIR_MODELS[kind](INSTANCE)
    slow = {name: online_name(name) for name in model.state_dict() if online_name(name)}
    uncopied = {"temp", "logit_scale", "space_dict", "itm_head.weight", "itm_head.bias", *dict(model.named_buffers())}
    assert set(slow.values()) == set(model.state_dict()) - set(slow) - uncopied  # all that encodes has a copy
    expected = snapshot(model)
    for step in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1 + 0.1 * step)
        online = snapshot(model)
        for name, source in slow.items():
            expected[name] = tiny.MOMENTUM * expected[name] + (1 - tiny.MOMENTUM) * online[source]
        model.follow()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, online[name]) if name not in slow else torch.allclose(tensor, expected[name], atol=1e-6), (
                name
            )
    assert (expected[name := min(slow)] - online[slow[name]]).abs().max() > 1e-3  # they did not just become equal


@KINDS
@pytest.mark.parametrize("sizes", [[3, 3, 3], [4, 2, 4], [7, 7], [10, 3], [1] * 9], ids=str)
@torch.no_grad()
def test_a_queue_holds_the_last_of_all_batches_whatever_their_size(kind, sizes):
    """A queue of 7 entries, which batches need not divide and may exceed, against a plain ring buffer."""
    model = tiny.PAIR_MODELS[kind]()
    queues = [list(model.image_queue.t()), list(model.text_queue.t()), model.idx_queue[0].tolist()]
    place, number = 0, 0
    for seed, size in enumerate(sizes):
        passes = model.passes(*tiny.pairs(kind, [6] * size, seed))
        ids = torch.arange(number, number + size)
        number += size
        model.enqueue(passes, ids)
        last = range(max(0, size - tiny.QUEUE), size)
        for pair in last:
            queues[0][place], queues[1][place] = passes.image_momentum.feature[pair], passes.text_momentum.feature[pair]
            queues[2][place] = int(ids[pair])
            place = (place + 1) % tiny.QUEUE
    assert torch.equal(model.image_queue, torch.stack(queues[0], dim=1))
    assert torch.equal(model.text_queue, torch.stack(queues[1], dim=1))
    assert model.idx_queue[0].tolist() == queues[2] and model.ptr_queue.tolist() == [place]


@KINDS
@pytest.mark.parametrize("alpha", [0.0, 0.4])
@torch.no_grad()
def test_the_contrastive_loss_is_a_cross_entropy_against_soft_targets(kind, alpha):
    """A plain loop over all pairs of a batch and a queue in which images come twice."""
    model = tiny.PAIR_MODELS[kind]()
    model.enqueue(model.passes(*tiny.pairs(kind, LENGTHS, seed=1)), torch.tensor([5, 8, 8, 1]))
    passes = model.passes(*tiny.pairs(kind, LENGTHS))
    all_ids = [*IDS.tolist(), *model.idx_queue[0].tolist()]
    total = 0.0
    for own, own_slow, other_slow, queue in (
        (passes.image.feature, passes.image_momentum.feature, passes.text_momentum.feature, model.text_queue),
        (passes.text.feature, passes.text_momentum.feature, passes.image_momentum.feature, model.image_queue),
    ):
        others = [*other_slow, *queue.t()]
        for i in range(4):
            logits = [float(own[i] @ other / model.contrastive_temperature) for other in others]
            slow = [math.exp(float(own_slow[i] @ other / model.contrastive_temperature)) for other in others]
            same = [float(number == int(IDS[i])) for number in all_ids]
            log_sum = math.log(sum(map(math.exp, logits)))
            for logit, found, pair in zip(logits, slow, same, strict=True):
                total -= (alpha * found / sum(slow) + (1 - alpha) * pair / sum(same)) * (logit - log_sum) / 8
    assert float(model.contrastive_loss(passes, IDS, alpha)) == pytest.approx(total, rel=1e-5)


@KINDS
@torch.no_grad()
def test_the_contrastive_loss_is_as_exact_in_mixed_precision(kind):
    model = tiny.PAIR_MODELS[kind]()
    passes = model.passes(*tiny.pairs(kind, LENGTHS))
    expected = model.contrastive_loss(passes, IDS, alpha=0.4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.contrastive_loss(passes, IDS, alpha=0.4), expected)


@KINDS
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("setting", [OFF, SETTING], ids=str)
def test_momentum_passes_have_no_gradient_and_every_online_weight_has_one(kind, setting, packed):
    """DistributedDataParallel waits for each."""
    model = tiny.PAIR_MODELS[kind](INSTANCE).train()
    passes = model.passes(*tiny.pairs(kind, LENGTHS), IDS, Guidance(setting, align=True, packed=packed))
    losses = model.losses(passes, IDS, alpha=0.4)
    assert not losses["similarity_momentum"].requires_grad
    sum(losses.values()).backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {name for name in model.state_dict() if not online_name(name)} - set(dict(model.named_buffers()))


@KINDS
def test_features_that_are_not_finite_do_not_enter_a_queue(kind):
    """Their step is skipped, and the next ones must not meet them."""
    model = tiny.PAIR_MODELS[kind](INSTANCE)
    passes = model.passes(*tiny.pairs(kind, LENGTHS), IDS, Guidance(SETTING))
    passes.text_momentum.feature[1] = math.nan
    before = snapshot(model)
    model.enqueue(passes, IDS)
    for name, rows in (("image_queue", passes.image_momentum.feature.t()), ("text_queue", passes.text_momentum.feature.t())):
        queue = model.state_dict()[name]
        assert torch.equal(queue[:, [0, 2, 3]], rows[:, [0, 2, 3]]) and torch.equal(queue[:, 1], before[name][:, 1])
    assert model.idx_queue[0, :4].tolist() == [3, int(before["idx_queue"][0, 1]), 3, 5] and int(model.ptr_queue) == 4


@KINDS
def test_a_step_changes_momentum_weights_queues_and_no_online_weight(kind):
    model = tiny.PAIR_MODELS[kind](INSTANCE).train()
    before = snapshot(model)
    model(*tiny.pairs(kind, LENGTHS), IDS, 0.4, Guidance(SETTING, align=True))
    names = changed(model, before)
    assert {"image_queue", "text_queue", "idx_queue", "ptr_queue"} <= names
    assert {name for name in names if not online_name(name)} == names & set(dict(model.named_buffers()))


@pytest.mark.parametrize(
    ("kind", "name", "value", "limit"),
    [("blip", "temp", 9.0, 0.5), ("blip", "temp", -9.0, 0.001), ("clip", "logit_scale", 9.0, 0.01)],
)
def test_a_step_keeps_the_temperature_in_its_limits(kind, name, value, limit):
    model = tiny.PAIR_MODELS[kind]()
    with torch.no_grad():
        getattr(model, name).fill_(value)
    model(*tiny.pairs(kind, LENGTHS), IDS, 0.4)
    assert model.contrastive_temperature.item() == pytest.approx(limit)


@KINDS
@torch.no_grad()
def test_a_model_that_forgets_its_momentum_encodes_as_before(kind):
    model, (images, *text) = tiny.PAIR_MODELS[kind](INSTANCE), tiny.pairs(kind, LENGTHS)
    before = model.encode_pairs(images, *text)
    model.forget_momentum()
    assert not any(online_name(name) or "queue" in name for name, _ in (*model.named_parameters(), *model.named_buffers()))
    assert all(
        torch.equal(one.feature, other.feature) for one, other in zip(before, model.encode_pairs(images, *text), strict=True)
    )


@KINDS
@torch.no_grad()
def test_measuring_changes_nothing(kind):
    model = tiny.PAIR_MODELS[kind](INSTANCE)
    before, batch = snapshot(model), tiny.pairs(kind, LENGTHS)
    for setting in (OFF, SETTING):
        model.costs(*batch, guidance=Guidance(setting))
        model.costs(*batch, guidance=Guidance(setting, packed=True))
        model.traced(*batch, guidance=Guidance(setting))
    assert changed(model, before) == set()
    model.follow()
    assert changed(model, before) != set()  # that it would show


@KINDS
@pytest.mark.parametrize("setting", [OFF, PruneSetting(0.0), SETTING, PruneSetting(20.0, prune_from=1)], ids=str)
@torch.no_grad()
def test_the_closed_form_is_what_fvcore_counts(kind, setting):
    """Alone: fvcore counts padding."""
    model = tiny.PAIR_MODELS[kind](INSTANCE)
    batch = tiny.pairs(kind, [11])
    inputs = tuple(part if part.dim() == 4 else part[:, :11] for part in batch)
    parts, deployment = model.costs(*inputs, guidance=Guidance(setting))
    closed = float(sum(parts.values()))
    assert closed == pytest.approx(sum(fvcore_gflops(model, inputs, Guidance(setting)).values()), rel=1e-9)
    dense = float(sum(model.costs(*inputs)[0].values()))
    momentum = float(parts["image_momentum"] + parts["text_momentum"])
    assert float(deployment) < (closed - momentum if kind == "siglip" else closed / 2)  # whose momentum encoders here prune harder
    assert closed == dense if setting is OFF else closed < dense
    if setting is OFF:
        assert model.reference_gflops(11) == pytest.approx(closed, rel=1e-9)


@KINDS
@pytest.mark.parametrize("setting", [OFF, SETTING], ids=str)
@torch.no_grad()
def test_a_pair_costs_in_a_batch_what_it_costs_alone(kind, setting):
    model, batch = tiny.PAIR_MODELS[kind](INSTANCE), tiny.pairs(kind, LENGTHS)
    for packed in (False, True):
        parts, deployment = model.costs(*batch, guidance=Guidance(setting, packed=packed))
        for i in range(len(LENGTHS)):
            one = (part[i : i + 1] for part in batch)
            parts_alone, deployment_alone = model.costs(*one, guidance=Guidance(setting, packed=packed))
            assert {name: float(part[i]) for name, part in parts.items()} == {k: float(v) for k, v in parts_alone.items()}
            assert float(deployment[i]) == float(deployment_alone)
        alike = kind == "siglip" and setting is OFF  # texts of one length, whatever they say
        assert len(set(deployment.tolist())) == (1 if alike else len(LENGTHS))


@KINDS
def test_the_dense_model_has_neither_learnable_tokens_nor_similarity_losses(kind):
    model = tiny.PAIR_MODELS[kind]()
    assert not any("pruner" in name or "space" in name for name in model.state_dict())
    names = {"contrastive", "matching"} if kind == "blip" else {"contrastive"}
    assert set(model(*tiny.pairs(kind, LENGTHS), IDS, 0.4, Guidance(align=False))) == names
    more = tiny.PAIR_MODELS[kind](INSTANCE)(*tiny.pairs(kind, LENGTHS), IDS, 0.4, Guidance(align=True))
    assert set(more) == names | {"similarity", "similarity_momentum"}


@pytest.mark.parametrize("images", [29_000, 113_287], ids=["flickr", "coco"])
def test_a_published_queue_numbers_the_data_set_that_it_was_filled_from_and_no_other(images):
    """57,600 entries, of the last pairs of an epoch: five captions an image in another order."""
    generator = torch.Generator().manual_seed(0)
    ids = (torch.randperm(5 * images, generator=generator)[:57_600] // 5)[None]
    assert can_number(ids, images)
    assert not any(can_number(ids, other) for other in (images - 100, images + 100, 29_000, 113_287) if other != images)


def test_entries_without_an_image_number_nothing():
    assert not can_number(torch.full((1, 5), NO_IMAGE), 4)
    half = torch.tensor([[NO_IMAGE] * 50 + list(range(50))])
    assert can_number(half, 50) and not can_number(half, 49) and not can_number(half - 1, 49)
