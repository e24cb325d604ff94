"""Layouts of a batch of token sequences of different lengths: padded with a mask, or packed without padding.

B samples, N tokens of the longest one, T tokens of all samples together, C channels. A padded batch is (B, N, C) with a mask
(B, N), False for padding, or None where nothing is padded. A packed batch is (T, C), the samples' tokens one after another, with a
`Packed` that holds their positions.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

Valid = Tensor | None  # (..., N) bool, False is padding; None where nothing is padded


@dataclass(frozen=True, eq=False)
class Packed:
    """The position of each sample in a flat (T, ...) tensor.

    lengths: tokens per sample, known to the host; creating a layout from a mask synchronises with the device once
    readers: number of neighbouring texts that read each sample in cross-attention; None: the same number for all
    sizes: (T,) number of input tokens that each token stands for, of which self-attention takes account; None: one each
    """

    lengths: tuple[int, ...]
    device: torch.device
    readers: tuple[int, ...] | None = None
    sizes: Tensor | None = None

    @classmethod
    def of(cls, lengths: Iterable[int], device: torch.device) -> "Packed":
        return cls(tuple(lengths), device)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First row of each sample, followed by T."""
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
        """Row of each token, (B, N); for padding, an arbitrary row of the tensor."""
        rows = self.offsets[:-1].long().unsqueeze(1) + torch.arange(self.longest, device=self.device)
        return rows.clamp(max=self.total - 1)

    @cached_property
    def places(self) -> Tensor:
        """Position of each token in the flattened padded layout, (T,)."""
        return _true_places(self.valid, self.total)

    def pad(self, values: Tensor) -> Tensor:
        """(T, ...) -> (B, N, ...). Padding holds values of other samples."""
        if self.uniform:
            return values.unflatten(0, (len(self.lengths), -1))
        return values.index_select(0, self.rows.flatten()).unflatten(0, self.rows.shape)

    def unpad(self, values: Tensor) -> Tensor:
        """(B, N, ...) -> (T, ...)."""
        values = values.flatten(0, 1)
        return values if self.uniform else values.index_select(0, self.places)

    def joined(self, source: "Packed") -> "Packed":
        """Merges neighbouring samples that read the same sample of `source`: attention then sees one query sequence per source."""
        each = len(self.lengths) // len(source.lengths)
        if each == 1 and source.readers is None:
            return self
        ends = list(accumulate(source.readers or [each] * len(source.lengths), initial=0))
        return Packed.of((self.starts[last] - self.starts[first] for first, last in pairwise(ends)), self.device)

    def select(self, x: Tensor, samples: Tensor) -> tuple[Tensor, "Packed"]:
        """Selects samples by number (n,), in that order; duplicates are allowed. Synchronises with the device once."""
        chosen = samples.tolist()
        layout = Packed.of([self.lengths[i] for i in chosen], self.device)
        starts = [self.starts[i] - start for i, start in zip(chosen, layout.starts, strict=False)]
        shift = torch.tensor(starts, device=self.device).repeat_interleave(layout.offsets.diff(), output_size=layout.total)
        return x.index_select(0, shift + torch.arange(layout.total, device=self.device)), layout

    def chunk(self, x: Tensor, parts: int) -> list[tuple[Tensor, "Packed"]]:
        """Splits the batch into `parts` with the same number of samples each."""
        each = len(self.lengths) // parts
        bounds = [(i * each, (i + 1) * each) for i in range(parts)]
        return [(x[self.starts[a] : self.starts[b]], Packed.of(self.lengths[a:b], self.device)) for a, b in bounds]


Layout = Valid | Packed


def class_tokens(x: Tensor, layout: Layout) -> Tensor:
    """Returns the first token of each sample, (B, C)."""
    return x[layout.offsets[:-1]] if isinstance(layout, Packed) else x[:, 0]


def end_first(x: Tensor, end: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Moves the token at `end` (B,) of each text to the front and drops the tokens behind it.

    x (B, L, C) -> (B, M, C) and its mask (B, M), M the tokens of the longest text, or `width`
    """
    places = torch.arange(int(end.max()) + 1 if width is None else width, device=x.device)
    source = torch.where(places == 0, end.unsqueeze(1), places - 1)
    return x.gather(1, source.unsqueeze(-1).expand(-1, -1, x.shape[-1])), places <= end.unsqueeze(1)


def pack(x: Tensor, valid: Valid) -> tuple[Tensor, Packed]:
    """Packs a padded batch: (B, N, ...) and its mask -> (T, ...) and its layout."""
    if valid is None:
        return x.flatten(0, 1), Packed.of([x.shape[1]] * len(x), x.device)
    layout = Packed.of(valid.sum(dim=1).tolist(), x.device)
    return x.flatten(0, 1).index_select(0, _true_places(valid, layout.total)), layout


def padded(x: Tensor, layout: Layout) -> tuple[Tensor, Valid]:
    """Returns tokens (B, N, C) and their mask (B, N), or None where nothing is padding, from either layout."""
    if not isinstance(layout, Packed):
        return x, layout
    return layout.pad(x), None if layout.uniform else layout.valid


def count_tokens(x: Tensor, layout: Layout) -> Tensor:
    """Returns the number of valid tokens of each sample, (B,)."""
    if isinstance(layout, Packed):
        return torch.tensor(layout.lengths)
    return torch.full(x.shape[:1], x.shape[1], device=x.device) if layout is None else layout.sum(dim=1)


def halves(x: Tensor, layout: Layout) -> list[tuple[Tensor, Layout]]:
    """Splits a batch into two of the same number of samples, each with its layout."""
    if isinstance(layout, Packed):
        return [*layout.chunk(x, 2)]
    halved = [None if part is None else part.unflatten(0, (2, -1)).unbind(0) for part in (x, layout)]  # for any batch, unlike chunk
    return list(zip(*((None, None) if half is None else half for half in halved), strict=True))


def select(x: Tensor, layout: Layout, samples: Tensor) -> tuple[Tensor, Layout]:
    """Selects samples by number (n,), in that order; duplicates are allowed."""
    if isinstance(layout, Packed):
        return layout.select(x, samples)
    return x[samples], None if layout is None else layout[samples]


def concatenate(first: tuple[Tensor, Layout], second: tuple[Tensor, Layout]) -> tuple[Tensor, Layout]:
    """Joins the samples of two batches, each given with its layout, into one batch."""
    (one, layout), (other, other_layout) = first, second
    if isinstance(layout, Packed) and isinstance(other_layout, Packed):
        return torch.cat([one, other]), Packed.of(layout.lengths + other_layout.lengths, layout.device)
    if isinstance(layout, Packed) or isinstance(other_layout, Packed):
        raise ValueError("one batch is packed and the other is not")
    if layout is None and other_layout is None and one.shape[1] == other.shape[1]:
        return torch.cat([one, other]), None
    width = max(one.shape[1], other.shape[1])
    tokens, masks = zip(_widen(one, layout, width), _widen(other, other_layout, width), strict=True)
    return torch.cat(tokens), torch.cat(masks)


def _widen(x: Tensor, valid: Valid, width: int) -> tuple[Tensor, Tensor]:
    """Pads x (B, N, C) to `width` tokens and returns it with its mask."""
    valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if valid is None else valid
    more = width - x.shape[1]
    return F.pad(x, (0, 0, 0, more)), F.pad(valid, (0, more))


def _true_places(mask: Tensor, number: int) -> Tensor:
    """Returns the positions where the flattened mask is true.

    With a known `number` of them a GPU need not synchronise, as x[mask] does, and the backward pass of a selection by index is a
    plain scatter.
    """
    return torch.nonzero_static(mask.flatten(), size=number).flatten()


class Groups:
    """Samples of similar length grouped together, so that padding each group costs little.

    layouts: the layout of each group
    """

    def __init__(self, layout: Packed, members: list[list[int]]):
        """
        Args:
            layout: of the whole batch.
            members: sample numbers of each group.
        """
        self._rows = None
        if members == [list(range(len(layout.lengths)))]:
            self.layouts = [layout]  # its cached properties serve the next layer too
            return
        self.layouts = [Packed.of([layout.lengths[i] for i in group], layout.device) for group in members]
        order = [i for group in members for i in group]
        if order != list(range(len(order))):
            places = torch.tensor(order, device=layout.device)
            self._rows = layout.rows[places].flatten().index_select(0, _true_places(layout.valid[places], layout.total))

    def split(self, x: Tensor) -> list[Tensor]:
        """(T, C) -> (G, N, C) for each group, padded."""
        x = x if self._rows is None else x.index_select(0, self._rows)
        parts = x.split([layout.total for layout in self.layouts])
        return [layout.pad(part) for layout, part in zip(self.layouts, parts, strict=True)]

    def join(self, parts: list[Tensor]) -> Tensor:
        """Reverses `split`: (G, N, C) for each group -> (T, C)."""
        x = torch.cat([layout.unpad(part) for layout, part in zip(self.layouts, parts, strict=True)])
        if self._rows is None:
            return x
        back = torch.empty_like(self._rows).scatter_(0, self._rows, torch.arange(len(x), device=x.device))
        return x.index_select(0, back)
