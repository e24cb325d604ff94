"""DTP, dynamic token pruning (paper, Section 3.3): threshold, keep rule, gather and merge. The only copy of it.

Shapes: B batch, N prunable tokens (no class token), C width, K learnable tokens. `valid` is (B, N) bool, False is padding;
padding never enters a softmax, a score, a threshold, a feature or a merged token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from madtp import released
from madtp.alignment import Alignment, Valid, aligned_features, token_attention
from madtp.importance import EPS, AttentionStatistics, class_attention, paper_columns, token_importance

METHODS = ("dtp", "random")
VARIANTS = ("paper", "released")
KEEP_RULES = ("max", "mean", "instance")
TERMS = ("cls", "self", "token")


@dataclass(frozen=True)
class PruningRule:
    """How tokens are chosen. See README, "Settings", for what each choice buys.

    method: "dtp" (the paper) or "random" (the baseline: a fraction T / (1 + T) of the tokens, drawn at random)
    variant: "paper", or "released" for checkpoints of the authors' code
    keep: "max" and "mean" give every sample of a batch one number of tokens, "instance" each sample its own
    terms: the scores that the importance averages, of "cls", "self" and "token"
    merge: whether the pruned tokens leave one token behind, their mean weighted by importance
    """

    method: str = "dtp"
    variant: str = "paper"
    keep: str = "max"
    terms: tuple[str, ...] = ("cls", "self", "token")
    merge: bool = True

    def __post_init__(self):
        for name, allowed in (("method", METHODS), ("variant", VARIANTS), ("keep", KEEP_RULES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not self.terms or not set(self.terms) <= set(TERMS):
            raise ValueError(f"terms must name some of {', '.join(TERMS)}, got {self.terms!r}")
        if self.variant == "released" and (self.keep == "instance" or not self.merge or self.method != "dtp"):
            raise ValueError("variant 'released' knows method 'dtp' with merge and keep 'max' or 'mean' only")


@dataclass(frozen=True)
class PruneSetting:
    """How hard to prune. `temperature` None is off; blocks before `prune_from` stay whole."""

    temperature: float | None = None
    prune_from: int = 0

    def at(self, block: int) -> float | None:
        return self.temperature if block >= self.prune_from else None


OFF = PruneSetting()


def sparsemax(z: Tensor, valid: Valid = None) -> Tensor:
    """Euclidean projection of each row of z onto the probability simplex (Eq. 8; Martins and Astudillo, 2016).

    z: (..., N); valid: broadcastable to z -> (..., N), zero outside `valid`
    """
    if valid is not None:
        z = z.masked_fill(~valid, float("-inf"))
    # With the maximum at 0 nothing at or below -1 can be in the support: -2 stands for padding and keeps the sums finite.
    z = (z - z.amax(dim=-1, keepdim=True)).nan_to_num(nan=-2.0).clamp(min=-2.0)
    ordered = z.sort(dim=-1, descending=True).values
    rank = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    excess = ordered.cumsum(dim=-1) - 1.0
    support = (rank * ordered > excess).sum(dim=-1, keepdim=True).clamp(min=1)
    tau = excess.gather(-1, support - 1) / support
    return (z - tau).clamp(min=0.0)


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
    ):
        """
        Args:
            dim: width C of the block's tokens.
            num_learnable, token_dim: K and D of the learnable tokens.
            mask_follows: which of the authors' mask orders `variant: released` reproduces (see released.released_order).
        """
        super().__init__()
        self.alignment = Alignment(dim, token_dim, projection)
        self.rule, self.dim, self.num_learnable, self.token_dim = rule, dim, num_learnable, token_dim
        self.mask_follows = mask_follows

    @property
    def needs_statistics(self) -> bool:
        return self.rule.method == "dtp"

    def statistics(self, attention: Tensor, head_outputs: Tensor, valid: Valid) -> AttentionStatistics:
        """attention: (B, H, 1 + N, 1 + N) probabilities; head_outputs: (B, H, 1 + N, D); valid: (B, 1 + N), class token first."""
        tokens = attention[:, :, 1:, 1:]
        if self.rule.variant == "released":
            columns = released.released_columns(tokens)
        else:
            columns = paper_columns(tokens, None if valid is None else valid[:, 1:])
        return AttentionStatistics(class_attention(attention[:, :, 0, 1:], head_outputs[:, :, 1:]), columns)

    def align(
        self, inputs: Tensor, valid: Valid, learnable_tokens: Tensor, want_features: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Of the tokens that ENTER the block (B, 1 + N, C): raw products (B, K, N), and E_v (B, K, D) where it is wanted."""
        products, mapped = self.alignment(inputs[:, 1:], learnable_tokens)
        if not want_features:
            return products, None
        inside = None if valid is None or self.rule.variant == "released" else valid[:, 1:]
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
        return importance, best_tokens(importance, keep_counts(wanted, valid.sum(dim=1), self.rule.keep), valid)

    def prune(
        self, x: Tensor, valid: Valid, products: Tensor | None, statistics: AttentionStatistics | None, temperature: float
    ) -> tuple[Tensor, Valid, Tensor]:
        """x (B, 1 + N, C) after self-attention -> x (B, 1 + M, C), valid (B, 1 + M), kept (B, N) bool."""
        if self.rule.variant == "released":
            return self._prune_released(x, valid, products, statistics, temperature)
        inside = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)[:, 1:] if valid is None else valid[:, 1:]
        importance, kept = self.choose(products, statistics, inside, temperature)
        tokens, tokens_valid = gather_and_merge(x[:, 1:], inside, importance, kept, self.rule.merge)
        return torch.cat([x[:, :1], tokens], dim=1), torch.cat([inside.new_ones(len(x), 1), tokens_valid], dim=1), kept

    def _prune_released(self, x: Tensor, valid: Valid, products: Tensor, statistics: AttentionStatistics, temperature: float):
        with torch.no_grad():
            importance = released.released_importance(statistics, products, self.rule.terms)
            theta = released.released_threshold(products, importance, temperature)
            counts = (importance > theta.unsqueeze(1)).sum(dim=1)
            count = int(keep_counts(counts, torch.full_like(counts, importance.shape[1]), self.rule.keep)[0])
            kept = best_tokens(importance, torch.full_like(counts, count))
        if count == importance.shape[1]:
            return x, valid, kept
        return released_gather(x, valid, importance, kept, count, self.mask_follows) + (kept,)

    def flops(self, entering: Tensor, active: bool, training: bool) -> Tensor:
        """Multiply-adds that pruning adds to a block which (B,) tokens enter, class token included.

        `training` adds the alignment features E_v, which only L_sim needs.
        """
        tokens = entering - 1
        total = torch.zeros_like(tokens)
        uses_products = training or (active and self.rule.method == "dtp")
        if uses_products:
            total = total + self.alignment.flops(tokens, self.num_learnable)
        if training:
            total = total + tokens * self.num_learnable * self.token_dim
        if active and self.rule.method == "dtp":
            total = total + tokens * self.num_learnable  # theta
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
