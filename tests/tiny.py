"""Small BLIP-NLVRs with random weights of enough variance that pruning differs between samples, and inputs for them."""

import torch
from torch import Tensor, nn

from madtp.pruning import PruningRule, TokenPruner
from models.bert import FIRST_MERGE_LAYER, BertSize, PairedCrossAttention, TextEncoder
from models.blip_nlvr import BlipNlvr
from models.vit import VisionTransformer

VOCABULARY, IMAGE, PATCH = 40, 32, 8  # 16 patches a picture
LEARNABLE, TOKEN_DIM = 5, 24  # neither tower's width: both project


def nlvr(rule: PruningRule | None = None, *, layers: int = 2, dropout: float = 0.0, checkpoint_blocks: int = 0) -> BlipNlvr:
    """A tiny model, the same weights each time; dense without a rule."""

    def make_pruner(dim: int) -> TokenPruner | None:
        return None if rule is None else TokenPruner(dim, LEARNABLE, TOKEN_DIM, rule)

    size = BertSize(VOCABULARY, 16, layers, 2, 32, 32, dropout)
    vision = VisionTransformer(IMAGE, PATCH, 20, 3, 2, 2.0, make_pruner=make_pruner, checkpoint_blocks=checkpoint_blocks)
    text = TextEncoder(size, lambda i: PairedCrossAttention(size, vision.embed_dim, i >= FIRST_MERGE_LAYER), make_pruner)
    model = BlipNlvr(vision, text, None if rule is None else (LEARNABLE, TOKEN_DIM, 1.0))
    return with_lively_weights(model).eval()


@torch.no_grad()
def with_lively_weights(module: nn.Module) -> nn.Module:
    """Draw every parameter by its name, so that models which share a part share its weights."""
    for name, parameter in sorted(module.named_parameters()):
        if parameter.dim() == 0:  # a temperature stays as it is
            continue
        generator = torch.Generator().manual_seed(sum(map(ord, name)) * 7919 + len(name))
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:  # biases around 0, gains around 1
            parameter.copy_(noise * 0.2 + name.endswith("weight"))
        elif "space_dict" in name:
            parameter.copy_(noise * 0.1)
        else:
            parameter.copy_(noise if "embedding" in name or "_embed" in name else noise * 2 / parameter[0].numel() ** 0.5)
    return module


def images(pairs: int, seed: int = 0) -> Tensor:
    """(B, 2, 3, H, W): noise of very different strength, so that pictures differ in how much there is to keep."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.rand(pairs, 2, 1, 1, 1, generator=generator) * 3
    return torch.randn(pairs, 2, 3, IMAGE, IMAGE, generator=generator) * strength


def text(lengths: list[int], seed: int = 0, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (S, L) of random texts; 0 is padding."""
    generator = torch.Generator().manual_seed(seed)
    width = width or max(lengths)
    ids = torch.randint(1, VOCABULARY, (len(lengths), 32), generator=generator)[:, :width]
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask
