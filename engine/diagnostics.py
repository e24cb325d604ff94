"""Diagnostics of the alignment: do the learnable tokens learn, do they matter to the decisions, and do they tell pairs apart?

B samples, N prunable tokens, K learnable tokens, D their channels.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from itertools import combinations, product
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.experiment import Experiment, Pairs
from engine.train import move
from madtp.blocks import AlignedModel, Guidance, PrunedBlock
from madtp.packing import Layout, Packed
from madtp.rule import PruneSetting

Forward = Callable[[nn.Module, dict, PruneSetting], object]

ENOUGH = 3  # tokens of a sample that a rank correlation needs


class Watcher(Protocol):
    """An observer of the inputs of all blocks, see `watch`."""

    def see(self, branch: str, block: PrunedBlock, x: Tensor, layout: Layout, guidance: Guidance) -> None:
        """Observes a block that is about to run on x (B, P + N, C), or packed (T, C)."""

    def end_batch(self) -> None:
        """Observes that all blocks have run on a batch."""


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


class Decisions:
    """Measures the part of the learnable tokens in the decisions of variant "paper", from the inputs of each block.

    For that it computes the block's self-attention a second time.
    """

    def __init__(self, learnable_tokens: Tensor):
        generator = torch.Generator().manual_seed(0)  # of its own: the diagnostics must not change the run
        std = float(learnable_tokens.float().std())
        self.redrawn = (torch.randn(learnable_tokens.shape, generator=generator) * std).to(learnable_tokens)
        self.average = Average()

    def see(self, branch: str, block: PrunedBlock, x: Tensor, layout: Layout, guidance: Guidance) -> None:
        """Adds a block that is about to run on x (B, P + N, C), or packed (T, C)."""
        pruner = block.pruner
        if pruner is None or (temperature := guidance.temperature(pruner.rule)) is None:
            return
        prefix, rule = pruner.rule.num_prefix_tokens, pruner.rule
        whole = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if layout is None else layout
        valid = (whole.valid if isinstance(whole, Packed) else whole)[:, prefix:]
        _, statistics = block.attend(x, layout, rule)
        attention, other = (pruner.align(x, layout, tokens, False)[0] for tokens in (guidance.learnable_tokens, self.redrawn))
        self._correlate({name: attention.amax(dim=1) if name == "token" else statistics.term(name) for name in rule.scores}, valid)
        kept = pruner.choose(attention, statistics, valid, temperature).kept
        changed = {"changed_redrawn": pruner.choose(other, statistics, valid, temperature).kept}
        if rest := tuple(term for term in rule.scores if term != "token"):
            without = copy(pruner)  # shallow: the same weights under another rule
            without.rule = replace(rule, terms=rest)
            changed["changed_without_token"] = without.choose(attention, statistics, valid, temperature).kept
        for name, choice in changed.items():
            self.average.add(name, ((choice != kept) & valid).sum(), int(valid.sum()))

    def _correlate(self, scores: Mapping[str, Tensor], valid: Tensor) -> None:
        enough = valid.sum(dim=1) >= ENOUGH
        for one, two in combinations(scores, 2):
            found = rank_correlation(scores[one], scores[two], valid)[enough]
            self.average.add(f"rank_{one}_{two}", found.sum(), len(found))

    def end_batch(self) -> None:
        """Does nothing: every block was counted as it ran."""

    def result(self) -> dict[str, float]:
        """Returns means over samples and pruning blocks.

        "rank_A_B": rank correlations of the terms of the importance; "changed_redrawn" and "changed_without_token": the share of
        a block's keep decisions that differ when E is drawn again with its own standard deviation, and when S_token is left out.
        """
        return self.average.means()


class PairSimilarity:
    """Compares the alignment features of matching pairs with those of shuffled pairs of the same batches."""

    def __init__(self, pairs: Pairs):
        self.pairs = pairs
        self.features: dict[str, Tensor] = {}
        self.seen: set[int] = set()
        self.matching: list[Tensor] = []
        self.shuffled: list[Tensor] = []

    def see(self, branch: str, block: PrunedBlock, x: Tensor, layout: Layout, guidance: Guidance) -> None:
        """Adds a block that is about to run on x (B, P + N, C), or packed (T, C)."""
        if block.pruner is None or id(block) in self.seen:
            return  # the first pass of a batch: later ones may read the other modality
        self.seen.add(id(block))
        found = block.pruner.align(x, layout, guidance.learnable_tokens, True)[1].float()
        self.features[branch] = self.features[branch] + found if branch in self.features else found

    def end_batch(self) -> None:
        """Compares the pairs of the batch that has run."""
        if "language" in self.features:
            vision, language, groups = self.pairs(self.features["vision"], self.features["language"])
            image, text = (F.normalize(part, dim=-1).flatten(1) for part in (vision, language))
            with torch.autocast(vision.device.type, enabled=False):
                similarity = image @ text.t() / vision.shape[1]
            self.matching.append(similarity.diagonal())
            self.shuffled.append(similarity[groups.unsqueeze(1) != groups])
        self.features.clear()
        self.seen.clear()

    def result(self) -> dict[str, float]:
        """Returns the mean L_sim of "matching" and of "shuffled" pairs, and the "auc" of `separation` by their similarity.

        Empty without a text branch that has learnable tokens, and for a single image, which cannot be shuffled.
        """
        if not any(len(part) for part in self.shuffled):
            return {}
        same, other = torch.cat(self.matching), torch.cat(self.shuffled)
        return {"matching": float(1 - same.mean()), "shuffled": float(1 - other.mean()), "auc": separation(same, other)}


@torch.no_grad()
def watch(
    model: AlignedModel,
    batches: Iterable[dict],
    forward: Forward,
    setting: PruneSetting,
    watchers: Sequence[Watcher],
) -> None:
    """Runs the batches once and shows the inputs of each block of the model's branches to all watchers."""
    handles = []
    for branch, blocks in model.branches.items():
        for block, watcher in product(blocks, watchers):
            handles.append(block.register_forward_pre_hook(_seen_by(watcher, branch)))
    try:
        for batch in batches:
            forward(model, batch, setting)
            for watcher in watchers:
                watcher.end_batch()
    finally:
        for handle in handles:
            handle.remove()


def _seen_by(watcher: Watcher, branch: str) -> Callable[[nn.Module, tuple], None]:
    return lambda block, args: watcher.see(branch, block, *args[:3])


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
        config = experiment.config
        watchers: dict[str, Decisions | PairSimilarity] = {"pairs": PairSimilarity(experiment.pairs)} if experiment.pairs else {}
        if setting.temperature is not None and config.method == "dtp" and config.variant == "paper":
            watchers["decisions"] = Decisions(model.learnable_tokens.detach())
        batches = (move(batch, experiment.run.device) for batch in experiment.calibration_batches)
        with experiment.precision.autocast():
            watch(model.eval(), batches, experiment.gflops, setting, list(watchers.values()))
        report = {"moved": moved(self.start, model.learnable_tokens), "gradient": self.gradients}
        return report | {name: watcher.result() for name, watcher in watchers.items()}
