"""Diagnostics of the alignment: do the learnable tokens learn, do they matter to the decisions, and do they tell pairs apart?

B samples, N prunable tokens, K learnable tokens, D their channels.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.experiment import Experiment
from engine.train import move
from madtp.blocks import AlignedModel, Guidance, PrunedBlock
from madtp.importance import normalise
from madtp.packing import Layout, Packed
from madtp.pruning import PruneSetting

Forward = Callable[[nn.Module, dict, PruneSetting], object]
Pairs = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]  # features of both branches -> of each pair, and its group

ENOUGH = 3  # tokens of a sample that a rank correlation needs


def moved(before: Tensor, now: Tensor) -> dict[str, float]:
    """Compares the learnable tokens (K, D) with those at the start of the run: relative distance and mean cosine."""
    before, now = before.float(), now.detach().float()
    return {
        "distance": float((now - before).norm() / before.norm()),
        "cosine": float(F.cosine_similarity(before, now, dim=-1).mean()),
    }


def gradient_norms(losses: Mapping[str, Tensor], weights: Mapping[str, float], learnable_tokens: Tensor) -> dict[str, float]:
    """Returns the norm of the gradient of each weighted loss with respect to the learnable tokens, 0 where there is no way."""
    norms = {}
    for name, loss in losses.items():
        found = None
        if loss.requires_grad:
            found = torch.autograd.grad(weights.get(name, 1.0) * loss, learnable_tokens, retain_graph=True, allow_unused=True)[0]
        norms[name] = 0.0 if found is None else float(found.norm())
    return norms


def rank_correlation(first: Tensor, second: Tensor, valid: Tensor) -> Tensor:
    """Returns Spearman's rank correlation of two scores (B, N) over the valid tokens of each sample, (B,)."""
    ranks = []
    for score in (first, second):
        order = score.masked_fill(~valid, float("inf")).argsort(dim=1).argsort(dim=1).float()
        mean = (order * valid).sum(dim=1, keepdim=True) / valid.sum(dim=1, keepdim=True)
        ranks.append((order - mean) * valid)
    return F.cosine_similarity(*ranks, dim=1)


def separation(matching: Tensor, shuffled: Tensor) -> float:
    """Returns the probability that a matching pair has a larger score than a shuffled one, ties half (AUC). (M,), (S,)"""
    ordered = shuffled.sort().values
    below, not_above = (torch.searchsorted(ordered, matching, right=right) for right in (False, True))
    return float((below + not_above).double().mean() / (2 * len(shuffled)))


class Average:
    """Means of figures by name."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, float] = {}

    def add(self, name: str, total: Tensor | float, count: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(total)
        self.counts[name] = self.counts.get(name, 0.0) + count

    def means(self) -> dict[str, float]:
        return {name: self.sums[name] / count for name, count in self.counts.items() if count}


@contextmanager
def _watched(model: AlignedModel, see: Callable[[str, PrunedBlock, Tensor, Layout, Guidance], None]) -> Iterator[None]:
    """Calls `see` with branch, block and the block's inputs before each block of the branches runs."""
    handles = []
    for branch, blocks in model.branches.items():
        for block in blocks:
            hook = lambda block, args, branch=branch: see(branch, block, *args[:3])  # noqa: E731
            handles.append(block.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def decisions(model: AlignedModel, batches: Iterable[dict], forward: Forward, setting: PruneSetting) -> dict[str, float]:
    """Measures the part of the learnable tokens in the decisions of variant "paper".

    The entries, averaged over samples and pruning blocks: "rank_A_B", the rank correlations of the terms of the importance;
    "changed_redrawn" and "changed_without_token", the share of the keep decisions of a block that differ when E is drawn again
    with its own standard deviation, and when S_token is left out of the importance.
    """
    generator = torch.Generator().manual_seed(0)  # of its own: the diagnostics must not change the run
    learnable = model.learnable_tokens
    redrawn = (torch.randn(learnable.shape, generator=generator) * learnable.std().cpu()).to(learnable.device)
    average = Average()

    def see(branch: str, block: PrunedBlock, x: Tensor, layout: Layout, guidance: Guidance) -> None:
        pruner, temperature = block.pruner, guidance.temperature
        if pruner is None or temperature is None:
            return
        prefix, rule = pruner.rule.num_prefix_tokens, pruner.rule
        whole = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if layout is None else layout
        valid = (whole.valid if isinstance(whole, Packed) else whole)[:, prefix:]
        _, statistics = block.attend(x, layout, rule)
        attention, other = (pruner.align(x, layout, tokens, False)[0].float() for tokens in (guidance.learnable_tokens, redrawn))
        scores = {name: attention.amax(dim=1) if name == "token" else statistics.term(name) for name in rule.scores}
        scores = {name: normalise(score, valid) for name, score in scores.items()}
        enough = valid.sum(dim=1) >= ENOUGH
        for one, two in combinations(scores, 2):
            found = rank_correlation(scores[one], scores[two], valid)[enough]
            average.add(f"rank_{one}_{two}", found.sum(), len(found))
        kept = pruner.choose(attention, statistics, valid, temperature).kept
        changed = {"changed_redrawn": pruner.choose(other, statistics, valid, temperature).kept}
        if rest := tuple(term for term in rule.terms if term != "token"):
            pruner.rule = replace(rule, terms=rest)
            changed["changed_without_token"] = pruner.choose(attention, statistics, valid, temperature).kept
            pruner.rule = rule
        for name, choice in changed.items():
            average.add(name, ((choice != kept) & valid).sum(), int(valid.sum()))

    with _watched(model, see):
        for batch in batches:
            forward(model, batch, setting)
    return average.means()


@torch.no_grad()
def pair_similarity(
    model: AlignedModel, batches: Iterable[dict], forward: Forward, setting: PruneSetting, pairs: Pairs
) -> dict[str, float]:
    """Compares the alignment features of matching pairs with those of shuffled pairs of the same batches.

    Returns:
        "matching" and "shuffled", the mean L_sim of such pairs, and "auc", the probability that a matching pair is more similar
        than a shuffled one.
    """
    features: dict[str, Tensor] = {}
    seen: set[int] = set()

    def see(branch: str, block: PrunedBlock, x: Tensor, layout: Layout, guidance: Guidance) -> None:
        if block.pruner is None or id(block) in seen:
            return  # the first pass of a batch: later ones may read the other modality
        seen.add(id(block))
        found = block.pruner.align(x, layout, guidance.learnable_tokens, True)[1].float()
        features[branch] = features[branch] + found if branch in features else found

    matching, shuffled = [], []
    for batch in batches:
        features.clear()
        seen.clear()
        with _watched(model, see):
            forward(model, batch, setting)
        if "language" not in features:
            return {}
        vision, language, groups = pairs(features["vision"], features["language"])
        image, text = (F.normalize(part, dim=-1).flatten(1) for part in (vision, language))
        with torch.autocast(vision.device.type, enabled=False):
            similarity = image @ text.t() / vision.shape[1]
        matching.append(similarity.diagonal())
        shuffled.append(similarity[groups.unsqueeze(1) != groups])
    same, other = torch.cat(matching), torch.cat(shuffled)
    if not len(other):
        return {}  # a single image: nothing to shuffle
    return {"matching": float(1 - same.mean()), "shuffled": float(1 - other.mean()), "auc": separation(same, other)}


class AlignmentWatch:
    """The diagnostics of a run, epoch by epoch. A model without learnable tokens has none."""

    def __init__(self, experiment: Experiment):
        self.experiment, self.gradients = experiment, {}
        learnable = experiment.model.learnable_tokens if isinstance(experiment.model, AlignedModel) else None
        self.start = None if learnable is None else learnable.detach().clone()

    def state(self) -> dict[str, Tensor]:
        """Returns the entries of a checkpoint that `resume` reads."""
        return {} if self.start is None else {"learnable_start": self.start}

    def resume(self, saved: Mapping[str, Any]) -> None:
        """Compares with the learnable tokens at the start of the run that is resumed. Older checkpoints do not have them."""
        if self.start is not None and "learnable_start" in saved:
            self.start = saved["learnable_start"].to(self.start.device)

    def see_losses(self, losses: Mapping[str, Tensor]) -> None:
        """Measures the gradients of the learnable tokens by loss.

        Not with recomputed activations, which belong to one backward pass of all losses.
        """
        if self.start is not None and not self.experiment.config.vit_grad_ckpt:
            weights, learnable = self.experiment.loss_weights, self.experiment.model.learnable_tokens
            self.gradients = gradient_norms(losses, weights, learnable)

    def report(self, setting: PruneSetting) -> dict[str, dict[str, float]]:
        """Returns the diagnostics by group, on this process's part of the calibration subset."""
        experiment, model = self.experiment, self.experiment.model
        if self.start is None:
            return {}
        batches = [move(batch, experiment.run.device) for batch in experiment.calibration_batches]
        report = {"moved": moved(self.start, model.learnable_tokens), "gradient": self.gradients}
        with experiment.precision.autocast():
            if experiment.pairs is not None:
                report["pairs"] = pair_similarity(model, batches, experiment.gflops, setting, experiment.pairs)
            if setting.temperature is not None and experiment.config.method == "dtp" and experiment.config.variant == "paper":
                report["decisions"] = decisions(model, batches, experiment.gflops, setting)
        return report
