"""The schedule of sparse weights and pruned tokens under one GFLOPs budget.

`p` is the share of GFLOPs that both remove together. Let w be the share that sparse weights remove alone, and R the number of ramp
epochs. The orders are:

together       all weights are masked at the start; the total share rises in equal steps from w to p, by pruning more tokens
weights_first  the same, after R epochs with masked weights and unpruned tokens
tokens_first   the share rises as in together, with the weights already counted as sparse; they are masked after R epochs
adaptive       the share rises in equal steps from 0 to p; each step prunes tokens, and the weights of one attention or MLP (of a
               block or tower) at a time, in the order of validation score lost per GFLOP, until its target is met
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from typing import NamedTuple

from configs.schema import Config
from madtp.rule import OFF, PruneSetting
from madtp.sparsity.layers import groups
from madtp.sparsity.masks import SparseWeights
from utils import UserError, logger

Measure = Callable[[PruneSetting], float]
Mask = Callable[[Iterable[str], PruneSetting], None]
Score = Callable[[PruneSetting], float]
Meet = Callable[[float], tuple[PruneSetting, float]]  # target GFLOPs -> the nearest setting, and its GFLOPs

ROUNDING = 1e-9  # tolerance for rounding errors in shares and ratios
NEAR = 0.01  # relative distance to the target at which no further weights are masked; token pruning can make up the rest
TOKENS = "tokens"  # the name of the option to prune tokens


class Option(NamedTuple):
    """An option for the next step of `adaptive`: the GFLOPs that it saves, and the validation score that it loses."""

    saved: float
    lost: float

    @property
    def price(self) -> tuple[float, float]:
        """The lost score per saved GFLOP, as a sort key. Among options that lose nothing, the one that saves most comes first."""
        return max(0.0, self.lost) / self.saved, -self.saved


def check_reach(config: Config, alone: float) -> None:
    """Checks p against the share `alone` of the GFLOPs that sparse weights remove. Logs if they meet p without token pruning.

    Raises:
        UserError: when they do not meet p and token pruning is off in the config.
    """
    if alone >= config.p - ROUNDING:
        logger.info("the weights alone remove %.3f of the GFLOPs, p = %g: token pruning is off", alone, config.p)
    elif config.method == "none":
        raise UserError(
            f"p = {config.p:g} is out of reach: the weights alone remove {alone:.3f} of the GFLOPs; choose p up to that, or prune"
            " tokens too (--token_reduce, method: dtp)"
        )


class WeightPlan:
    """The plan of masking weights and pruning tokens, epoch by epoch. Without sparse weights it is just the ramp of tokens."""

    def __init__(self, config: Config, sparse: SparseWeights | None, measure: Measure, mask: Mask, dense: float):
        """Makes the plan.

        Args:
            config: the config.
            sparse: the weights to mask; None without sparse weights.
            measure: setting -> mean GFLOPs per sample.
            mask: (names, setting) -> None; masks these weights of the model while its tokens are pruned by `setting`.
            dense: GFLOPs of the uncompressed model, from `measure`.

        Raises:
            UserError: when max_epoch is too low for the plan, or p is out of reach.
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
        needed = max(1 + settled + self.config.align_epochs, next(epoch for epoch in count(1) if self.removal(epoch - 1) >= p))
        if needed > epochs:
            order = f"order: {self.config.order}, mask_schedule: {self.config.mask_schedule}: " if self.sparse else ""
            first = f" after align_epochs: {self.config.align_epochs}" if self.config.align_epochs else ""
            raise UserError(
                f"{order}with ramp_epochs: {self.ramp}{first} the ramp ends in epoch {needed}, but max_epoch is {epochs}; raise"
                " max_epoch or lower ramp_epochs"
            )

    @property
    def prunes_tokens(self) -> bool:
        """Tells whether tokens must be pruned because the weights alone do not meet p."""
        return self.removed_by_weights < self.config.p - ROUNDING

    def removal(self, epoch: int) -> float:
        """Returns the share of GFLOPs to remove in an epoch; none while the modalities are aligned first."""
        if (epoch := self._since_alignment(epoch)) < 0:
            return 0.0
        p, alone = self.config.p, self.removed_by_weights
        if not self.prunes_tokens:
            return p
        if self.sparse is None or self.config.order == "adaptive":
            return p * min(1.0, (epoch + 1) / self.ramp)
        late = self.ramp if self.config.order == "weights_first" else 0
        share = max(0.0, (epoch - late + 1) / self.ramp)
        # Exactly p after the ramp, without rounding errors, because callers compare with p.
        return p if share >= 1 else alone + (p - alone) * share

    def enter(self, epoch: int, setting: PruneSetting) -> bool:
        """Masks the weights that are due in this epoch, with tokens pruned by `setting`. Tells whether any mask is new.

        The order `adaptive` masks in `choose` instead.
        """
        if self.sparse is None or (epoch := self._since_alignment(epoch)) < 0:
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
        """Tells whether the epoch's target is met by `choose`."""
        return self.sparse is not None and self.config.order == "adaptive" and 0 <= self._since_alignment(epoch) < self.ramp

    def settled(self, epoch: int) -> bool:
        """Tells whether all masks are final, so that the epoch may be selected."""
        return self.sparse is None or (self._since_alignment(epoch) >= self._start and not self.sparse.changing)

    def _since_alignment(self, epoch: int) -> int:
        return epoch - self.config.align_epochs

    @property
    def _start(self) -> int:
        """The first epoch with masks; for `adaptive`, the first epoch without new masks."""
        return self.ramp if self.config.order in ("tokens_first", "adaptive") else 0

    @property
    def _settled_from(self) -> int:
        """The first epoch with final masks."""
        return self._start + (self.ramp if self.config.mask_schedule == "refresh" else 0)

    def counting(self, epoch: int) -> AbstractContextManager:
        """Returns a context manager in which GFLOPs are counted as the plan needs them in this epoch.

        While `tokens_first` prunes tokens only, all weights count as sparse, because they will be masked later.
        """
        if self.sparse is None or self.config.order != "tokens_first" or not 0 <= self._since_alignment(epoch) < self.ramp:
            return nullcontext()
        return self.sparse.counted(self.sparse.weights)

    def choose(self, target: float, setting: PruneSetting, measure: Measure, meet: Meet, score: Score) -> PruneSetting:
        """Lowers the GFLOPs to `target` (order: adaptive), by the options that lose least score per GFLOP. Returns the setting.

        Each option is tried alone, from the state at the start of the step; pruning tokens is tried as if it took the whole step.
        The savings of weights are measured before they are masked: masking changes the scores and thereby the tokens kept.
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
        """Tries all options and returns them by name. The model is unchanged afterwards."""
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
