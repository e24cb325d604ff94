"""N:M weight sparsity: of every M neighbouring weights along a layer's input, at most N are nonzero (MADTP++).

Masks are chosen by magnitude, and kept weights can be refitted (`sparsity.refit`). Masks hold exactly: the gradients of masked
weights are zeroed before anything reads them, and the weights are reset to zero after every optimiser step, because weight decay
and earlier momentum would move them.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madtp import flops
from madtp.sparsity.refit import refit


class Pattern(NamedTuple):
    """At most `kept` nonzero weights in every `group` neighbours."""

    kept: int
    group: int

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"


def magnitude_mask(weight: Tensor, pattern: Pattern) -> Tensor:
    """Marks the largest weights of each group; ties go to the earlier one. (O, I) -> (O, I) bool, I a multiple of the group."""
    groups = weight.detach().abs().unflatten(1, (-1, pattern.group))
    best = groups.argsort(dim=-1, descending=True, stable=True)[..., : pattern.kept]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).flatten(1)


def most_in_a_group(weight: Tensor, group: int) -> int:
    """Returns the largest number of nonzero weights in a group. (O, I), I a multiple of the group."""
    return int(weight.unflatten(1, (-1, group)).count_nonzero(dim=-1).max())


def pack_weight(weight: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Packs an N:M sparse weight into its kept values (O, I * N / M) and their positions (O, I / M * B) uint8.

    The values of a group keep their order. The position of each value in its group takes as many bits as M - 1 has; the positions
    of a group form one number, the first value in the lowest bits, stored in B bytes, the lowest first. For 2:4 that is one byte
    per group, p0 + 4 * p1.
    """
    mask = magnitude_mask(weight, pattern).unflatten(1, (-1, pattern.group))
    places = mask.nonzero()[:, 2].view(*mask.shape[:2], pattern.kept)
    values = weight.unflatten(1, (-1, pattern.group)).gather(2, places).flatten(1)
    bits = (places[..., None] >> torch.arange(_bits(pattern), device=weight.device) & 1).flatten(2)
    bits = F.pad(bits, (0, -bits.shape[2] % 8)).unflatten(2, (-1, 8))
    return values, (bits << torch.arange(8, device=weight.device)).sum(dim=-1, dtype=torch.uint8).flatten(1)


def unpack_weight(values: Tensor, positions: Tensor, pattern: Pattern) -> Tensor:
    """Reverses `pack_weight` to the bit; returns the dense weight (O, I)."""
    values = values.unflatten(1, (-1, pattern.kept))
    bits = (positions.view(*values.shape[:2], -1, 1) >> torch.arange(8, device=values.device, dtype=torch.uint8) & 1).flatten(2)
    bits = bits[..., : pattern.kept * _bits(pattern)].unflatten(2, (pattern.kept, -1)).long()
    places = (bits << torch.arange(_bits(pattern), device=values.device)).sum(dim=-1)
    return values.new_zeros(*values.shape[:2], pattern.group).scatter_(2, places, values).flatten(1)


def _bits(pattern: Pattern) -> int:
    """Returns the number of bits of a position in a group."""
    return (pattern.group - 1).bit_length()


def counted_dense(sparse: "SparseWeights | None") -> AbstractContextManager:
    """Returns a context manager in which the meter counts all weights as dense."""
    return nullcontext() if sparse is None else sparse.counted(())


class SparseWeights:
    """The weights of a model under N:M masks; each is masked once it has been selected.

    left_dense: names of weights whose input is not a multiple of the group
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], pattern: Pattern, followers: Mapping[str, nn.Parameter] | None = None):
        """
        Args:
            weights: (O, I) each, by name.
            followers: weights that follow those of the same names, as momentum encoders' do, and share their masks.
        """
        self.pattern = pattern
        self.left_dense = [name for name, weight in weights.items() if weight.shape[1] % pattern.group]
        self.weights = {name: weight for name, weight in weights.items() if name not in self.left_dense}
        self.masks: dict[str, Tensor] = {}
        self._followers = {name: [weight] for name, weight in (followers or {}).items()}
        self._taken: dict[str, list[Tensor]] = {}  # removed by masking, until the masks are fixed
        for name, weight in self.weights.items():
            if weight.requires_grad:
                weight.register_hook(lambda gradient, name=name: self._masked(name, gradient))

    @torch.no_grad()
    def select(self, names: Iterable[str], moments: Mapping[str, Tensor] | None = None) -> None:
        """Masks these weights by their magnitude; values that an earlier mask removed count as they were.

        Args:
            moments: by name, from `refit.second_moments`; with them the kept weights, and their followers', are refitted.
        """
        for name in names:
            if name in self._taken:
                self._give_back(name)
            mask = self.masks[name] = magnitude_mask(self.weights[name], self.pattern)
            before = [weight.clone() for weight in self.members(name)]
            for weight in self.members(name):
                weight.copy_(weight.masked_fill(~mask, 0.0) if moments is None else refit(weight, mask, moments[name]))
            self._taken[name] = [old - new for old, new in zip(before, self.members(name), strict=True)]
        self._mark(self.masks)

    def fix(self) -> None:
        """Makes the masks final: removed values are forgotten."""
        self._taken = {}

    @contextmanager
    def tried(self, names: Iterable[str]) -> Iterator[None]:
        """Context manager in which these weights, not masked yet, may be masked; afterwards they are restored to the bit."""
        before = {name: [weight.detach().clone() for weight in self.members(name)] for name in names}
        try:
            yield
        finally:
            for name, values in before.items():
                for weight, old in zip(self.members(name), values, strict=True):
                    weight.data.copy_(old)
                self.masks.pop(name, None)
                self._taken.pop(name, None)
            self._mark(self.masks)

    @torch.no_grad()
    def apply(self) -> None:
        """Sets masked weights to zero."""
        for name, mask in self.masks.items():
            for weight in self.members(name):
                weight.masked_fill_(~mask, 0.0)

    @contextmanager
    def counted(self, names: Iterable[str]) -> Iterator[None]:
        """Context manager in which the meter counts exactly these weights as sparse, masked or not."""
        self._mark(names)
        try:
            yield
        finally:
            self._mark(self.masks)

    def members(self, name: str) -> list[nn.Parameter]:
        """Returns the weight of this name and its followers."""
        return [self.weights[name], *self._followers.get(name, [])]

    def tensors(self, name: str) -> list[Tensor]:
        """Returns, for writing, a weight and its followers, its mask, and the values that masking removed."""
        return [*(weight.data for weight in self.members(name)), self.masks[name], *self._taken[name]]

    @property
    def changing(self) -> bool:
        """True while masks may still change."""
        return bool(self._taken)

    @property
    def nonzero(self) -> tuple[int, int]:
        """The number of nonzero masked-layer weights, and of all of them."""
        weights = [self.weights[name] for name in self.masks]
        return sum(int(weight.count_nonzero()) for weight in weights), sum(weight.numel() for weight in weights)

    def state_dict(self) -> dict[str, dict]:
        return {"masks": self.masks, "taken": self._taken}

    def load_state_dict(self, state: Mapping[str, Mapping]) -> None:
        self.masks = {name: mask.to(self.weights[name].device) for name, mask in state["masks"].items()}
        self._taken = {name: [values.to(self.weights[name].device) for values in each] for name, each in state["taken"].items()}
        self._mark(self.masks)
        self.apply()

    def _give_back(self, name: str) -> None:
        """Adds the values that masking removed back to the weights, on top of the training since."""
        for weight, taken in zip(self.members(name), self._taken[name], strict=True):
            weight.add_(taken)

    def _masked(self, name: str, gradient: Tensor) -> Tensor:
        """Zeroes the gradient of masked weights, even where it has overflowed."""
        return gradient.masked_fill(~self.masks[name], 0.0) if name in self.masks else gradient

    def _mark(self, sparse: Iterable[str]) -> None:
        sparse = set(sparse)
        for name in self.weights:
            for weight in self.members(name):
                flops.mark_sparse(weight, self.pattern if name in sparse else None)
