"""Token selection as pure functions: threshold, keep rule, gather and merge (paper, Eq. 7-10).

B batch, N prunable tokens (prefix tokens, such as the class token, left out), C channels, K learnable tokens, P prefix tokens.
`valid` is (B, N) bool, False for padding; padding never enters a softmax, a score, a threshold, a feature or a merged token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from madtp.packing import Packed, Valid

EPS = 1e-8  # keeps denominators above zero, as in the authors' code


def sparsemax(z: Tensor, valid: Valid = None) -> Tensor:
    """Projects each row of z onto the probability simplex (Eq. 8; Martins and Astudillo, 2016).

    Args:
        z: (..., N).
        valid: broadcastable to z.
    Returns:
        (..., N), zero outside `valid`. Rows without valid entries are undefined.
    """
    if valid is not None:
        z = z.masked_fill(~valid, float("-inf"))
    # With the maximum at 0 no entry at or below -1 is in the support: -2 stands for padding and keeps the sums finite.
    z = (z - z.amax(dim=-1, keepdim=True)).nan_to_num(nan=-2.0).clamp(min=-2.0)
    with torch.no_grad():
        tau = _tau_by_newton(z) if z.device.type == "cpu" else _tau_by_sorting(z)
    if z.requires_grad and torch.is_grad_enabled():
        # On the support tau is a linear function of z. Adding it as 0 gives the gradient and leaves the value, to the last bit,
        # to the search: a pass that is run again without gradients must prune the same tokens.
        support = z > tau
        linear = ((z * support).sum(dim=-1, keepdim=True) - 1.0) / support.sum(dim=-1, keepdim=True)
        tau = tau + (linear - linear.detach())
    return (z - tau).clamp(min=0.0)


def _tau_by_sorting(z: Tensor) -> Tensor:
    """Finds the tau for which max(z - tau, 0) sums to 1, (..., 1), without reading values back from a GPU."""
    ordered = z.sort(dim=-1, descending=True).values
    rank = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    excess = ordered.cumsum(dim=-1) - 1.0
    support = (rank * ordered > excess).sum(dim=-1, keepdim=True).clamp(min=1)
    return excess.gather(-1, support - 1) / support


def _tau_by_newton(z: Tensor) -> Tensor:
    """Finds the same tau from below: the sum is convex, piecewise linear in tau, so Newton's method is exact (Michelot, 1986)."""
    tau = torch.full_like(z[..., :1], -1.0)  # the maximum is 0, so the sum is at least 1 here
    size = None
    while True:
        support = z > tau
        now = support.sum(dim=-1, keepdim=True)
        if size is not None and torch.equal(now, size):
            return tau
        size = now
        # Rounding could make tau step back and oscillate forever: let it only rise, and the support only shrink.
        tau = torch.maximum(tau, ((z * support).sum(dim=-1, keepdim=True) - 1.0) / size)


def threshold(attention: Tensor, importance: Tensor, temperature: float, valid: Valid = None) -> Tensor:
    """Returns theta = min over the K rows of sparsemax(T A_token) TIS (Eq. 7, 9). (B, K, N), (B, N) -> (B,)."""
    sparse = sparsemax(temperature * attention, None if valid is None else valid.unsqueeze(1))
    return (sparse @ importance.unsqueeze(-1)).squeeze(-1).amin(dim=1)


def decision_gate(importance: Tensor, theta: Tensor, kept: Tensor, valid: Tensor, relaxation: float) -> Tensor:
    """Returns factors of 1 for the tokens whose gradient is that of a soft decision (straight-through; Bengio et al., 2013).

    The soft decision is m = sigmoid((TIS - theta) / (relaxation * mean TIS)). A kept token's factor has the gradient of m, and a
    pruned token's, which scales its part of the merged token, that of 1 - m.

    Args:
        importance: (B, N), sums to 1 over the valid tokens.
        theta: (B,).
        kept, valid: (B, N) bool.
        relaxation: width of the soft decision around theta, in units of the mean importance; smaller is closer to the decision,
            and fewer tokens have a gradient.
    Returns:
        (B, N)
    """
    soft = torch.sigmoid((importance - theta.unsqueeze(1)) * valid.sum(dim=1, keepdim=True) / relaxation)
    change = soft - soft.detach()
    return 1.0 + torch.where(kept, change, -change)


def static_removal(entered: Tensor, temperature: float, step: int) -> Tensor:
    """Returns the number of tokens that a static method removes in a block: r = N / (1 + T) on average over the blocks.

    r is no whole number, so that a budget can be met: some blocks remove one token more than others.

    Args:
        entered: (B,) tokens N that enter the first block.
        temperature: T; higher removes less.
        step: blocks that have pruned before.
    """
    rate = entered.double() / (1.0 + temperature)
    return (rate * (step + 1)).floor().long() - (rate * step).floor().long()


def keep_counts(wanted: Tensor, available: Tensor, keep: str, min_keep: int = 0) -> Tensor:
    """Applies the batch's keep rule to the number of tokens above the threshold.

    A sample stays whole when fewer than two of its tokens would be pruned, or when no more than `min_keep` would stay.

    Args:
        wanted: (B,) tokens above each sample's threshold.
        available: (B,) tokens of each sample.
        keep: "max" and "mean" give all samples the same count, "instance" each its own.
    Returns:
        (B,) tokens to keep.
    """
    if keep == "max":
        wanted = wanted.amax().expand_as(wanted)
    elif keep == "mean":
        wanted = wanted.float().mean().round().to(wanted.dtype).expand_as(wanted)
    whole = (wanted <= min_keep) | (available - wanted < 2)
    return torch.where(whole, available, wanted)


def best_tokens(importance: Tensor, counts: Tensor, valid: Valid = None) -> Tensor:
    """Marks the `counts` best tokens of each sample; ties go to the earlier token. (B, N), (B,) -> (B, N) bool."""
    if valid is not None:
        importance = importance.masked_fill(~valid, float("-inf"))
    order = importance.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    return rank < counts.unsqueeze(1)


def merge_weights(importance: Tensor, pruned: Tensor) -> Tensor:
    """Normalises the importance of the pruned tokens to sum 1. (B, N), (B, N) bool -> (B, N), zero for the other tokens."""
    weight = importance.masked_fill(~pruned, 0.0)
    return weight / (weight.sum(dim=-1, keepdim=True) + EPS)


def gather_and_merge(x: Tensor, valid: Valid, importance: Tensor, kept: Tensor, merge: bool) -> tuple[Tensor, Tensor]:
    """Moves the kept tokens, in their order, to the front, then the merged token, then padding; the mask moves with them.

    Args:
        x: (B, N, C).
        kept: (B, N) bool, valid tokens only.
        merge: replace the pruned tokens by their mean, weighted by importance.
    Returns:
        (B, M, C) and its mask (B, M), M the largest number of tokens of a sample.
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


def fixed_gather_and_merge(
    x: Tensor, valid: Valid, importance: Tensor, count: int, merge: bool, num_prefix_tokens: int = 0
) -> tuple[Tensor, Valid, Tensor]:
    """Keeps the `count` best tokens of each sample in their order, then the merged token: shapes do not depend on values.

    It is made of sorting, one gather of rows and a product, for exported models: an inference engine copies whatever is sliced off
    x or joined to it. Samples with fewer tokens than `count` keep all of them, with padding.

    Args:
        x: (B, P + N, C).
        valid: (B, P + N); None where nothing is padded.
        importance: (B, N).
        count: below N.
        num_prefix_tokens: P tokens in front that stay.
    Returns:
        (B, P + count + 1, C), or a token less without merging; the mask, None where there was none; kept (B, N) bool.
    """
    prefix, batch = num_prefix_tokens, x.shape[0]  # len(x) would fix the batch size of an exported model
    tokens = None if valid is None else valid[:, prefix:]
    scores = importance if tokens is None else importance.masked_fill(~tokens, -1.0)
    best = scores.topk(scores.shape[1], dim=1).indices
    kept = best.argsort(dim=1) < count  # a token's place among the best
    order = best[:, :count].sort(dim=1).values + prefix
    order = torch.cat([torch.arange(prefix, device=x.device).expand(batch, -1), order], dim=1)
    starts = torch.arange(batch, device=x.device).unsqueeze(1) * x.shape[1]
    out = x.flatten(0, 1).index_select(0, (starts + order).flatten()).view(batch, prefix + count, -1)
    stay = None if valid is None else valid.gather(1, order)
    if merge:
        pruned = ~kept if tokens is None else tokens & ~kept
        weights = importance.masked_fill(~pruned, 0.0)
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=EPS)  # torch.onnx drops "+ EPS" as if it were + 0
        weights = F.pad(weights, (prefix, 0)).to(x.dtype)
        out = torch.cat([out, weights.unsqueeze(1) @ x], dim=1)
        stay = None if stay is None else torch.cat([stay, pruned.any(dim=1, keepdim=True)], dim=1)
    return out, stay, kept if tokens is None else kept & tokens


def packed_gather_and_merge(
    x: Tensor, layout: Packed, importance: Tensor, kept: Tensor, merge: bool, num_prefix_tokens: int = 1
) -> tuple[Tensor, Packed]:
    """Does the same for packed tokens, prefix tokens included: x (T, C) -> (T', C). Synchronises with the device once, for T'.

    importance, kept: (B, N)
    """
    tokens = layout.valid[:, num_prefix_tokens:]
    pruned = tokens & ~kept
    merged = pruned.any(dim=1, keepdim=True) if merge else torch.zeros_like(kept[:, :1])
    prefix = torch.ones_like(merged).expand(-1, num_prefix_tokens)
    stay = torch.cat([prefix, kept, merged], dim=1)  # (B, P + N + 1): the prefix first, the merged token last
    after = Packed.of(stay.sum(dim=1).tolist(), x.device)
    source = torch.cat([layout.rows, layout.rows[:, :1]], dim=1)
    places = torch.nonzero_static(stay.flatten(), size=after.total).flatten()  # known size: no second synchronisation
    out = x.index_select(0, source.flatten().index_select(0, places))
    if merge:
        token = merge_weights(importance, pruned).to(x.dtype).unsqueeze(1) @ layout.pad(x)[:, num_prefix_tokens:]
        last = after.offsets[1:].long() - 1
        out[last] = torch.where(merged, token.squeeze(1), out[last])
    return out, after
