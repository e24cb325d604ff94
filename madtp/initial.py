"""Learnable tokens made from the tokens of data, instead of drawn at random (an extension beyond the paper).

T tokens, D channels, K learnable tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from madtp.blocks import Guidance, PrunedBlock
from madtp.packing import Layout, Packed

METHODS = ("kmeans", "principal")
PER_BLOCK = 1024  # tokens of a batch that a block adds to the sample
MOST_STEPS = 50  # of Lloyd's algorithm, which has mostly converged before


class TokenSample:
    """A random sample of the tokens that enter the blocks, mapped to the width of the learnable tokens, by branch."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator
        self.found: dict[str, list[Tensor]] = {}

    def see(self, branch: str, block: PrunedBlock, x: Tensor, layout: Layout, guidance: Guidance) -> None:
        """Adds a block that is about to run on x (B, P + N, C), or packed (T, C)."""
        if block.pruner is None or block.pruner.alignment is None:
            return
        x = layout.pad(x) if isinstance(layout, Packed) else x
        whole = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if layout is None else layout
        prefix = block.pruner.rule.num_prefix_tokens
        tokens = x[:, prefix:][(whole.valid if isinstance(whole, Packed) else whole)[:, prefix:]]
        some = torch.randperm(len(tokens), generator=self.generator)[:PER_BLOCK].to(x.device)
        self.found.setdefault(branch, []).append(block.pruner.alignment.projection(tokens[some]).float())

    def end_batch(self) -> None:
        """Does nothing: tokens were added as they came."""

    def tokens(self) -> Tensor:
        """Returns the same number of tokens of each branch, (T, D)."""
        branches = [torch.cat(parts) for parts in self.found.values()]
        least = min(map(len, branches))
        chosen = [torch.randperm(len(tokens), generator=self.generator)[:least].to(tokens.device) for tokens in branches]
        return torch.cat([tokens[some] for tokens, some in zip(branches, chosen, strict=True)])


def tokens_from_data(method: str, tokens: Tensor, number: int, std: float, generator: torch.Generator | None = None) -> Tensor:
    """Returns learnable tokens (K, D) that represent the tokens (T, D) of a data set, each with a root mean square of `std`.

    The mean of all tokens is subtracted first: it tells none of them from the others.

    Args:
        method: "kmeans" for `cluster_centres`, "principal" for `principal_directions`.
        generator: of k-means.
    Raises:
        ValueError: when there are too few tokens or channels for `number`.
    """
    tokens = tokens - tokens.mean(dim=0)
    if method == "kmeans":
        found = cluster_centres(tokens, number, generator)
    else:
        found = principal_directions(tokens, number)
    return F.normalize(found, dim=1) * std * tokens.shape[1] ** 0.5


def cluster_centres(tokens: Tensor, number: int, generator: torch.Generator | None = None) -> Tensor:
    """Returns the centres of `number` clusters by k-means (Lloyd's algorithm, seeded as k-means++). (T, D) -> (K, D).

    Raises:
        ValueError: for fewer tokens than clusters.
    """
    if len(tokens) < number:
        raise ValueError(f"{len(tokens)} tokens cannot form {number} clusters")
    centres = _spread_out(tokens, number, generator)
    nearest = None
    for _ in range(MOST_STEPS):
        before, nearest = nearest, torch.cdist(tokens, centres).argmin(dim=1)
        if before is not None and torch.equal(before, nearest):
            break
        sums = torch.zeros_like(centres).index_add_(0, nearest, tokens)
        sizes = nearest.bincount(minlength=number).unsqueeze(1)
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
    return centres


def _spread_out(tokens: Tensor, number: int, generator: torch.Generator | None) -> Tensor:
    """Draws first centres, each token with a probability that grows with its squared distance to those already drawn."""
    first = torch.randint(len(tokens), (1,), generator=generator, device=tokens.device)
    chosen, distance = [first], torch.full_like(tokens[:, 0], float("inf"))
    while len(chosen) < number:
        distance = torch.minimum(distance, (tokens - tokens[chosen[-1]]).square().sum(dim=1))
        chance = distance if bool(distance.sum() > 0) else torch.ones_like(distance)  # fewer distinct tokens than clusters
        chosen.append(chance.multinomial(1, generator=generator))
    return tokens[torch.cat(chosen)]


def principal_directions(tokens: Tensor, number: int) -> Tensor:
    """Returns the first principal directions of the tokens, each with both signs, the largest variance first. (T, D) -> (K, D).

    Raises:
        ValueError: for more than twice as many as the tokens have channels.
    """
    wanted = (number + 1) // 2
    if wanted > tokens.shape[1]:
        raise ValueError(f"{tokens.shape[1]} channels have {2 * tokens.shape[1]} signed directions, and {number} are wanted")
    directions = torch.linalg.eigh(torch.cov(tokens.t()))[1].flip(1).t()[:wanted]
    return torch.stack([directions, -directions], dim=1).flatten(0, 1)[:number]
