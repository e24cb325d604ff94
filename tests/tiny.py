"""Small models with random weights of enough variance that pruning differs between samples, and inputs for them."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from clip.model import ClipSize
from madtp.pruning import TokenPruner
from madtp.rule import PruningRule
from models.bert import FIRST_MERGE_LAYER, BertSize, CrossAttention, PairedCrossAttention, TextEncoder
from models.blip_nlvr import BlipNlvr
from models.blip_retrieval import BlipRetrieval
from models.clip_retrieval import ClipRetrieval, SiglipRetrieval
from models.momentum import MomentumModel
from models.vit import VisionTransformer

VOCABULARY, IMAGE, PATCH = 40, 32, 8  # 16 patches a picture
LEARNABLE, TOKEN_DIM = 5, 24  # neither tower's width: both project
ENC = VOCABULARY - 1
QUEUE, MOMENTUM = 7, 0.9
CLIP = ClipSize(IMAGE, PATCH, 20, 3, 2, 16, 2, 2, 14, VOCABULARY, 12)
SIGLIP = replace(CLIP, embed_dim=20, vision_hidden=52, text_hidden=36, family="siglip")


def pruners(rule: PruningRule | None) -> Callable[..., TokenPruner | None]:
    def make_pruner(dim: int, num_prefix_tokens: int = 1) -> TokenPruner | None:
        own = None if rule is None else replace(rule, num_prefix_tokens=num_prefix_tokens)
        return None if own is None else TokenPruner(dim, LEARNABLE, TOKEN_DIM, own)

    return make_pruner


def learnable_tokens(rule: PruningRule | None) -> tuple[int, int, float] | None:
    return None if rule is None else (LEARNABLE, TOKEN_DIM, 1.0)


def nlvr(rule: PruningRule | None = None, *, layers: int = 2, dropout: float = 0.0, checkpoint_blocks: int = 0) -> BlipNlvr:
    """A tiny model, the same weights each time; dense without a rule."""
    size = BertSize(VOCABULARY, 16, layers, 2, 32, 32, dropout)
    vision = VisionTransformer(IMAGE, PATCH, 20, 3, 2, 2.0, make_pruner=pruners(rule), checkpoint_blocks=checkpoint_blocks)
    text = TextEncoder(size, lambda i: PairedCrossAttention(size, vision.embed_dim, i >= FIRST_MERGE_LAYER), pruners(rule))
    return with_lively_weights(BlipNlvr(vision, text, learnable_tokens(rule))).eval()


def retrieval(rule: PruningRule | None = None, *, checkpoint_blocks: int = 0, negative_all_rank: bool = True) -> BlipRetrieval:
    """A tiny BLIP for retrieval; its momentum weights differ from the online ones."""
    size = BertSize(VOCABULARY, 16, 2, 2, 32, 32, 0.0)
    vision = VisionTransformer(IMAGE, PATCH, 20, 3, 2, 2.0, make_pruner=pruners(rule), checkpoint_blocks=checkpoint_blocks)
    text = TextEncoder(size, lambda i: CrossAttention(size, vision.embed_dim), pruners(rule))
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of the queues
        model = BlipRetrieval(vision, text, ENC, 12, QUEUE, MOMENTUM, negative_all_rank, learnable_tokens(rule))
    return with_lively_weights(model).eval()


def clip(rule: PruningRule | None = None, size: ClipSize = CLIP) -> ClipRetrieval:
    """A tiny CLIP."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ClipRetrieval(size, QUEUE, MOMENTUM, pruners(rule), learnable_tokens(rule))
    return with_lively_weights(model).eval()


def siglip(rule: PruningRule | None = None, size: ClipSize = SIGLIP) -> SiglipRetrieval:
    """A tiny SigLIP."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SiglipRetrieval(size, QUEUE, MOMENTUM, pruners(rule), learnable_tokens(rule))
    return with_lively_weights(model).eval()


PAIR_MODELS: dict[str, Callable[[PruningRule | None], MomentumModel]] = {"blip": retrieval, "clip": clip, "siglip": siglip}


def pairs(kind: str, lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Images (B, 3, H, W), token ids and attention mask (B, L) for a model of PAIR_MODELS."""
    words = {"blip": text, "clip": ended_text, "siglip": padded_text}[kind](lengths, seed)
    return images(len(lengths), seed)[:, 0], *words


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


@torch.no_grad()
def slope(loss: Callable[[], Tensor], parameter: Tensor, direction: Tensor, step: float = 1e-3) -> float:
    """Returns the derivative of a loss along a direction of a parameter by central differences."""
    values = []
    for sign in (1, -1):
        parameter.add_(direction, alpha=sign * step)
        values.append(float(loss()))
        parameter.sub_(direction, alpha=sign * step)
    return (values[0] - values[1]) / (2 * step)


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


def ended_text(lengths: list[int], seed: int = 0, size: ClipSize = CLIP) -> tuple[Tensor, Tensor]:
    """Returns texts as CLIP reads them, padded to the longest width: the last token of each has the highest id."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, size.vocab_size - 1, (len(lengths), size.context_length), generator=generator)
    places, ends = torch.arange(size.context_length), torch.tensor(lengths)[:, None]
    ids = torch.where(places < ends - 1, ids, 0).masked_fill(places == ends - 1, size.vocab_size - 1)
    return ids, (places < ends).long()


def padded_text(lengths: list[int], seed: int = 0, size: ClipSize = SIGLIP) -> tuple[Tensor, Tensor]:
    """Returns texts as SigLIP reads them: padded with 0 to one length, of which all counts."""
    ids = text(lengths, seed, size.context_length)[0]
    return ids, torch.ones_like(ids)
