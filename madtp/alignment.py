"""MAG, multi-modality alignment guidance: learnable tokens shared by both modalities (paper, Section 3.2).

B batch, N tokens of a block without its prefix tokens, C channels, K learnable tokens, D their channels (`sd_dim`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madtp.packing import Valid


class Alignment(nn.Module):
    """Maps a block's tokens to the learnable tokens' space: V' = W V + B (Eq. 1), or the identity where the widths agree."""

    def __init__(self, dim: int, token_dim: int, projection: str = "auto"):
        """
        Args:
            dim, token_dim: C and D.
            projection: "auto" maps only where `dim != token_dim`, "on" always, "off" never.
        Raises:
            ValueError: for "off" where the widths differ.
        """
        super().__init__()
        if projection == "off" and dim != token_dim:
            raise ValueError(f"tokens of width {dim} cannot meet learnable tokens of width {token_dim} without a projection")
        self.dim, self.token_dim = dim, token_dim
        project = projection == "on" or dim != token_dim
        self.projection = nn.Linear(dim, token_dim) if project else nn.Identity()

    def forward(self, tokens: Tensor, learnable_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the inner products E V'^T (..., K, N) and the mapped tokens V' (..., N, D).

        Args:
            tokens: (..., N, C).
            learnable_tokens: (K, D), or (B, K, D) for tokens (B, N, C).
        """
        mapped = self.projection(tokens)
        return (mapped @ learnable_tokens.transpose(-2, -1)).transpose(-2, -1), mapped

    def flops(self, tokens: Tensor, num_learnable: int) -> Tensor:
        """Counts the multiply-adds of `forward` for token counts of any shape."""
        projection = self.dim * self.token_dim if isinstance(self.projection, nn.Linear) else 0
        return tokens * (projection + self.token_dim * num_learnable)


def token_attention(products: Tensor, token_dim: int, valid: Valid = None) -> Tensor:
    """Returns A_token, the softmax over tokens of E V'^T / sqrt(D) (Eq. 2). (B, K, N), each row sums to 1 over the valid tokens."""
    logits = products.to(torch.promote_types(products.dtype, torch.float32)) / token_dim**0.5
    if valid is None:
        return torch.softmax(logits, dim=-1)
    padding = ~valid.unsqueeze(1)  # finite logits keep the gradients of a sample without tokens finite; it has no attention
    logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
    return torch.softmax(logits, dim=-1).masked_fill(padding, 0.0)


def aligned_features(attention: Tensor, mapped: Tensor) -> Tensor:
    """Returns E_v = A_token V' (Eq. 3). (B, K, N), (B, N, D) -> (B, K, D)."""
    return attention.to(mapped.dtype) @ mapped


def similarity_loss(vision: Tensor, language: Tensor) -> Tensor:
    """Returns L_sim, the mean over samples and learnable tokens of 1 - cos(E^v, E^l) (Eq. 12). (B, K, D) twice -> scalar."""
    return (1.0 - F.cosine_similarity(vision.float(), language.float(), dim=-1)).mean()


def alignment_loss(vision: Tensor, language: Tensor, groups: Tensor, negatives: bool) -> Tensor:
    """Returns `contrastive_similarity_loss` for `negatives`, else L_sim of the paper, which knows matching pairs only."""
    return contrastive_similarity_loss(vision, language, groups) if negatives else similarity_loss(vision, language)


def contrastive_similarity_loss(vision: Tensor, language: Tensor, groups: Tensor, temperature: float = 0.1) -> Tensor:
    """Returns L_sim with the other pairs of the batch as negatives, an extension beyond the paper.

    The similarity of two samples is the mean over learnable tokens of cos(E^v, E^l), as in Eq. 12. The loss is the cross-entropy
    of telling each sample's own partner from those of the other samples, averaged over both directions (van den Oord et al., 2018).

    Args:
        vision, language: (B, K, D).
        groups: (B,) numbers that are equal for samples of one image, which are no negatives of each other.
        temperature: divides the similarities.
    """
    image, text = (F.normalize(part.float(), dim=-1).flatten(1) for part in (vision, language))
    with torch.autocast(vision.device.type, enabled=False):  # a low temperature amplifies rounding errors
        logits = image @ text.t() / (vision.shape[1] * temperature)
    partners = torch.eye(len(groups), dtype=torch.bool, device=groups.device)
    logits = logits.masked_fill((groups.unsqueeze(1) == groups) & ~partners, float("-inf"))
    return -(logits.log_softmax(dim=1).diagonal() + logits.log_softmax(dim=0).diagonal()).mean() / 2
