"""DTP, dynamic token pruning (paper, Section 3.3): the pruner of a transformer block.

B batch, N prunable tokens, P prefix tokens in front of them that are never pruned, C channels, K learnable tokens, D their
channels, T tokens of a packed batch.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madtp import flops, released
from madtp.alignment import Alignment, aligned_features, token_attention
from madtp.importance import AttentionStatistics, token_importance
from madtp.merging import matching_flops, merge_pairs, most_similar_pairs
from madtp.packing import Layout, Packed, Valid, pack
from madtp.rule import PruningRule
from madtp.selection import (
    best_tokens,
    decision_gate,
    fixed_gather_and_merge,
    gather_and_merge,
    keep_counts,
    packed_gather_and_merge,
    threshold,
)

WHOLE = 2**31 - 1  # as `TokenPruner.fixed`: more tokens than there are, so that the block does not prune


class Execution(NamedTuple):
    """The parts of its pruner that a block executed, for counting their multiply-adds.

    active: it pruned
    aligned: it collected the alignment features E_v, which only L_sim needs
    packed: prefix tokens were aligned too, because they lie among the others
    recomputed: the scores cost a second Q K^T, because fused attention returned no map
    key_dim: channels of a head's key, of which similar tokens are recognised
    """

    active: bool
    aligned: bool = False
    packed: bool = False
    recomputed: bool = False
    key_dim: int = 0


class Choice(NamedTuple):
    """The tokens that a pruner keeps of a batch.

    importance: (B, N)
    kept: (B, N) bool
    gate: (B, N) factors of the tokens, all 1, that carry the gradient of the decisions; None where there is none
    """

    importance: Tensor
    kept: Tensor
    gate: Tensor | None = None


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
        self.alignment = Alignment(dim, token_dim, projection) if rule.mag and not rule.needs_keys else None
        self.rule, self.dim, self.num_learnable, self.token_dim = rule, dim, num_learnable, token_dim
        self.mask_follows, self.min_keep = mask_follows, min_keep
        self.fixed: int | None = None  # tokens to keep of every sample, instead of those above a threshold (see deploy.py)

    def align(
        self, inputs: Tensor, layout: Layout, learnable_tokens: Tensor | None, features: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Aligns the tokens that ENTER the block with the learnable tokens (Eq. 1-3).

        Args:
            inputs: (B, P + N, C), or packed (T, C).
            learnable_tokens: (K, D), or each sample its own, (B, K, D).
            features: collect E_v.
        Returns:
            A_token (B, K, N), or for `variant: released` the inner products; E_v (B, K, D). None where not needed.
        """
        if self.alignment is None or not (self.rule.reads_learnable_tokens or features):
            return None, None
        if learnable_tokens is None:
            raise ValueError("pruning and alignment need learnable tokens; put them into the guidance")
        prefix, released_rule = self.rule.num_prefix_tokens, self.rule.variant == "released"
        if isinstance(layout, Packed):  # prefix tokens too: cheap, and dropped
            if learnable_tokens.dim() == 2:
                products, mapped = self.alignment(inputs, learnable_tokens)
                products = layout.pad(products.t()).transpose(1, 2)
                mapped = layout.pad(mapped) if features else None
            else:
                products, mapped = self.alignment(layout.pad(inputs), learnable_tokens)
            products = products[:, :, prefix:]
            mapped = mapped[:, prefix:] if features else None
            valid: Valid = layout.valid[:, prefix:]
        else:
            products, mapped = self.alignment(inputs[:, prefix:], learnable_tokens)
            valid = None if layout is None or released_rule else layout[:, prefix:]
        attention = token_attention(products, self.token_dim, valid)
        scores = products if released_rule else attention
        return scores, aligned_features(attention, mapped) if features else None

    def choose(
        self,
        attention: Tensor | None,
        statistics: AttentionStatistics | None,
        valid: Tensor,
        temperature: float,
        relaxation: float = 1.0,
        removed: Tensor | None = None,
    ) -> Choice:
        """Scores the tokens and chooses those to keep (Eq. 4-10), with the gradients that the rule asks for.

        Args:
            attention: (B, K, N) A_token; None where no decision depends on it.
            statistics: None for a random choice.
            valid: (B, N).
            relaxation: see `decision_gate`.
            removed: (B,) number of tokens that a static method removes.
        """
        if self.rule.method == "random":
            importance = torch.rand(valid.shape, device=valid.device).masked_fill(~valid, 0.0)
            available = valid.sum(dim=1)
            wanted = (available * (temperature / (1.0 + temperature))).round().long()
            return Choice(importance, best_tokens(importance, keep_counts(wanted, available, self.rule.keep), valid))
        if statistics is None:
            raise ValueError(f"method {self.rule.method!r} needs the scores of the tokens")
        with self._tracing():
            importance = token_importance(statistics, attention, self.rule.scores, valid)
        if self.rule.is_static:
            return Choice(importance, best_tokens(importance.detach(), self._static_counts(valid, removed), valid))
        if attention is None:
            attention = -importance.unsqueeze(1)
        decides = self.rule.gradient == "decision" and importance.requires_grad
        with torch.set_grad_enabled(decides):
            theta = threshold(attention, importance, temperature, valid)
        wanted = ((importance > theta.unsqueeze(1)) & valid).sum(dim=1)
        if self.rule.share is not None:
            wanted = (valid.sum(dim=1) * self.rule.share).round().long()
        kept = best_tokens(importance.detach(), keep_counts(wanted, valid.sum(dim=1), self.rule.keep), valid)
        return Choice(importance, kept, decision_gate(importance, theta, kept, valid, relaxation) if decides else None)

    def _static_counts(self, valid: Tensor, removed: Tensor | None) -> Tensor:
        """Returns the number of tokens to keep of each sample, (B,), at least one. A merged token takes one token's place."""
        if removed is None:
            raise ValueError(f"method {self.rule.method!r} needs the number of tokens to remove")
        removed = removed.to(valid.device)
        merged = (removed > 0).long() if self.rule.merge else 0
        return (valid.sum(dim=1) - removed - merged).clamp(min=1)

    def _tracing(self) -> torch.set_grad_enabled:
        """Records gradients of the importance where the rule asks for them and the pass is differentiated at all."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and self.rule.gradient != "none")

    def prune(
        self,
        x: Tensor,
        layout: Layout,
        scores: Tensor | None,
        statistics: AttentionStatistics | None,
        temperature: float,
        relaxation: float = 1.0,
        removed: Tensor | None = None,
    ) -> tuple[Tensor, Layout, Tensor]:
        """Prunes the tokens after self-attention.

        Decisions are made in the precision of the inputs: rounded to 16 bits, a threshold would separate tokens at random.

        Args:
            x: (B, P + N, C), or packed (T, C).
            scores: from `align`.
            relaxation: see `decision_gate`.
            removed: (B,) number of tokens that a static method removes.
        Returns:
            The remaining tokens, their layout, and kept (B, N) bool.
        """
        with torch.autocast(x.device.type, enabled=False):
            if self.rule.needs_keys:
                return self._merge_similar(x, layout, statistics, removed)
            if self.fixed is not None:
                return self._prune_fixed(x, layout, scores, statistics, self.fixed)
            if self.rule.variant == "released" and not isinstance(layout, Packed):
                return self._prune_released(x, layout, scores, statistics, temperature)
            prefix = self.rule.num_prefix_tokens
            if isinstance(layout, Packed):
                choice = self.choose(scores, statistics, layout.valid[:, prefix:], temperature, relaxation, removed)
                if choice.gate is not None:
                    x = x * layout.unpad(F.pad(choice.gate, (prefix, 0), value=1.0)).unsqueeze(1).to(x.dtype)
                merged = packed_gather_and_merge(x, layout, choice.importance, choice.kept, self.rule.merge, prefix)
                return *merged, choice.kept
            valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if layout is None else layout
            choice = self.choose(scores, statistics, valid[:, prefix:], temperature, relaxation, removed)
            tokens = x[:, prefix:]
            if choice.gate is not None:
                tokens = tokens * choice.gate.unsqueeze(2).to(x.dtype)
            tokens, stay = gather_and_merge(tokens, valid[:, prefix:], choice.importance, choice.kept, self.rule.merge)
            return torch.cat([x[:, :prefix], tokens], dim=1), torch.cat([valid[:, :prefix], stay], dim=1), choice.kept

    def _prune_fixed(
        self, x: Tensor, layout: Layout, attention: Tensor | None, statistics: AttentionStatistics | None, count: int
    ) -> tuple[Tensor, Layout, Tensor]:
        if isinstance(layout, Packed) or statistics is None:
            raise ValueError("a fixed number of tokens needs a padded batch and the scores of its tokens")
        prefix = self.rule.num_prefix_tokens
        number, valid = x.shape[1] - prefix, None if layout is None else layout[:, prefix:]
        if number <= count:
            return x, layout, torch.ones(x.shape[0], number, dtype=torch.bool, device=x.device) if valid is None else valid
        importance = token_importance(statistics, attention, self.rule.scores, valid)
        return fixed_gather_and_merge(x, layout, importance, count, self.rule.merge, prefix)

    def _merge_similar(
        self, x: Tensor, layout: Layout, statistics: AttentionStatistics | None, removed: Tensor | None
    ) -> tuple[Tensor, Layout, Tensor]:
        """Removes tokens by merging similar ones, in packed batches: their layout carries the tokens' sizes."""
        if not isinstance(layout, Packed) or statistics is None or statistics.keys is None or removed is None:
            raise ValueError("method 'tome' needs a packed batch, the keys of its tokens and the number of tokens to remove")
        prefix = self.rule.num_prefix_tokens
        valid, tokens = layout.valid, layout.pad(x)
        sizes = torch.ones_like(x[:, 0]) if layout.sizes is None else layout.sizes
        sizes = layout.pad(sizes).masked_fill(~valid, 0.0)
        counts = torch.minimum(removed.to(x.device), (valid.sum(dim=1) - prefix) // 2)
        merged, partner = most_similar_pairs(statistics.keys, counts, valid[:, prefix:])
        means, weights = merge_pairs(tokens[:, prefix:], sizes[:, prefix:], merged, partner)
        stay = valid.clone()
        stay[:, prefix:] &= ~merged
        out, after = pack(torch.cat([tokens[:, :prefix], means], dim=1), stay)
        packed_sizes, _ = pack(torch.cat([sizes[:, :prefix], weights], dim=1), stay)
        return out, replace(after, sizes=packed_sizes), stay[:, prefix:]

    def _prune_released(
        self, x: Tensor, valid: Valid, products: Tensor | None, statistics: AttentionStatistics | None, temperature: float
    ) -> tuple[Tensor, Valid, Tensor]:
        if products is None or statistics is None:
            raise ValueError("method 'dtp' needs the scores of the tokens")
        with self._tracing():
            importance = released.released_importance(statistics, products, self.rule.scores)
        with torch.no_grad():
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
        if execution.active and self.rule.needs_keys:
            return matching_flops(tokens, execution.key_dim)
        if self.alignment is not None:
            if execution.aligned or (execution.active and self.rule.reads_learnable_tokens):
                total = total + self.alignment.flops(entering if execution.packed else tokens, self.num_learnable)
            if execution.aligned:
                total = total + tokens * self.num_learnable * self.token_dim
        if scored and not self.rule.is_static:
            total = total + tokens * (self.num_learnable if self.rule.mag else 1)  # theta
        if scored and execution.recomputed:
            queries = tokens * ("self" in self.rule.scores) + ("cls" in self.rule.scores)
            total = total + flops.scores(queries, tokens, self.dim)
        if execution.active and self.rule.merge:
            total = total + tokens * self.dim
        return total
