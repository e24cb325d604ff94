"""Two processes: what they gather, gradients that find their way back, one queue for both, negatives from either."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from configs.schema import ClipRetrievalConfig
from engine.compress import distributed as as_distributed
from engine.experiment import Experiment
from madtp.blocks import Guidance
from madtp.packing import Packed
from madtp.rule import OFF, PruneSetting, PruningRule
from models.blip_retrieval import gather_samples
from tests import tiny
from utils import Run, leave_process_group

INSTANCE = PruningRule(keep="instance")
SETTING = PruneSetting(3.0)
WIDTH = 2
LAYOUTS = {  # of two samples on each process: their tokens and how these lie
    "packed": ([3, 5], [4, 1]),
    "padded": ([3, 5], [4, 1]),
    "whole": ([3, 3], [5, 5]),
    "packed and whole": ([3, 3], [3, 3]),
}
PAIRS = [6, 9]  # tokens of the text of the one pair of each process
FORMS = {f"{kind}, {form}": (kind, form) for kind in tiny.PAIR_MODELS for form in ("packed", "padded")}


def samples(rank: int, lengths: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(length, WIDTH, generator=generator) for length in lengths]


def weights(rank: int, sample: int, length: int) -> Tensor:
    """Draws the weights of a sample's tokens in the loss of a process."""
    return torch.randn(length, WIDTH, generator=torch.Generator().manual_seed(10 + 4 * rank + sample))


def gather(rank: int, name: str) -> dict:
    lengths = LAYOUTS[name][rank]
    leaves = [sample.requires_grad_() for sample in samples(rank, lengths)]
    if name.startswith("packed"):
        x, layout = torch.cat(leaves), Packed.of(lengths, torch.device("cpu"))
    else:
        x = torch.nn.utils.rnn.pad_sequence(leaves, batch_first=True)
        layout = None if name == "whole" else torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    x, layout = gather_samples(x, layout)
    if isinstance(layout, Packed):
        x, layout = layout.pad(x), layout.valid
    together = [tokens[inside] for tokens, inside in zip(x, layout, strict=True)]
    sum((weights(rank, i, len(tokens)) * tokens).sum() for i, tokens in enumerate(together)).backward()
    return {"tokens": [tokens.detach() for tokens in together], "gradients": [leaf.grad for leaf in leaves]}


def one_pair(kind: str, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns one pair of a batch of two, its text without padding."""
    images, ids, mask = (part[number : number + 1] for part in tiny.pairs(kind, PAIRS))
    length = int(mask.sum())
    return images, ids[:, :length], mask[:, :length]


def step(rank: int, kind: str, form: str) -> dict:
    """A training step on one pair; the gradients are those of the loss of which the pair's own process is not all."""
    model = tiny.PAIR_MODELS[kind](INSTANCE).train()
    passes = model.passes(*one_pair(kind, rank), torch.tensor([rank]), Guidance(SETTING, align=True, packed=form == "packed"))
    losses = model.losses(passes, torch.tensor([rank]), alpha=0.4)
    model.enqueue(passes, torch.tensor([rank]))
    losses.get("matching", losses["similarity"]).backward()
    return {"gradients": gradients(model), "queues": queues(model)}


def alone(rank: int) -> int:
    """Counts the pairs that are matched when negatives come from a process's own batch of one pair."""
    model = tiny.retrieval(negative_all_rank=False)
    return len(model.passes(*one_pair("blip", rank), torch.tensor([rank])).logits)


def mask(rank: int) -> dict[str, list[Tensor]]:
    """Masks weights that differ between processes, as rounding would make them, so that masks would differ too."""
    model = tiny.clip()
    batch = dict(zip(("images", "ids", "mask"), one_pair("clip", rank), strict=True))

    def forward(model: torch.nn.Module, batch: dict, setting: PruneSetting) -> Tensor:
        return sum(model.costs(*batch.values(), guidance=Guidance(setting))[0].values())

    task = Experiment(
        ClipRetrievalConfig(p=0.5, sparsity_type="2:4"), Run(torch.device("cpu"), rank, 2), model, {"calibration": [batch]},
        losses=None, evaluate=None, gflops=forward, score="r_mean", reference=1.0,
    )  # fmt: skip
    torch.manual_seed(rank)
    for weight in task.sparse.weights.values():
        weight.data += 1e-2 * torch.randn_like(weight)
    task.mask(task.sparse.weights, OFF)
    return {name: [tensor.clone() for tensor in task.sparse.tensors(name)] for name in task.sparse.masks}


def distributed(rank: int, checkpoint_blocks: int) -> dict[str, Tensor]:
    """The gradients of a DDP step on two pairs of images each, with the learnable tokens that all blocks share."""
    model = tiny.nlvr(INSTANCE, checkpoint_blocks=checkpoint_blocks).train()
    wrapped = as_distributed(model, torch.device("cpu"))
    ids, mask = tiny.text([5, 9], seed=rank)
    output = wrapped(tiny.images(2, seed=rank), ids, mask, Guidance(SETTING, align=True, packed=True))
    (output.logits.square().mean() + output.similarity).backward()
    return gradients(model)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def queues(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if "queue" in name}


def work(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {name: gather(rank, name) for name in LAYOUTS}
    found |= {name: step(rank, *form) for name, form in FORMS.items()}
    found |= {f"DDP, {number} recompute": distributed(rank, number) for number in (0, 2)}
    torch.save({**found, "alone": alone(rank), "masked": mask(rank)}, folder / f"{rank}.pt")
    leave_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """The results of two processes, which are started once."""
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(work, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_samples_of_different_widths_come_together_and_gradients_find_their_owners(found, name):
    expected = [sample for rank, lengths in enumerate(LAYOUTS[name]) for sample in samples(rank, lengths)]
    for rank, here in enumerate(found):
        for tokens, sample in zip(here[name]["tokens"], expected, strict=True):
            assert torch.equal(tokens, sample)
        for i, gradient in enumerate(here[name]["gradients"]):
            wanted = sum(weights(other, 2 * rank + i, len(gradient)) for other in range(2))
            torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("name", FORMS)
def test_both_processes_hold_the_queue_of_one_with_both_batches(found, name):
    kind, form = FORMS[name]
    model = tiny.PAIR_MODELS[kind](INSTANCE).train()
    before = {name: buffer.clone() for name, buffer in queues(model).items()}
    passes = model.passes(*tiny.pairs(kind, PAIRS), torch.arange(2), Guidance(SETTING, packed=form == "packed"))
    model.enqueue(passes, torch.arange(2))
    for key, expected in queues(model).items():
        assert torch.equal(found[0][name]["queues"][key], found[1][name]["queues"][key])
        torch.testing.assert_close(found[0][name]["queues"][key], expected, atol=1e-5, rtol=1e-5)
        assert not torch.equal(expected, before[key])


@pytest.mark.parametrize("name", FORMS)
def test_the_mean_of_their_gradients_is_that_of_one_process_with_both_batches(found, name):
    """BLIP: of the matching, where each of two pairs is the other's negative, across processes and texts of other widths."""
    kind, form = FORMS[name]
    model = tiny.PAIR_MODELS[kind](INSTANCE).train()
    passes = model.passes(*tiny.pairs(kind, PAIRS), torch.arange(2), Guidance(SETTING, align=True, packed=form == "packed"))
    losses = model.losses(passes, torch.arange(2), alpha=0.4)
    losses.get("matching", losses["similarity"]).backward()
    expected = gradients(model)
    assert all(here[name]["gradients"].keys() == expected.keys() for here in found)
    for key, gradient in expected.items():
        mean = (found[0][name]["gradients"][key] + found[1][name]["gradients"][key]) / 2
        torch.testing.assert_close(mean, gradient, atol=1e-5, rtol=1e-3, msg=key)


def test_masks_and_what_they_took_are_the_same_on_both(found):
    here, there = (each["masked"] for each in found)
    assert here.keys() == there.keys() and len(here) > 4
    for name, tensors in here.items():
        assert len(tensors) == 5 and all(map(torch.equal, tensors, there[name])), name  # with the momentum encoder's


def test_recomputed_activations_change_no_gradient_of_distributed_training(found):
    for here in found:
        plain, recomputed = here["DDP, 0 recompute"], here["DDP, 2 recompute"]
        assert plain["space_dict"].abs().max() > 0
        for name, gradient in plain.items():
            torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-5, msg=name)
        assert torch.equal(plain["space_dict"], found[0]["DDP, 0 recompute"]["space_dict"])  # averaged over both


def test_negatives_may_be_drawn_from_the_own_batch_alone(found):
    assert [here["alone"] for here in found] == [1, 1]
