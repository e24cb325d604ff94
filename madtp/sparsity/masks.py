"""N:M weight sparsity: of every M neighbouring weights along a layer's input, at most N are not zero (MADTP++).

The masks are by magnitude; what is kept can take over what was dropped (`madtp.refit`). They hold exactly: gradients of masked
weights are dropped before anything reads them, and the weights are set to zero again after every optimiser step, since weight decay
and momentum of the time before would move them.
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
    """At most `kept` of `group` neighbours."""

    kept: int
    group: int

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"


def magnitude_mask(weight: Tensor, pattern: Pattern) -> Tensor:
    """The largest weights of each group; of equals the earlier one. (O, I) -> (O, I) bool, I a multiple of the group."""
    groups = weight.detach().abs().unflatten(1, (-1, pattern.group))
    best = groups.argsort(dim=-1, descending=True, stable=True)[..., : pattern.kept]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).flatten(1)


def most_in_a_group(weight: Tensor, group: int) -> int:
    """The most weights of a group that are not zero. (O, I), I a multiple of the group."""
    return int(weight.unflatten(1, (-1, group)).count_nonzero(dim=-1).max())


def pack_weight(weight: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """An N:M sparse weight as what is kept of it: values (O, I * N / M) and positions (O, I / M * B) uint8.

    The values of a group are in their order. Of each, b bits say its place in the group, b as many as M - 1 has; those of a group
    are one number, its first value in the lowest bits, in B bytes, the lowest first. So 2:4 has a byte a group, with p0 + 4 * p1.
    """
    mask = magnitude_mask(weight, pattern).unflatten(1, (-1, pattern.group))
    places = mask.nonzero()[:, 2].view(*mask.shape[:2], pattern.kept)
    values = weight.unflatten(1, (-1, pattern.group)).gather(2, places).flatten(1)
    bits = (places[..., None] >> torch.arange(_bits(pattern), device=weight.device) & 1).flatten(2)
    bits = F.pad(bits, (0, -bits.shape[2] % 8)).unflatten(2, (-1, 8))
    return values, (bits << torch.arange(8, device=weight.device)).sum(dim=-1, dtype=torch.uint8).flatten(1)


def unpack_weight(values: Tensor, positions: Tensor, pattern: Pattern) -> Tensor:
    """What `pack_weight` was given, to the bit. -> (O, I)"""
    values = values.unflatten(1, (-1, pattern.kept))
    bits = (positions.view(*values.shape[:2], -1, 1) >> torch.arange(8, device=values.device, dtype=torch.uint8) & 1).flatten(2)
    bits = bits[..., : pattern.kept * _bits(pattern)].unflatten(2, (pattern.kept, -1)).long()
    places = (bits << torch.arange(_bits(pattern), device=values.device)).sum(dim=-1)
    return values.new_zeros(*values.shape[:2], pattern.group).scatter_(2, places, values).flatten(1)


def _bits(pattern: Pattern) -> int:
    """Of a place in a group."""
    return (pattern.group - 1).bit_length()


def counted_dense(sparse: "SparseWeights | None") -> AbstractContextManager:
    """Inside, the meter counts all weights as dense."""
    return nullcontext() if sparse is None else sparse.counted(())


class SparseWeights:
    """Weights of a model under N:M masks, each from the moment when it is selected.

    left_dense: names of those whose input is no multiple of the group
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], pattern: Pattern, followers: Mapping[str, nn.Parameter] | None = None):
        """
        Args:
            weights: (O, I) each, by name.
            followers: weights of the same names that move after these, as momentum encoders' do, and share their masks.
        """
        self.pattern = pattern
        self.left_dense = [name for name, weight in weights.items() if weight.shape[1] % pattern.group]
        self.weights = {name: weight for name, weight in weights.items() if name not in self.left_dense}
        self.masks: dict[str, Tensor] = {}
        self._followers = {name: [weight] for name, weight in (followers or {}).items()}
        self._taken: dict[str, list[Tensor]] = {}  # what masking took from weight and followers, until the masks are fixed
        for name, weight in self.weights.items():
            if weight.requires_grad:
                weight.register_hook(lambda gradient, name=name: self._masked(name, gradient))

    @torch.no_grad()
    def select(self, names: Iterable[str], moments: Mapping[str, Tensor] | None = None) -> None:
        """Masks for these weights, by what they are; what an earlier mask took counts as it was then.

        Args:
            moments: by name, see `madtp.refit.second_moments`; with them kept weights, and followers', take over from dropped ones.
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
        """No mask changes from here on: what was there before is forgotten."""
        self._taken = {}

    @contextmanager
    def tried(self, names: Iterable[str]) -> Iterator[None]:
        """Inside, these weights, none of them masked yet, may be masked; afterwards they are as they were, to the bit."""
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
        """Set masked weights to zero."""
        for name, mask in self.masks.items():
            for weight in self.members(name):
                weight.masked_fill_(~mask, 0.0)

    @contextmanager
    def counted(self, names: Iterable[str]) -> Iterator[None]:
        """Inside, the meter counts exactly these weights as sparse, whether they are masked or not."""
        self._mark(names)
        try:
            yield
        finally:
            self._mark(self.masks)

    def members(self, name: str) -> list[nn.Parameter]:
        """The weight of this name and its followers."""
        return [self.weights[name], *self._followers.get(name, [])]

    def tensors(self, name: str) -> list[Tensor]:
        """All that masking has made of a weight: it and its followers, its mask, what was taken; to be written to."""
        return [*(weight.data for weight in self.members(name)), self.masks[name], *self._taken[name]]

    @property
    def changing(self) -> bool:
        """Whether masks may still change."""
        return bool(self._taken)

    @property
    def nonzero(self) -> tuple[int, int]:
        """Of the masked weights, those that are not zero, and all of them."""
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
        """What masking took, on top of what training has done since."""
        for weight, taken in zip(self.members(name), self._taken[name], strict=True):
            weight.add_(taken)

    def _masked(self, name: str, gradient: Tensor) -> Tensor:
        """A masked weight gets none, not even one that has overflowed."""
        return gradient.masked_fill(~self.masks[name], 0.0) if name in self.masks else gradient

    def _mark(self, sparse: Iterable[str]) -> None:
        sparse = set(sparse)
        for name in self.weights:
            for weight in self.members(name):
                flops.mark_sparse(weight, self.pattern if name in sparse else None)
