"""DTP, dynamic token pruning (paper, Section 3.3): threshold, keep rule, gather and merge. The only copy of it.

Shapes: B batch, N prunable tokens (no class token), C width, K learnable tokens. `valid` is (B, N) bool, False is padding;
padding never enters a softmax, a score, a threshold, a feature or a merged token.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from madtp import flops, released
from madtp.alignment import Alignment, Valid, aligned_features, token_attention
from madtp.attention.chunked import attend_in_chunks, class_row, column_statistics
from madtp.importance import EPS, AttentionStatistics, class_attention, paper_columns, token_importance
from madtp.packing import Packed

METHODS = ("dtp", "random")
VARIANTS = ("paper", "released")
KEEP_RULES = ("max", "mean", "instance")
TERMS = ("cls", "self", "token")

Layout = Valid | Packed  # how a batch lies in memory: padded with a mask, padded without padding (None), or packed


@dataclass(frozen=True)
class PruningRule:
    """How tokens are chosen. See README, "Settings", for what each choice buys.

    method: "dtp" (the paper) or "random" (the baseline: a fraction T / (1 + T) of the tokens, drawn at random)
    variant: "paper", or "released" for checkpoints of the authors' code
    keep: "max" and "mean" give every sample of a batch one number of tokens, "instance" each sample its own
    terms: the scores that the importance averages, of "cls", "self" and "token"
    merge: whether the pruned tokens leave one token behind, their mean weighted by importance
    share: keep the best tokens up to this share instead of those above the threshold, which is computed and left aside: so that
        methods can be compared at an imposed cost
    """

    method: str = "dtp"
    variant: str = "paper"
    keep: str = "max"
    terms: tuple[str, ...] = ("cls", "self", "token")
    merge: bool = True
    share: float | None = None

    def __post_init__(self):
        for name, allowed in (("method", METHODS), ("variant", VARIANTS), ("keep", KEEP_RULES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not self.terms or not set(self.terms) <= set(TERMS):
            raise ValueError(f"terms must name some of {', '.join(TERMS)}, got {self.terms!r}")
        if self.variant == "released" and (self.keep == "instance" or not self.merge or self.method != "dtp"):
            raise ValueError("variant 'released' knows method 'dtp' with merge and keep 'max' or 'mean' only")
        if self.share is not None and (self.method != "dtp" or self.variant != "paper" or not 0 < self.share <= 1):
            raise ValueError("share is a number above 0 up to 1, for method 'dtp' of variant 'paper'")


@dataclass(frozen=True)
class PruneSetting:
    """How hard to prune. `temperature` None is off; blocks before `prune_from` stay whole."""

    temperature: float | None = None
    prune_from: int = 0

    def at(self, block: int) -> float | None:
        return self.temperature if block >= self.prune_from else None


OFF = PruneSetting()


class Execution(NamedTuple):
    """What a block ran of its pruner, for the count of its multiply-adds.

    active: whether it pruned
    training: whether it collected the alignment features E_v, which only L_sim needs
    packed: whether class tokens lie among the others, so that they are aligned too
    scored_again: whether the scores cost a second Q K^T, because fused attention showed no map
    """

    active: bool
    training: bool
    packed: bool = False
    scored_again: bool = False


def sparsemax(z: Tensor, valid: Valid = None) -> Tensor:
    """Euclidean projection of each row of z onto the probability simplex (Eq. 8; Martins and Astudillo, 2016).

    z: (..., N); valid: broadcastable to z -> (..., N), zero outside `valid` (a row without valid entries means nothing)
    """
    if valid is not None:
        z = z.masked_fill(~valid, float("-inf"))
    # With the maximum at 0 nothing at or below -1 can be in the support: -2 stands for padding and keeps the sums finite.
    z = (z - z.amax(dim=-1, keepdim=True)).nan_to_num(nan=-2.0).clamp(min=-2.0)
    return (z - (_tau_by_newton(z) if z.device.type == "cpu" else _tau_by_sorting(z))).clamp(min=0.0)


def _tau_by_sorting(z: Tensor) -> Tensor:
    """The tau at which max(z - tau, 0) sums to 1, (..., 1). No look at the values: a GPU need not wait."""
    ordered = z.sort(dim=-1, descending=True).values
    rank = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    excess = ordered.cumsum(dim=-1) - 1.0
    support = (rank * ordered > excess).sum(dim=-1, keepdim=True).clamp(min=1)
    return excess.gather(-1, support - 1) / support


def _tau_by_newton(z: Tensor) -> Tensor:
    """The same from below: the sum is convex and piecewise linear in tau, so Newton's steps end exactly (Michelot, 1986)."""
    tau = torch.full_like(z[..., :1], -1.0)  # the maximum is 0, so the sum is at least 1 here
    size = None
    while True:
        support = z > tau
        now = support.sum(dim=-1, keepdim=True)
        if size is not None and torch.equal(now, size):
            return tau
        size = now
        # Rounding may step back, and so to and fro for ever: tau only rises, the support only shrinks.
        tau = torch.maximum(tau, ((z * support).sum(dim=-1, keepdim=True) - 1.0) / size)


def threshold(attention: Tensor, importance: Tensor, temperature: float, valid: Valid = None) -> Tensor:
    """theta = min over the K rows of sparsemax(T A_token) TIS (Eq. 7, 9). (B, K, N), (B, N) -> (B,)."""
    sparse = sparsemax(temperature * attention, None if valid is None else valid.unsqueeze(1))
    return (sparse @ importance.unsqueeze(-1)).squeeze(-1).amin(dim=1)


def keep_counts(wanted: Tensor, available: Tensor, keep: str, min_keep: int = 0) -> Tensor:
    """How many tokens each sample keeps. (B,) wanted by each, (B,) available -> (B,).

    A sample stays whole when fewer than two of its tokens would go, or when no more than `min_keep` would stay.
    """
    if keep == "max":
        wanted = wanted.amax().expand_as(wanted)
    elif keep == "mean":
        wanted = wanted.float().mean().round().to(wanted.dtype).expand_as(wanted)
    whole = (wanted <= min_keep) | (available - wanted < 2)
    return torch.where(whole, available, wanted)


def best_tokens(importance: Tensor, counts: Tensor, valid: Valid = None) -> Tensor:
    """The `counts` best tokens of each sample; of equals the earlier one. (B, N), (B,) -> (B, N) bool."""
    if valid is not None:
        importance = importance.masked_fill(~valid, float("-inf"))
    order = importance.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    return rank < counts.unsqueeze(1)


def merge_weights(importance: Tensor, pruned: Tensor) -> Tensor:
    """Importance of the pruned tokens over its sum. (B, N), (B, N) bool -> (B, N), zero for the others."""
    weight = importance.masked_fill(~pruned, 0.0)
    return weight / (weight.sum(dim=-1, keepdim=True) + EPS)


def gather_and_merge(x: Tensor, valid: Valid, importance: Tensor, kept: Tensor, merge: bool) -> tuple[Tensor, Valid]:
    """Kept tokens in their order, then the merged one, then padding. Tokens and mask move together.

    x: (B, N, C); kept: (B, N) bool, valid tokens only -> (B, M, C) and (B, M), M the largest number of tokens of a sample
    """
    available = torch.ones_like(kept) if valid is None else valid
    pruned = available & ~kept
    merged = pruned.any(dim=1) if merge else torch.zeros_like(kept[:, 0])
    counts = kept.sum(dim=1)
    lengths = counts + merged
    width = int(lengths.max())
    order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    out = x.gather(1, order.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    position = torch.arange(width, device=x.device)
    if merge:
        token = merge_weights(importance, pruned).to(x.dtype).unsqueeze(1) @ x  # (B, 1, C)
        here = (position == counts.unsqueeze(1)) & merged.unsqueeze(1)
        out = torch.where(here.unsqueeze(-1), token, out)
    inside = position < lengths.unsqueeze(1)
    return out, inside


def packed_gather_and_merge(x: Tensor, layout: Packed, importance: Tensor, kept: Tensor, merge: bool) -> tuple[Tensor, Packed]:
    """The same for packed tokens, class tokens included: x (T, C) -> (T', C), T' known after one look at the counts.

    importance, kept: (B, N)
    """
    tokens = layout.valid[:, 1:]
    pruned = tokens & ~kept
    merged = pruned.any(dim=1, keepdim=True) if merge else torch.zeros_like(kept[:, :1])
    stay = torch.cat([torch.ones_like(merged), kept, merged], dim=1)  # (B, 1 + N + 1): the class token first, the merged one last
    after = Packed.of(stay.sum(dim=1).tolist(), x.device)
    source = torch.cat([layout.rows, layout.rows[:, :1]], dim=1)
    places = torch.nonzero_static(stay.flatten(), size=after.total).flatten()  # of known size: a GPU need not wait again
    out = x.index_select(0, source.flatten().index_select(0, places))
    if merge:
        token = merge_weights(importance, pruned).to(x.dtype).unsqueeze(1) @ layout.pad(x)[:, 1:]
        last = after.offsets[1:].long() - 1
        out[last] = torch.where(merged, token.squeeze(1), out[last])
    return out, after


class TokenPruner(nn.Module):
    """The slot of a transformer block: MAG and DTP between self-attention and what follows it."""

    def __init__(
        self,
        dim: int,
        num_learnable: int,
        token_dim: int,
        rule: PruningRule,
        projection: str = "auto",
        mask_follows: bool = False,
        min_keep: int = 0,
    ):
        """
        Args:
            dim: width C of the block's tokens.
            num_learnable, token_dim: K and D of the learnable tokens.
            mask_follows: which of the authors' mask orders `variant: released` reproduces (see released.released_order).
            min_keep: `variant: released` prunes nothing where it would keep no more than so many tokens.
        """
        super().__init__()
        self.alignment = Alignment(dim, token_dim, projection)
        self.rule, self.dim, self.num_learnable, self.token_dim = rule, dim, num_learnable, token_dim
        self.mask_follows, self.min_keep = mask_follows, min_keep

    @property
    def needs_scores(self) -> bool:
        """Whether it looks at the tokens at all; a random choice does not."""
        return self.rule.method == "dtp"

    def statistics(self, attention: Tensor, head_outputs: Tensor, valid: Valid) -> AttentionStatistics:
        """attention: (B, H, 1 + N, 1 + N) probabilities; head_outputs: (B, H, 1 + N, D); valid: (B, 1 + N), class token first."""
        tokens = attention[:, :, 1:, 1:]
        if self.rule.variant == "released":
            columns = released.released_columns(tokens)
        else:
            columns = paper_columns(tokens, None if valid is None else valid[:, 1:])
        return AttentionStatistics(class_attention(attention[:, :, 0, 1:], head_outputs[:, :, 1:]), columns)

    @torch.no_grad()
    def attend(self, query: Tensor, key: Tensor, value: Tensor, valid: Valid) -> tuple[Tensor, AttentionStatistics]:
        """Attention and its statistics, no map held. Thrice (B, H, 1 + N, D), (B, 1 + N) -> (B, H, 1 + N, D), statistics."""
        out, row, columns = attend_in_chunks(query, key, value, valid)
        return out, AttentionStatistics(class_attention(row, out[:, :, 1:]), columns)

    @torch.no_grad()
    def packed_statistics(
        self, query: Tensor, key: Tensor, head_outputs: Tensor, log_norm: Tensor, layout: Packed
    ) -> AttentionStatistics:
        """The same of packed tokens on a GPU: queries, keys and outputs (T, H, D), log_norm (T, H). In full precision: what is
        left of a product of 16 bits after its norm is subtracted is mostly rounding."""
        with torch.autocast(query.device.type, enabled=False):
            return self._packed_statistics(query, key, head_outputs, log_norm, layout)

    def _packed_statistics(
        self, query: Tensor, key: Tensor, head_outputs: Tensor, log_norm: Tensor, layout: Packed
    ) -> AttentionStatistics:
        importance, columns = None, None
        queries, keys, outputs, norms = (layout.pad(part).transpose(1, 2) for part in (query, key, head_outputs, log_norm))
        if "cls" in self.rule.terms:
            importance = class_attention(class_row(queries, keys, norms), outputs[:, :, 1:])
        if "self" in self.rule.terms:
            try:
                from madtp.attention.triton import packed_column_statistics
            except ImportError:  # no Triton
                columns = column_statistics(queries, keys, norms, layout.valid)
            else:
                columns = packed_column_statistics(query, key, log_norm, layout)
        return AttentionStatistics(importance, columns)

    def align(
        self, inputs: Tensor, layout: Layout, learnable_tokens: Tensor, want_features: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Of the tokens that ENTER the block: raw products (B, K, N), and E_v (B, K, D) where it is wanted; else None.

        inputs: (B, 1 + N, C), or packed (T, C)
        """
        if not (self.needs_scores or want_features):
            return None, None
        if isinstance(layout, Packed):
            products, mapped = self.alignment(inputs, learnable_tokens)  # the class tokens' cost little and are dropped
            products = layout.pad(products.t())[:, 1:].transpose(1, 2)
            mapped = layout.pad(mapped)[:, 1:] if want_features else None
            layout = layout.valid
        else:
            products, mapped = self.alignment(inputs[:, 1:], learnable_tokens)
        if not want_features:
            return products, None
        inside = None if layout is None or self.rule.variant == "released" else layout[:, 1:]
        return products, aligned_features(token_attention(products, self.token_dim, inside), mapped)

    @torch.no_grad()
    def choose(
        self, products: Tensor | None, statistics: AttentionStatistics | None, valid: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Importance (B, N) and the tokens to keep (B, N) bool. No gradient: it would reach the scores by the merge alone."""
        if self.rule.method == "random":
            importance = torch.rand(valid.shape, device=valid.device).masked_fill(~valid, 0.0)
            available = valid.sum(dim=1)
            wanted = (available * (temperature / (1.0 + temperature))).round().long()
            return importance, best_tokens(importance, keep_counts(wanted, available, self.rule.keep), valid)
        attention = token_attention(products, self.token_dim, valid)
        importance = token_importance(statistics, attention, self.rule.terms, valid)
        theta = threshold(attention, importance, temperature, valid)
        wanted = ((importance > theta.unsqueeze(1)) & valid).sum(dim=1)
        if self.rule.share is not None:
            wanted = (valid.sum(dim=1) * self.rule.share).round().long()
        return importance, best_tokens(importance, keep_counts(wanted, valid.sum(dim=1), self.rule.keep), valid)

    def prune(
        self, x: Tensor, layout: Layout, products: Tensor | None, statistics: AttentionStatistics | None, temperature: float
    ) -> tuple[Tensor, Layout, Tensor]:
        """x after self-attention, (B, 1 + N, C) or packed -> the fewer tokens, where they lie, kept (B, N) bool.

        In the precision of what it is given: rounded to 16 bits, a threshold would part tokens at random.
        """
        with torch.autocast(x.device.type, enabled=False):
            return self._prune(x, layout, products, statistics, temperature)

    def _prune(
        self, x: Tensor, layout: Layout, products: Tensor | None, statistics: AttentionStatistics | None, temperature: float
    ) -> tuple[Tensor, Layout, Tensor]:
        if self.rule.variant == "released":
            return self._prune_released(x, layout, products, statistics, temperature)
        if isinstance(layout, Packed):
            importance, kept = self.choose(products, statistics, layout.valid[:, 1:], temperature)
            return *packed_gather_and_merge(x, layout, importance, kept, self.rule.merge), kept
        inside = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)[:, 1:] if layout is None else layout[:, 1:]
        importance, kept = self.choose(products, statistics, inside, temperature)
        tokens, tokens_valid = gather_and_merge(x[:, 1:], inside, importance, kept, self.rule.merge)
        return torch.cat([x[:, :1], tokens], dim=1), torch.cat([inside.new_ones(len(x), 1), tokens_valid], dim=1), kept

    def _prune_released(self, x: Tensor, valid: Valid, products: Tensor, statistics: AttentionStatistics, temperature: float):
        with torch.no_grad():
            importance = released.released_importance(statistics, products, self.rule.terms)
            theta = released.released_threshold(products, importance, temperature)
            counts = (importance > theta.unsqueeze(1)).sum(dim=1)
            count = int(keep_counts(counts, torch.full_like(counts, importance.shape[1]), self.rule.keep, self.min_keep)[0])
            kept = best_tokens(importance, torch.full_like(counts, count))
        if count == importance.shape[1]:
            return x, valid, kept
        return released_gather(x, valid, importance, kept, count, self.mask_follows) + (kept,)

    def flops(self, entering: Tensor, ran: Execution) -> Tensor:
        """Multiply-adds that pruning adds to a block which (B,) tokens enter, class token included."""
        tokens, active, training = entering - 1, ran.active, ran.training
        scored = active and self.needs_scores
        total = torch.zeros_like(tokens)
        if training or scored:
            total = total + self.alignment.flops(entering if ran.packed else tokens, self.num_learnable)
        if training:
            total = total + tokens * self.num_learnable * self.token_dim
        if scored:
            total = total + tokens * self.num_learnable  # theta
        if scored and ran.scored_again:
            queries = tokens * ("self" in self.rule.terms) + ("cls" in self.rule.terms)
            total = total + flops.scores(queries, tokens, self.dim)
        if active and self.rule.merge:
            total = total + tokens * self.dim
        return total


def released_gather(
    x: Tensor, valid: Valid, importance: Tensor, kept: Tensor, count: int, mask_follows: bool
) -> tuple[Tensor, Valid]:
    """The authors' gather: x (B, 1 + N, C), every sample keeps `count` -> x (B, 2 + count, C) and its mask."""
    tokens_from, mask_from = released.released_order(importance, count, mask_follows)
    tokens = x[:, 1:]
    out = tokens.gather(1, tokens_from.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    merged = merge_weights(importance, ~kept).to(x.dtype).unsqueeze(1) @ tokens
    if valid is not None:
        valid = torch.cat([valid[:, :1], valid[:, 1:].gather(1, mask_from)], dim=1)
    return torch.cat([x[:, :1], out, merged], dim=1), valid
