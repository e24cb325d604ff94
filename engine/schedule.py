"""Sparse weights beside pruned tokens, under one budget: what is masked when, and what is left for the tokens to remove.

`p` is what both remove together. With weights alone removing w of the GFLOPs, over a ramp of R epochs:

together       all weights are masked at first, and the tokens' share rises in equal steps, from w to p
weights_first  the same, but R epochs with masked weights and whole tokens go before
tokens_first   the tokens' share rises as in together, the weights counted as sparse already; they are masked after R epochs
adaptive       p rises in equal steps; each is taken by tokens and by weights, those of a block's attention or MLP at a time,
               those first that lose least validation score per GFLOP
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from typing import NamedTuple

from configs.schema import Config
from madtp.pruning import OFF, PruneSetting
from madtp.sparsity.layers import groups
from madtp.sparsity.masks import SparseWeights
from utils import UserError, logger

Measure = Callable[[PruneSetting], float]
Mask = Callable[[Iterable[str], PruneSetting], None]
Score = Callable[[PruneSetting], float]
Meet = Callable[[float], tuple[PruneSetting, float]]  # GFLOPs -> the setting that comes nearest, and its GFLOPs

ROUNDING = 1e-9  # of shares and ratios
NEAR = 0.01  # relative: no further option for less, where tokens can take the rest
TOKENS = "tokens"  # among the options


class Option(NamedTuple):
    """What `adaptive` may do next: the GFLOPs that it saves, and the validation score that it loses."""

    saved: float
    lost: float

    @property
    def price(self) -> tuple[float, float]:
        """Score per GFLOP; of those that lose nothing what saves most is cheapest."""
        return max(0.0, self.lost) / self.saved, -self.saved


def check_reach(config: Config, alone: float) -> None:
    """Say that token pruning is off where sparse weights, which remove this share of the GFLOPs, meet p alone.

    Raises:
        UserError: where they do not, and no token may go.
    """
    if alone >= config.p - ROUNDING:
        logger.info("the weights alone remove %.3f of the GFLOPs, p = %g: token pruning is off", alone, config.p)
    elif config.method == "none":
        raise UserError(
            f"p = {config.p:g} is out of reach: the weights alone remove {alone:.3f} of the GFLOPs; choose p up to that, or prune"
            " tokens too (--token_reduce, method: dtp)"
        )


class WeightPlan:
    """What happens to weights and tokens in each epoch. Without sparse weights: the tokens' ramp alone."""

    def __init__(self, config: Config, sparse: SparseWeights | None, measure: Measure, mask: Mask, dense: float):
        """
        Args:
            mask: masks sparse weights of these names, in a model whose tokens are pruned so.
            dense: GFLOPs of the uncompressed model, as `measure` gives them.
        """
        self.config, self.sparse, self.mask = config, sparse, mask
        self.ramp = max(1, round(config.max_epoch / 3) if config.ramp_epochs is None else config.ramp_epochs)
        self.removed_by_weights = 0.0
        if sparse is not None:
            with sparse.counted(sparse.weights):
                self.removed_by_weights = 1 - measure(OFF) / dense
        self._check_epochs()
        if sparse is not None:
            check_reach(config, self.removed_by_weights)

    def _check_epochs(self) -> None:
        p, epochs = self.config.p, self.config.max_epoch
        settled = self._settled_from if self.sparse else 0
        needed = max(1 + settled, next(epoch for epoch in count(1) if self.removal(epoch - 1) >= p))
        if needed > epochs:
            order = f"order: {self.config.order}, mask_schedule: {self.config.mask_schedule}: " if self.sparse else ""
            raise UserError(
                f"{order}with ramp_epochs: {self.ramp} all is in place in epoch {needed}, and max_epoch is {epochs}; raise"
                " max_epoch or lower ramp_epochs"
            )

    @property
    def prunes_tokens(self) -> bool:
        """Whether weights alone do not meet p."""
        return self.removed_by_weights < self.config.p - ROUNDING

    def removal(self, epoch: int) -> float:
        """The share of GFLOPs that is to be gone in an epoch."""
        p, alone = self.config.p, self.removed_by_weights
        if not self.prunes_tokens:
            return p
        if self.sparse is None or self.config.order == "adaptive":
            return p * min(1.0, (epoch + 1) / self.ramp)
        late = self.ramp if self.config.order == "weights_first" else 0
        share = max(0.0, (epoch - late + 1) / self.ramp)
        return p if share >= 1 else alone + (p - alone) * share  # p itself, not what rounding makes of it

    def enter(self, epoch: int, setting: PruneSetting) -> bool:
        """Mask what this epoch has masked, the tokens pruned as before; but for `adaptive`, which `choose` does. Whether any mask
        is new."""
        if self.sparse is None:
            return False
        new = False
        if self.config.order != "adaptive" and epoch >= (self.ramp if self.config.order == "tokens_first" else 0):
            refreshed = self.config.mask_schedule == "refresh" and epoch < self._start + self.ramp
            if new := not self.sparse.masks or refreshed:
                self.mask(self.sparse.weights, setting)
        if self.sparse.masks and epoch >= self._settled_from:
            self.sparse.fix()
        return new

    def chooses(self, epoch: int) -> bool:
        """Whether it is `choose` that meets the epoch's target."""
        return self.sparse is not None and self.config.order == "adaptive" and epoch < self.ramp

    def settled(self, epoch: int) -> bool:
        """Whether all masks are there that will be, so that the epoch may be selected."""
        return self.sparse is None or (epoch >= self._start and not self.sparse.changing)

    @property
    def _start(self) -> int:
        """The first epoch with masks; of `adaptive` the first in which none is new."""
        return self.ramp if self.config.order in ("tokens_first", "adaptive") else 0

    @property
    def _settled_from(self) -> int:
        """The first epoch with the masks that stay."""
        return self._start + (self.ramp if self.config.mask_schedule == "refresh" else 0)

    def counting(self, epoch: int) -> AbstractContextManager:
        """Inside, the GFLOPs are those that count: with all weights masked, if tokens go first and leave that to them."""
        if self.sparse is None or self.config.order != "tokens_first" or epoch >= self.ramp:
            return nullcontext()
        return self.sparse.counted(self.sparse.weights)

    def choose(self, target: float, setting: PruneSetting, measure: Measure, meet: Meet, score: Score) -> PruneSetting:
        """`adaptive`: bring the GFLOPs down to `target`, first by what loses the least score per GFLOP that it saves.

        Each option is tried alone, from where the step begins; tokens as if they took the whole step. What weights save is counted
        with the tokens that stay before they are masked: afterwards scores differ, and others stay.
        """
        now, near = measure(setting), NEAR if self.prunes_tokens else ROUNDING
        if now > target * (1 + near):
            options = self._options(target, setting, measure, meet, score)
            for name in sorted(options, key=lambda name: options[name].price):
                before = now
                if name == TOKENS:
                    setting, now = meet(target)
                else:
                    self.mask(self._groups_left()[name], setting)
                    now = measure(setting)
                logger.info("%s: %.4f -> %.4f GFLOPs, %.3f points lost alone", name, before, now, options[name].lost)
                if now <= target * (1 + near):
                    break
        self.sparse.fix()
        return setting

    def _options(self, target: float, setting: PruneSetting, measure: Measure, meet: Meet, score: Score) -> dict[str, Option]:
        """By name; the model is as before."""
        now, best, options = measure(setting), score(setting), {}
        for name, weights in self._groups_left().items():
            with self.sparse.counted([*self.sparse.masks, *weights]):
                saved = now - measure(setting)
            with self.sparse.tried(weights):
                self.mask(weights, setting)
                options[name] = Option(saved, best - score(setting))
        if self.prunes_tokens:
            fewer, cost = meet(target)
            options[TOKENS] = Option(now - cost, best - score(fewer))
        return {name: option for name, option in options.items() if option.saved > 0}

    def _groups_left(self) -> dict[str, list[str]]:
        return groups((name for name in self.sparse.weights if name not in self.sparse.masks), self.config.sparse_unit)
