"""Sizes of the models' parts, given in a YAML file as a mapping or by name."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator


class Section(BaseModel):
    """A mapping of keys that refuses unknown keys and is immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# A text whose empty value in YAML, `key:`, is the empty text.
Text = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]


class VitSizes(Section):
    """The sizes of a vision transformer."""

    patch_size: int = Field(ge=1, description="pixels along one side of a patch")
    embed_dim: int = Field(ge=1, description="channels of a token")
    depth: int = Field(ge=1, description="number of blocks")
    num_heads: int = Field(ge=1, description="attention heads; must divide embed_dim")
    mlp_ratio: float = Field(4.0, gt=0, description="ratio of the MLP's hidden channels to embed_dim")

    @model_validator(mode="after")
    def _heads_divide(self) -> "VitSizes":
        return require(self, self.embed_dim % self.num_heads == 0, "embed_dim must be a multiple of num_heads")


class BertSizes(Section):
    """The sizes of a BERT encoder. The vocabulary size comes from the tokenizer."""

    hidden_size: int = Field(ge=1, description="channels of a token")
    num_hidden_layers: int = Field(ge=1, description="number of layers")
    num_attention_heads: int = Field(ge=1, description="attention heads; must divide hidden_size")
    intermediate_size: int = Field(ge=1, description="hidden channels of the MLP")
    max_position_embeddings: int = Field(512, ge=2, description="largest length of a text, in tokens with [ENC] and [SEP]")
    dropout: float = Field(0.1, ge=0, lt=1, description="share of activations dropped in training")

    @model_validator(mode="after")
    def _heads_divide(self) -> "BertSizes":
        return require(
            self, self.hidden_size % self.num_attention_heads == 0, "hidden_size must be a multiple of num_attention_heads"
        )


HEAD_WIDTH = 64  # channels of a head in all of OpenAI's models


def _heads_of(width: str) -> Callable[[dict[str, Any]], int]:
    """Returns the default factory of a number of heads, computed from the field `width`."""
    return lambda given: max(1, given.get(width, HEAD_WIDTH) // HEAD_WIDTH)


class Pictures(Section):
    """How pictures are resized and normalised. The defaults are those of OpenAI's CLIP and of BLIP."""

    mean: tuple[float, float, float] = Field((0.48145466, 0.4578275, 0.40821073), description="subtracted from red, green and blue")
    std: tuple[float, float, float] = Field((0.26862954, 0.26130258, 0.27577711), description="divides red, green and blue")
    resample: Literal["bicubic", "bilinear"] = Field("bicubic", description="interpolation of resized pictures")

    @model_validator(mode="after")
    def _divides(self) -> "Pictures":
        return require(self, min(self.std) > 0, "std must be above 0")


class ClipSizes(Section):
    """The sizes of the towers of CLIP or SigLIP. The defaults are those of CLIP's ViT-L/14."""

    family: Literal["clip", "siglip"] = Field("clip", description="siglip: SigLIP, or SigLIP 2 of one resolution")
    patch_size: int = Field(14, ge=1, description="pixels along one side of a patch")
    vision_width: int = Field(1024, ge=1, description="channels of an image token")
    vision_layers: int = Field(24, ge=1, description="number of blocks of the image tower")
    vision_heads: int = Field(
        ge=1,
        default_factory=_heads_of("vision_width"),
        description="attention heads of the image tower; default: those of the weights, or width / 64",
    )
    text_width: int = Field(768, ge=1, description="channels of a text token")
    text_layers: int = Field(12, ge=1, description="number of blocks of the text tower")
    text_heads: int = Field(
        ge=1,
        default_factory=_heads_of("text_width"),
        description="attention heads of the text tower; default: those of the weights, or width / 64",
    )
    context_length: int = Field(77, ge=3, description="largest length of a text, in tokens with its start and end")
    embed_dim: int = Field(768, ge=1, description="channels of the space in which images and texts are compared")
    activation: Literal["quick_gelu", "gelu", "gelu_tanh"] | None = Field(
        None,
        description="of the MLPs; none: as the weights' file or the config beside it says, for new weights quick_gelu, of SigLIP"
        " gelu_tanh",
    )
    vision_hidden: int | None = Field(None, ge=1, description="siglip: channels within the image tower's MLPs; none: 4 * width")
    text_hidden: int | None = Field(None, ge=1, description="siglip: channels within the text tower's MLPs; none: 4 * width")
    vocab_size: int | None = Field(None, ge=1, description="siglip: number of token embeddings; none: the tokenizer's words")

    @model_validator(mode="after")
    def _heads_divide(self) -> "ClipSizes":
        divides = self.vision_width % self.vision_heads == 0 and self.text_width % self.text_heads == 0
        require(self, divides, "vision_width and text_width must be multiples of vision_heads and text_heads")
        if self.family == "siglip":
            return require(self, self.embed_dim == self.vision_width, "of siglip, embed_dim must be vision_width")
        own = self.vision_hidden or self.text_hidden or self.vocab_size
        require(self, not own, "vision_hidden, text_hidden and vocab_size are for family: siglip")
        told = self.activation is None or {"vision_heads", "text_heads"} <= self.model_fields_set
        return require(self, told, "activation needs vision_heads and text_heads with it: weights do not show these either")


def require(section: Any, holds: bool, rule: str) -> Any:
    if not holds:
        raise ValueError(rule)
    return section


VIT_SIZES = {
    "base": VitSizes(patch_size=16, embed_dim=768, depth=12, num_heads=12),
    "large": VitSizes(patch_size=16, embed_dim=1024, depth=24, num_heads=16),
}
BERT_SIZES = {"base": BertSizes(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)}


def _name_or_sizes(value: Any) -> str:
    return "<name>" if isinstance(value, str) else "<sizes>"


# The tags show up in pydantic's error locations; the angle brackets let `_key_of` in configs/load.py drop them.
Vit = Annotated[
    Annotated[Literal["base", "large"], Tag("<name>")] | Annotated[VitSizes, Tag("<sizes>")], Discriminator(_name_or_sizes)
]
Bert = Annotated[Annotated[Literal["base"], Tag("<name>")] | Annotated[BertSizes, Tag("<sizes>")], Discriminator(_name_or_sizes)]
