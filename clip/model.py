"""CLIP (Radford et al., 2021) with a pruner slot in every block of both towers. Parameter names are OpenAI's.

B images or texts, N tokens, L text tokens, C channels of a tower, E channels of the common space. The class token of a text is its
end-of-text token, the last in the order of the text. In memory it comes first, as class tokens do everywhere, so that all towers
share one pruning path: kept tokens stay in order, and a merged token comes last, which is right before the end of the text.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madtp import flops
from madtp.attention.attend import Causal, attend, recomputes_scores
from madtp.blocks import UNPRUNED, AlignedModel, Encoded, Guidance, PreNormBlock, block_flops, run_blocks
from madtp.importance import AttentionStatistics
from madtp.packing import Layout, class_tokens, end_first, pack
from madtp.pruning import TokenPruner
from madtp.rule import PruningRule

MLP_RATIO = 4
START_SCALE = math.log(1 / 0.07)
MakePruner = Callable[..., TokenPruner | None]  # of the channels, for SigLIP also num_prefix_tokens


@dataclass(frozen=True)
class ClipSize:
    """The defaults are ViT-L/14 at 336 px."""

    image_size: int = 336
    patch_size: int = 14
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    context_length: int = 77
    vocab_size: int = 49408
    embed_dim: int = 768
    activation: str | None = None  # a key of ACTIVATIONS; None: OpenAI's, unless weights bring another
    vision_hidden: int | None = None  # channels within the MLPs, of SigLIP alone; None: 4 times the width
    text_hidden: int | None = None
    family: str = "clip"


class QuickGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


OPENAIS = "quick_gelu"


class TanhGelu(nn.GELU):
    def __init__(self):
        super().__init__(approximate="tanh")


# A checkpoint holds the place of its activation here: new ones go to the end.
ACTIVATIONS: dict[str, type[nn.Module]] = {OPENAIS: QuickGelu, "gelu": nn.GELU, "gelu_tanh": TanhGelu}


@dataclass(frozen=True)
class BlockForm:
    """The parts of a block in which CLIP and SigLIP differ.

    activation: a key of ACTIVATIONS
    norm_eps: epsilon of the LayerNorms
    hidden: channels within the MLP; None: 4 times the width
    """

    activation: str = OPENAIS
    norm_eps: float = 1e-5
    hidden: int | None = None

    def mlp(self, dim: int) -> nn.Sequential:
        hidden = self.hidden or MLP_RATIO * dim
        layers = [("c_fc", nn.Linear(dim, hidden)), ("gelu", ACTIVATIONS[self.activation]()), ("c_proj", nn.Linear(hidden, dim))]
        return nn.Sequential(OrderedDict(layers))


OPENAIS_FORM = BlockForm()


class SelfAttention(nn.Module):
    """Multi-head self-attention with the parameter names of nn.MultiheadAttention."""

    def __init__(self, dim: int, num_heads: int, causal: Causal):
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, layout: Layout, rule: PruningRule | None) -> tuple[Tensor, AttentionStatistics | None]:
        """x: (B, N, C), or packed (T, C)."""
        heads = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        options = {"rule": rule, "causal": self.causal, "training": self.training}
        out, statistics = attend(*heads, self.num_heads, layout, layout, **options)
        return self.out_proj(out), statistics


class ResidualAttentionBlock(PreNormBlock):
    """A block with OpenAI's names."""

    def __init__(self, dim: int, num_heads: int, causal: Causal, pruner: TokenPruner | None, form: BlockForm = OPENAIS_FORM):
        super().__init__(dim, 0.0, pruner)
        self.ln_1 = nn.LayerNorm(dim, form.norm_eps)
        self.attn = SelfAttention(dim, num_heads, causal)
        self.ln_2 = nn.LayerNorm(dim, form.norm_eps)
        self.mlp = form.mlp(dim)

    def attention(self, x: Tensor, layout: Layout, rule: PruningRule | None) -> tuple[Tensor, AttentionStatistics | None]:
        return self.attn(self.ln_1(x), layout, rule)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_2(x))

    @property
    def key_dim(self) -> int:
        return self.dim // self.attn.num_heads

    @property
    def attention_weights(self) -> list[nn.Parameter]:
        return [self.attn.in_proj_weight, self.attn.out_proj.weight]

    @property
    def mlp_weights(self) -> list[nn.Parameter]:
        return [self.mlp.c_fc.weight, self.mlp.c_proj.weight]


class Transformer(nn.Module):
    def __init__(
        self, dim: int, depth: int, num_heads: int, causal: Causal, make_pruner: MakePruner, form: BlockForm = OPENAIS_FORM
    ):
        super().__init__()
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(dim, num_heads, causal, make_pruner(dim), form) for _ in range(depth)
        )
        self._init_weights(dim, depth)

    def _init_weights(self, dim: int, depth: int) -> None:
        """Draws weights as OpenAI does: layers that write to the residual stream are the smaller, the deeper the tower."""
        residual = dim**-0.5 * (2 * depth) ** -0.5
        for block in self.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=dim**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=residual)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * dim) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual)
            nn.init.zeros_(block.attn.out_proj.bias)


class ImageTower(nn.Module):
    """The part that the image towers of CLIP and SigLIP share. Subclasses define `embed`, `read`, `project` and `flops`.

    prefix_tokens: tokens in front of the patches
    """

    prefix_tokens = 1
    positional_embedding: nn.Parameter
    transformer: Transformer

    def forward(self, images: Tensor, guidance: Guidance) -> Encoded:
        """Encodes images (B, 3, H, W). The feature is not normalised."""
        x, layout = self.embed(images), None
        if guidance.packed:
            x, layout = pack(x, layout)
        return self.encode(x, layout, guidance)

    def embed(self, images: Tensor) -> Tensor:
        """Maps images (B, 3, H, W) to the input of the blocks, (B, N, C)."""
        raise NotImplementedError

    def encode(self, x: Tensor, layout: Layout, guidance: Guidance = UNPRUNED) -> Encoded:
        """Runs the output of `embed`, or some of its tokens, through the blocks."""
        blocks = self.transformer.resblocks
        again = recomputes_scores(x, layout, blocks[0].attn.num_heads)
        x, layout, record = run_blocks(blocks, x, layout, guidance, recomputes_scores=again)
        return Encoded(x, layout, self.project(self.read(x, layout)), record)

    def read(self, x: Tensor, layout: Layout) -> Tensor:
        """Returns the token (B, C) that stands for each image behind a block."""
        raise NotImplementedError

    def project(self, token: Tensor) -> Tensor:
        """Maps what is read behind the last block to the common space, (B, C) -> (B, E)."""
        raise NotImplementedError

    def flops(self, encoded: Encoded) -> Tensor:
        """Counts the multiply-adds of `forward` per image, (B,)."""
        raise NotImplementedError


class VisionTower(ImageTower):
    def __init__(self, size: ClipSize, make_pruner: MakePruner):
        super().__init__()
        width, patches = size.vision_width, (size.image_size // size.patch_size) ** 2
        self.conv1 = nn.Conv2d(3, width, size.patch_size, size.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(1 + patches, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, size.vision_layers, size.vision_heads, None, make_pruner)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, size.embed_dim) * width**-0.5)

    def embed(self, images: Tensor) -> Tensor:
        """Maps images (B, 3, H, W) to the input of the blocks, the class token first, (B, N, C)."""
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.to(patches.dtype).expand(images.shape[0], 1, -1), patches], dim=1)
        return self.ln_pre(x + self.positional_embedding)  # float32 from here on, whatever the convolution returns

    def read(self, x: Tensor, layout: Layout) -> Tensor:
        return class_tokens(x, layout)

    def project(self, token: Tensor) -> Tensor:
        return self.ln_post(token) @ self.proj

    def flops(self, encoded: Encoded) -> Tensor:
        """Counts the multiply-adds of `forward` per image, (B,)."""
        record, width = encoded.record, self.conv1.out_channels
        total = flops.linear(record.entering[0] - 1, self.conv1.weight[0].numel(), width) + self.proj.numel()
        total = total + flops.layer_norm(record.entering[0], width) + flops.layer_norm(1, width)
        return total + block_flops(self.transformer.resblocks, record)


class Clip(AlignedModel):
    image_tower: type[ImageTower] = VisionTower
    text_form = OPENAIS_FORM

    def __init__(
        self, size: ClipSize, make_pruner: MakePruner = lambda dim: None, learnable_tokens: tuple[int, int, float] | None = None,
        text_order: Causal = "class_last", make_text_pruner: MakePruner | None = None,
    ):  # fmt: skip
        """
        Args:
            make_pruner: builds the pruner of a block from its number of channels; None leaves the block dense.
            make_text_pruner: builds those of the text tower, if not `make_pruner`.
            learnable_tokens: number K, channels D and initial std of the tokens that both towers share; None without pruners.
            text_order: "class_first" reproduces the authors' code: the start token is the class token, and padding takes part. Once
                tokens are pruned it reads the wrong token, so it only serves to compare unpruned texts. None: all tokens see one
                another.
        """
        super().__init__()
        width, self.text_order = size.text_width, text_order
        make_text_pruner = make_text_pruner or make_pruner
        self.visual = self.image_tower(size, make_pruner)
        self.transformer = Transformer(
            width, size.text_layers, size.text_heads, text_order, make_text_pruner, replace(self.text_form, hidden=size.text_hidden)
        )
        self.token_embedding = nn.Embedding(size.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.randn(size.context_length, width) * 0.01)
        self.ln_final = nn.LayerNorm(width, self.text_form.norm_eps)
        self.text_projection = self.text_head(width, size.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(START_SCALE))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.init_learnable_tokens(learnable_tokens)
        self.size = size
        if size.activation not in (None, OPENAIS):
            self.adopt(size.activation, size.vision_heads, size.text_heads)

    @staticmethod
    def text_head(width: int, embed_dim: int) -> nn.Parameter | nn.Module:
        """Returns new weights that map texts to the common space."""
        return nn.Parameter(torch.randn(width, embed_dim) * width**-0.5)

    def adopt(self, activation: str, vision_heads: int, text_heads: int) -> None:
        """Sets what the shapes of weights do not show, in both towers and their copies.

        A buffer keeps it in the state dict: a checkpoint must not be read with another activation or number of heads.
        """
        for name, module in self.named_modules():
            if isinstance(module, ResidualAttentionBlock):
                module.mlp.gelu = ACTIVATIONS[activation]()
                module.attn.num_heads = vision_heads if name.startswith("visual") else text_heads
        unseen = torch.tensor([list(ACTIVATIONS).index(activation), vision_heads, text_heads])
        self.register_buffer("unseen", unseen.to(self.logit_scale.device))

    def fit_mlps(self, vision_hidden: int, text_hidden: int) -> None:
        """Gives the MLPs of both towers and their copies other numbers of hidden channels, with new weights."""
        for name, module in self.named_modules():
            if isinstance(module, ResidualAttentionBlock):
                hidden = vision_hidden if name.startswith("visual") else text_hidden
                width, trained = module.mlp.c_fc.in_features, module.mlp.c_fc.weight.requires_grad
                module.mlp.c_fc = nn.Linear(width, hidden).requires_grad_(trained)
                module.mlp.c_proj = nn.Linear(hidden, width).requires_grad_(trained)

    def class_token(self, branch: str, x: Tensor, layout: Layout) -> Tensor:
        return self.visual.read(x, layout) if branch == "vision" else class_tokens(x, layout)

    @property
    def branches(self) -> dict[str, nn.ModuleList]:
        return {"vision": self.visual.transformer.resblocks, "language": self.transformer.resblocks}

    def encode_image(self, images: Tensor, guidance: Guidance = UNPRUNED, suffix: str = "") -> Encoded:
        """Encodes images (B, 3, H, W); the feature is not normalised. `suffix` names the copy of the tower to use."""
        return getattr(self, f"visual{suffix}")(images, self.guided(guidance))

    def encode_text(self, input_ids: Tensor, guidance: Guidance = UNPRUNED, suffix: str = "") -> Encoded:
        """Encodes texts (B, L); the feature is not normalised. `suffix` names the copy of the tower to use."""
        transformer, embedding, norm, position, projection = (
            getattr(self, name + suffix)
            for name in ("transformer", "token_embedding", "ln_final", "positional_embedding", "text_projection")
        )
        x, layout = embedding(input_ids) + position[: input_ids.shape[1]], None
        if self.text_order != "class_first":
            x, layout = self.class_first(x, input_ids)
        if guidance.packed:
            x, layout = pack(x, layout)
        x, layout, record = run_blocks(transformer.resblocks, x, layout, self.guided(guidance))
        x = norm(x)
        if self.text_order == "class_first":
            return Encoded(x, layout, x[torch.arange(len(x)), input_ids.argmax(dim=1)] @ projection, record)
        return Encoded(x, layout, self.project_text(class_tokens(x, layout), projection), record)

    def class_first(self, x: Tensor, input_ids: Tensor) -> tuple[Tensor, Layout]:
        """Moves the class token of each text to the front, x (B, L, C).

        It is the end-of-text token, which has the highest id of each text; padding follows it and is dropped.
        """
        return end_first(x, input_ids.argmax(dim=1))

    @staticmethod
    def project_text(token: Tensor, projection: Any) -> Tensor:
        """Maps class tokens (B, C) behind the last norm to the common space by the `text_projection` of a tower."""
        return token @ projection

    def text_flops(self, encoded: Encoded) -> Tensor:
        """Counts the multiply-adds of `encode_text` per text, (B,)."""
        total = flops.layer_norm(encoded.record.leaving[-1], self.ln_final.normalized_shape[0])
        total = total + self.ln_final.normalized_shape[0] * self.size.embed_dim
        return total + block_flops(self.transformer.resblocks, encoded.record)
