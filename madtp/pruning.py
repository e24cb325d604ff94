"""DTP, dynamic token pruning (paper, Section 3.3): the rule, how hard it prunes, and the pruner of a transformer block.

B batch, N prunable tokens, P prefix tokens in front of them that are never pruned, C channels, K learnable tokens, D their
channels, T tokens of a packed batch.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from madtp import flops, released
from madtp.alignment import Alignment, aligned_features, token_attention
from madtp.importance import AttentionStatistics, token_importance
from madtp.packing import Layout, Packed, Valid
from madtp.selection import best_tokens, gather_and_merge, keep_counts, packed_gather_and_merge, threshold

METHODS = ("dtp", "random")
VARIANTS = ("paper", "released")
KEEP_RULES = ("max", "mean", "instance")
TERMS = ("cls", "self", "token")


@dataclass(frozen=True)
class PruningRule:
    """The rule by which tokens are selected. docs/settings.md describes the effect of each choice.

    method: "dtp" (the paper) or "random" (the baseline: a fraction T / (1 + T) of the tokens stays, drawn at random)
    variant: "paper", or "released" for checkpoints of the authors' code
    keep: "max" and "mean" give every sample of a batch the same number of tokens, "instance" each sample its own
    terms: the scores that the importance averages, of "cls", "self" and "token"
    merge: replace the pruned tokens by one token, their mean weighted by importance
    share: keep this share of the tokens, the best ones, instead of those above the threshold; the threshold is computed all the
        same, so that methods can be compared at an imposed cost
    num_prefix_tokens: tokens in front that are never pruned, such as a class token and registers. The first is the class token.
        With 0 there is none, and S_cls is left out of the importance: the mean is over the other terms.
    """

    method: str = "dtp"
    variant: str = "paper"
    keep: str = "max"
    terms: tuple[str, ...] = TERMS
    merge: bool = True
    share: float | None = None
    num_prefix_tokens: int = 1

    def __post_init__(self):
        for name, allowed in (("method", METHODS), ("variant", VARIANTS), ("keep", KEEP_RULES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not self.terms or not set(self.terms) <= set(TERMS):
            raise ValueError(f"terms must name some of {', '.join(TERMS)}, got {self.terms!r}")
        if self.num_prefix_tokens < 0 or not self.scores:
            raise ValueError(f"terms {self.terms!r} need a class token, and num_prefix_tokens is {self.num_prefix_tokens}")
        if self.variant == "released" and (self.keep == "instance" or not self.merge or self.method != "dtp"):
            raise ValueError("variant 'released' knows method 'dtp' with merge and keep 'max' or 'mean' only")
        if self.variant == "released" and self.num_prefix_tokens != 1:
            raise ValueError("variant 'released' knows one prefix token only")
        if self.share is not None and (self.method != "dtp" or self.variant != "paper" or not 0 < self.share <= 1):
            raise ValueError("share is a number above 0 up to 1, for method 'dtp' of variant 'paper'")

    @property
    def scores(self) -> tuple[str, ...]:
        """The terms that the importance averages: without a class token there is no S_cls."""
        return self.terms if self.num_prefix_tokens else tuple(term for term in self.terms if term != "cls")

    @property
    def needs_scores(self) -> bool:
        """False for a random choice, which does not depend on the tokens."""
        return self.method == "dtp"


@dataclass(frozen=True)
class PruneSetting:
    """The strength of pruning. A `temperature` of None is off; blocks before `prune_from` stay whole."""

    temperature: float | None = None
    prune_from: int = 0

    def at(self, block: int) -> float | None:
        """Returns the temperature of a block, None where it does not prune."""
        return self.temperature if block >= self.prune_from else None


OFF = PruneSetting()


class Execution(NamedTuple):
    """The parts of its pruner that a block executed, for counting their multiply-adds.

    active: it pruned
    aligned: it collected the alignment features E_v, which only L_sim needs
    packed: prefix tokens were aligned too, because they lie among the others
    recomputed: the scores cost a second Q K^T, because fused attention returned no map
    """

    active: bool
    aligned: bool = False
    packed: bool = False
    recomputed: bool = False


class TokenPruner(nn.Module):
    """MAG and DTP of one transformer block, between self-attention and the layers that follow it."""

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
            dim: C of the block's tokens.
            num_learnable, token_dim: K and D of the learnable tokens.
            projection: of the tokens before alignment, see `Alignment`.
            mask_follows: the mask order that `variant: released` reproduces (see released.released_order).
            min_keep: `variant: released` prunes nothing where it would keep no more than this many tokens.
        """
        super().__init__()
        self.alignment = Alignment(dim, token_dim, projection)
        self.rule, self.dim, self.num_learnable, self.token_dim = rule, dim, num_learnable, token_dim
        self.mask_follows, self.min_keep = mask_follows, min_keep

    def align(
        self, inputs: Tensor, layout: Layout, learnable_tokens: Tensor | None, features: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Aligns the tokens that ENTER the block with the learnable tokens (Eq. 1-3).

        Args:
            inputs: (B, P + N, C), or packed (T, C).
            learnable_tokens: (K, D).
            features: collect E_v.
        Returns:
            A_token (B, K, N), or for `variant: released` the inner products; E_v (B, K, D). None where not needed.
        """
        if not (self.rule.needs_scores or features):
            return None, None
        if learnable_tokens is None:
            raise ValueError("pruning and alignment need learnable tokens; put them into the guidance")
        prefix, released_rule = self.rule.num_prefix_tokens, self.rule.variant == "released"
        if isinstance(layout, Packed):
            products, mapped = self.alignment(inputs, learnable_tokens)  # prefix tokens too: cheap, and dropped
            products = layout.pad(products.t())[:, prefix:].transpose(1, 2)
            mapped = layout.pad(mapped)[:, prefix:] if features else mapped
            valid: Valid = layout.valid[:, prefix:]
        else:
            products, mapped = self.alignment(inputs[:, prefix:], learnable_tokens)
            valid = None if layout is None or released_rule else layout[:, prefix:]
        attention = token_attention(products, self.token_dim, valid)
        scores = products if released_rule else attention
        return scores, aligned_features(attention, mapped) if features else None

    @torch.no_grad()
    def choose(
        self, attention: Tensor | None, statistics: AttentionStatistics | None, valid: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Returns the importance (B, N) and the tokens to keep (B, N) bool (Eq. 4-10).

        Without gradients: they would reach the scores through the merge alone.

        Args:
            attention: (B, K, N) A_token; None for a random choice, as are the statistics.
            valid: (B, N).
        """
        if self.rule.method == "random":
            importance = torch.rand(valid.shape, device=valid.device).masked_fill(~valid, 0.0)
            available = valid.sum(dim=1)
            wanted = (available * (temperature / (1.0 + temperature))).round().long()
            return importance, best_tokens(importance, keep_counts(wanted, available, self.rule.keep), valid)
        if attention is None or statistics is None:
            raise ValueError("method 'dtp' needs the scores of the tokens")
        importance = token_importance(statistics, attention, self.rule.scores, valid)
        theta = threshold(attention, importance, temperature, valid)
        wanted = ((importance > theta.unsqueeze(1)) & valid).sum(dim=1)
        if self.rule.share is not None:
            wanted = (valid.sum(dim=1) * self.rule.share).round().long()
        return importance, best_tokens(importance, keep_counts(wanted, valid.sum(dim=1), self.rule.keep), valid)

    def prune(
        self, x: Tensor, layout: Layout, scores: Tensor | None, statistics: AttentionStatistics | None, temperature: float
    ) -> tuple[Tensor, Layout, Tensor]:
        """Prunes the tokens after self-attention.

        Decisions are made in the precision of the inputs: rounded to 16 bits, a threshold would separate tokens at random.

        Args:
            x: (B, P + N, C), or packed (T, C).
            scores: from `align`.
        Returns:
            The remaining tokens, their layout, and kept (B, N) bool.
        """
        with torch.autocast(x.device.type, enabled=False):
            return self._prune(x, layout, scores, statistics, temperature)

    def _prune(
        self, x: Tensor, layout: Layout, scores: Tensor | None, statistics: AttentionStatistics | None, temperature: float
    ) -> tuple[Tensor, Layout, Tensor]:
        prefix = self.rule.num_prefix_tokens
        if isinstance(layout, Packed):
            importance, kept = self.choose(scores, statistics, layout.valid[:, prefix:], temperature)
            return *packed_gather_and_merge(x, layout, importance, kept, self.rule.merge, prefix), kept
        if self.rule.variant == "released":
            return self._prune_released(x, layout, scores, statistics, temperature)
        valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if layout is None else layout
        importance, kept = self.choose(scores, statistics, valid[:, prefix:], temperature)
        tokens, tokens_valid = gather_and_merge(x[:, prefix:], valid[:, prefix:], importance, kept, self.rule.merge)
        return torch.cat([x[:, :prefix], tokens], dim=1), torch.cat([valid[:, :prefix], tokens_valid], dim=1), kept

    def _prune_released(
        self, x: Tensor, valid: Valid, products: Tensor | None, statistics: AttentionStatistics | None, temperature: float
    ) -> tuple[Tensor, Valid, Tensor]:
        if products is None or statistics is None:
            raise ValueError("method 'dtp' needs the scores of the tokens")
        with torch.no_grad():
            importance = released.released_importance(statistics, products, self.rule.scores)
            theta = released.released_threshold(products, importance, temperature)
            counts = (importance > theta.unsqueeze(1)).sum(dim=1)
            count = int(keep_counts(counts, torch.full_like(counts, importance.shape[1]), self.rule.keep, self.min_keep)[0])
            kept = best_tokens(importance, torch.full_like(counts, count))
        if count == importance.shape[1]:
            return x, valid, kept
        return released.released_gather(x, valid, importance, kept, count, self.mask_follows) + (kept,)

    def flops(self, entering: Tensor, execution: Execution) -> Tensor:
        """Counts the multiply-adds that pruning adds to a block which (B,) tokens enter, prefix tokens included."""
        tokens = entering - self.rule.num_prefix_tokens
        scored = execution.active and self.rule.needs_scores
        total = torch.zeros_like(tokens)
        if execution.aligned or scored:
            total = total + self.alignment.flops(entering if execution.packed else tokens, self.num_learnable)
        if execution.aligned:
            total = total + tokens * self.num_learnable * self.token_dim
        if scored:
            total = total + tokens * self.num_learnable  # theta
        if scored and execution.recomputed:
            queries = tokens * ("self" in self.rule.scores) + ("cls" in self.rule.scores)
            total = total + flops.scores(queries, tokens, self.dim)
        if execution.active and self.rule.merge:
            total = total + tokens * self.dim
        return total
