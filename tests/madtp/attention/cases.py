"""Random queries, keys and values with the attention map that they make."""

import torch

from madtp.importance import paper_columns
from tests.madtp.cases import mask_of


class Attention:
    """Queries, keys and values of samples of these lengths, and their map.

    prefix: tokens in front that the statistics leave out
    """

    def __init__(self, lengths: list[int], heads: int = 3, width: int = 5, prefix: int = 1):
        generator = torch.Generator().manual_seed(3)
        self.valid, self.prefix = mask_of(lengths), prefix
        shape = len(lengths), heads, max(lengths), width
        self.query, self.key, self.value = (2 * torch.randn(shape, generator=generator) for _ in range(3))
        logits = (self.query @ self.key.transpose(-2, -1) / width**0.5).masked_fill(~self.valid[:, None, None], float("-inf"))
        self.log_norm, self.map = logits.logsumexp(dim=-1), logits.softmax(dim=-1)

    @property
    def inside(self) -> torch.Tensor:
        """The tokens behind the prefix that are no padding."""
        return self.valid[:, self.prefix :]

    @property
    def columns(self) -> torch.Tensor:
        return paper_columns(self.map[:, :, self.prefix :, self.prefix :], self.inside)

    @property
    def row(self) -> torch.Tensor:
        """The first token's attention behind the prefix, (B, N, H)."""
        return self.map[:, :, 0, self.prefix :].transpose(1, 2)
