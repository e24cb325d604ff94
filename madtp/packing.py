"""The packed layout of a batch: no padding, the tokens of one sample behind those of the one before.

Shapes: B samples, N tokens of the longest, T tokens of all together. A sample's first token is its class token.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Packed:
    """Where the samples of a flat (T, ...) tensor lie. `lengths` is known to the host: whoever packs waits for the device once.

    readers: where texts read these samples, how many neighbouring texts read each; None: equally many
    """

    lengths: tuple[int, ...]
    device: torch.device
    readers: tuple[int, ...] | None = None

    @classmethod
    def of(cls, lengths: Iterable[int], device: torch.device) -> "Packed":
        return cls(tuple(lengths), device)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first row of each sample, and T."""
        return tuple(accumulate(self.lengths, initial=0))

    @property
    def total(self) -> int:
        return self.starts[-1]

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def uniform(self) -> bool:
        return min(self.lengths) == self.longest

    @cached_property
    def offsets(self) -> Tensor:
        """`starts` on the device, (B + 1,) int32."""
        gpu = self.device.type == "cuda"
        return torch.tensor(self.starts, dtype=torch.int32, pin_memory=gpu).to(self.device, non_blocking=True)

    @cached_property
    def valid(self) -> Tensor:
        """(B, N) bool, False is padding."""
        lengths = self.offsets.diff()
        return torch.arange(self.longest, device=self.device) < lengths.unsqueeze(1)

    @cached_property
    def rows(self) -> Tensor:
        """(B, N) the row of each token; of padding, some row of the tensor."""
        rows = self.offsets[:-1].long().unsqueeze(1) + torch.arange(self.longest, device=self.device)
        return rows.clamp(max=self.total - 1)

    @cached_property
    def places(self) -> Tensor:
        """(T,) where the tokens stand in the padded layout, its first two dimensions flattened."""
        return _true_places(self.valid, self.total)

    def pad(self, values: Tensor) -> Tensor:
        """(T, ...) -> (B, N, ...). Padding holds the values of other samples."""
        if self.uniform:
            return values.unflatten(0, (len(self.lengths), -1))
        return values.index_select(0, self.rows.flatten()).unflatten(0, self.rows.shape)

    def unpad(self, values: Tensor) -> Tensor:
        """(B, N, ...) -> (T, ...)."""
        values = values.flatten(0, 1)
        return values if self.uniform else values.index_select(0, self.places)

    def joined(self, source: "Packed") -> "Packed":
        """The same rows in fewer samples: neighbours that read the same sample of `source` become one, as long as they together, so
        that attention sees one sequence of queries a source."""
        each = len(self.lengths) // len(source.lengths)
        if each == 1 and source.readers is None:
            return self
        ends = list(accumulate(source.readers or [each] * len(source.lengths), initial=0))
        return Packed.of((self.starts[last] - self.starts[first] for first, last in pairwise(ends)), self.device)

    def select(self, x: Tensor, samples: Tensor) -> tuple[Tensor, "Packed"]:
        """The samples of these numbers (n,), in that order; one may come twice. Known to the host: it waits for the device once."""
        chosen = samples.tolist()
        layout = Packed.of([self.lengths[i] for i in chosen], self.device)
        starts = [self.starts[i] - start for i, start in zip(chosen, layout.starts, strict=False)]
        shift = torch.tensor(starts, device=self.device).repeat_interleave(layout.offsets.diff(), output_size=layout.total)
        return x.index_select(0, shift + torch.arange(layout.total, device=self.device)), layout

    def chunk(self, x: Tensor, parts: int) -> list[tuple[Tensor, "Packed"]]:
        """The batch in `parts` of equally many samples."""
        each = len(self.lengths) // parts
        bounds = [(i * each, (i + 1) * each) for i in range(parts)]
        return [(x[self.starts[a] : self.starts[b]], Packed.of(self.lengths[a:b], self.device)) for a, b in bounds]


def class_tokens(x: Tensor, layout: "Packed | Tensor | None") -> Tensor:
    """The first token of each sample, (B, C), of x packed or padded (B, N, C)."""
    return x[layout.offsets[:-1]] if isinstance(layout, Packed) else x[:, 0]


def pack(x: Tensor, valid: Tensor | None) -> tuple[Tensor, Packed]:
    """(B, N, ...) and its (B, N) mask, None where nothing is padded -> (T, ...) and where its samples lie."""
    if valid is None:
        return x.flatten(0, 1), Packed.of([x.shape[1]] * len(x), x.device)
    layout = Packed.of(valid.sum(dim=1).tolist(), x.device)
    return x.flatten(0, 1).index_select(0, _true_places(valid, layout.total)), layout


def _true_places(mask: Tensor, number: int) -> Tensor:
    """Where the flattened mask is true, in a known number of places: a GPU need not wait for it, as it would for x[mask]. What is
    selected by it has a plain scatter for a backward pass."""
    return torch.nonzero_static(mask.flatten(), size=number).flatten()


class Groups:
    """Samples of about equal length together, so that padding them to one another costs little.

    members: the numbers of the samples of each group
    """

    def __init__(self, layout: Packed, members: list[list[int]]):
        self._rows = None
        if members == [list(range(len(layout.lengths)))]:
            self.layouts = [layout]  # what it has computed serves the next layer too
            return
        self.layouts = [Packed.of([layout.lengths[i] for i in group], layout.device) for group in members]
        order = [i for group in members for i in group]
        if order != list(range(len(order))):
            places = torch.tensor(order, device=layout.device)
            self._rows = layout.rows[places].flatten().index_select(0, _true_places(layout.valid[places], layout.total))

    def split(self, x: Tensor) -> list[Tensor]:
        """(T, C) -> (G, N, C) of each group, padded."""
        x = x if self._rows is None else x.index_select(0, self._rows)
        parts = x.split([layout.total for layout in self.layouts])
        return [layout.pad(part) for layout, part in zip(self.layouts, parts, strict=True)]

    def join(self, parts: list[Tensor]) -> Tensor:
        """(G, N, C) of each group -> (T, C)."""
        x = torch.cat([layout.unpad(part) for layout, part in zip(self.layouts, parts, strict=True)])
        if self._rows is None:
            return x
        back = torch.empty_like(self._rows).scatter_(0, self._rows, torch.arange(len(x), device=x.device))
        return x.index_select(0, back)
