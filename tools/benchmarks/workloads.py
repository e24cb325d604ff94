"""What tools/benchmark.py runs pruned and dense models on: a model whole, an image encoder, a block.

A workload's `run` gives the output of a forward pass, `gflops` what it cost each sample, `record` what its image encoder left. In
`towers`, lists of blocks, a share of kept tokens can be imposed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from clip.model import ClipSize, VisionTower
from configs.schema import ClipRetrievalConfig, NlvrConfig
from madtp.flops import GIGA
from madtp.packing import pack
from madtp.pruning import PruneSetting
from madtp.attention.attend import scored_again
from models.blip_nlvr import REFERENCE_TEXT_TOKENS, BlipNlvr
from models.build import learnable_tokens, pruner_factory
from madtp.blocks import AlignedModel, Encoded, TowerRecord, count_tokens

Inputs = tuple[Tensor, ...]
Forward = Callable[[], object]
Prepare = Callable[[Inputs], Forward]


@dataclass
class Method:
    """A model to time: `prepare(inputs)` gives the forward pass, GFLOPs and kept tokens are of one sample.

    each: the things in a sample that throughput counts
    note: what a reader should know of the pass that was prepared last
    """

    name: str
    p: float
    prepare: Prepare
    gflops: float | None = None
    keep: tuple[float, ...] = ()
    each: int = 1
    note: str = ""


class Nlvr:
    """Two images and a text."""

    config, path = NlvrConfig, Path("configs/nlvr.yaml")

    @staticmethod
    def towers(model: BlipNlvr) -> list[Sequence[nn.Module]]:
        return [model.visual_encoder.blocks, model.text_encoder.encoder.layer]

    @staticmethod
    def inputs(config: NlvrConfig, batch_size: int) -> Inputs:
        size, tokens = config.image_size, min(REFERENCE_TEXT_TOKENS, config.bert_sizes.max_position_embeddings)
        ids = torch.randint(5, 30, (batch_size, tokens))
        return torch.randn(batch_size, 2, 3, size, size), ids, torch.ones_like(ids)

    @staticmethod
    def note(inputs: Inputs) -> str:
        """What a reader should know of the inputs."""
        return ""

    @staticmethod
    def run(model: BlipNlvr, inputs: Inputs, setting: PruneSetting, packed: bool, align: bool = False):
        return model(*inputs, setting, align, packed)

    @staticmethod
    def loss(model: BlipNlvr, output) -> Tensor:
        task = output.logits.float().square().mean()
        return task if output.similarity is None else task + output.similarity

    @staticmethod
    def gflops(model: BlipNlvr, output, setting: PruneSetting) -> Tensor:
        return model.gflops(output, setting)

    @staticmethod
    def record(output) -> TowerRecord:
        return output.vision


class Image(Nlvr):
    """An image, and the image encoder alone."""

    @staticmethod
    def inputs(config: NlvrConfig, batch_size: int) -> Inputs:
        return (torch.randn(batch_size, 3, config.image_size, config.image_size),)

    @staticmethod
    def run(model: BlipNlvr, inputs: Inputs, setting: PruneSetting, packed: bool, align: bool = False):
        return model.visual_encoder(*inputs, model.learnable_tokens, setting, align, packed)

    @staticmethod
    def loss(model: BlipNlvr, output) -> Tensor:
        return mean_square(output[0], output[2])

    @staticmethod
    def gflops(model: BlipNlvr, output, setting: PruneSetting) -> Tensor:
        return model.visual_encoder.flops(output[2], setting).double() / GIGA

    @staticmethod
    def record(output) -> TowerRecord:
        return output[2]


class ClipImage(Image):
    """An image, and CLIP's image encoder alone."""

    config, path = ClipRetrievalConfig, Path("configs/retrieval_flickr_clip.yaml")

    @staticmethod
    def built(config: ClipRetrievalConfig) -> AlignedModel:
        """The image tower alone: at real size, all that training needs beside it is three gigabytes."""
        model = AlignedModel()
        model.visual = VisionTower(ClipSize(config.image_size, **config.clip.model_dump()), pruner_factory(config))
        model.init_learnable_tokens(learnable_tokens(config))
        return model

    @staticmethod
    def towers(model: AlignedModel) -> list[Sequence[nn.Module]]:
        return [model.visual.transformer.resblocks]

    @staticmethod
    def run(model: AlignedModel, inputs: Inputs, setting: PruneSetting, packed: bool, align: bool = False) -> Encoded:
        return model.visual(*inputs, model.learnable_tokens, setting, align, packed)

    @staticmethod
    def loss(model: AlignedModel, output: Encoded) -> Tensor:
        return mean_square(output.feature, output.record)

    @staticmethod
    def gflops(model: AlignedModel, output: Encoded, setting: PruneSetting) -> Tensor:
        return model.visual.flops(output, setting).double() / GIGA

    @staticmethod
    def record(output: Encoded) -> TowerRecord:
        return output.record


class OneBlock(Nlvr):
    """The tokens that enter a block of the image encoder, and that block alone."""

    @staticmethod
    def towers(model: BlipNlvr) -> list[Sequence[nn.Module]]:
        return [model.visual_encoder.blocks[:1]]

    @staticmethod
    def inputs(config: NlvrConfig, batch_size: int) -> Inputs:
        tokens = 1 + (config.image_size // config.vit_sizes.patch_size) ** 2
        return (torch.randn(batch_size, tokens, config.vit_sizes.embed_dim),)

    @staticmethod
    def run(model: BlipNlvr, inputs: Inputs, setting: PruneSetting, packed: bool, align: bool = False) -> TowerRecord:
        x, layout = pack(inputs[0], None) if packed else (inputs[0], None)
        before = count_tokens(x, layout)
        x, layout, kept, features = model.visual_encoder.blocks[0](x, layout, model.learnable_tokens, setting.at(0), align)
        record = TowerRecord(packed=packed, scored_again=scored_again(x, layout, model.visual_encoder.blocks[0].attn.num_heads))
        record.add(before, count_tokens(x, layout), kept, features)
        return record

    @staticmethod
    def gflops(model: BlipNlvr, output: TowerRecord, setting: PruneSetting) -> Tensor:
        ran = output.ran(setting.at(0) is not None, training=False)
        return model.visual_encoder.blocks[0].flops(output.entering[0], output.leaving[0], ran).double() / GIGA

    @staticmethod
    def record(output: TowerRecord) -> TowerRecord:
        return output


def mean_square(output: Tensor, record: TowerRecord) -> Tensor:
    """A loss that reaches all of an encoder, its alignment features too."""
    task = output.float().square().mean()
    return task if record.features is None else task + record.features.float().square().mean()


WORKLOADS = {"nlvr": Nlvr, "vit": Image, "block": OneBlock, "retrieval_clip": ClipImage}
