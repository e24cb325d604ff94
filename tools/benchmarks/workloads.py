"""The workloads on which tools/benchmark.py compares pruned and dense models: a whole model, an image encoder, a single block.

`run` returns the output of a forward pass. From this output, `gflops` returns the cost of each sample, and `record` the TowerRecord
of the image encoder. `towers` returns the lists of blocks for which a share of kept tokens can be fixed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from configs.schema import CaptionConfig, ClipRetrievalConfig, NlvrConfig, VqaConfig
from madtp.attention.attend import recomputes_scores
from madtp.blocks import AlignedModel, Encoded, Guidance, TowerRecord, block_flops, run_blocks
from madtp.flops import GIGA
from madtp.packing import pack
from models.blip_caption import REFERENCE_TEXT_TOKENS as CAPTION_TOKENS
from models.blip_caption import BlipCaption, CaptionOutput
from models.blip_nlvr import REFERENCE_TEXT_TOKENS, BlipNlvr
from models.blip_vqa import QUESTION_TOKENS, BlipVqa, VqaOutput
from models.build import learnable_tokens, pruner_factory
from models.clip_retrieval import FAMILIES, clip_size
from utils import UserError

Inputs = tuple[Tensor, ...]
Forward = Callable[[], object]
Prepare = Callable[[Inputs], Forward]

ANSWER_LENGTHS = [3, 3, 4, 6]  # tokens of the answers to a question, [DEC] and [SEP] among them: annotators differ


@dataclass
class Method:
    """A method to time: `prepare(inputs)` returns the forward pass. `gflops` and `keep` (tokens kept) refer to one sample.

    blocks: all blocks of its model; empty where there are none to profile
    each: number of items in a sample that throughput counts
    note: a remark for the reader about the pass that was prepared last
    """

    name: str
    p: float
    prepare: Prepare
    gflops: float | None = None
    keep: tuple[float, ...] = ()
    blocks: Sequence[nn.Module] = ()
    each: int = 1
    note: str = ""


class Nlvr:
    """The workload of the whole BLIP-NLVR: two images and a text."""

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
        """Returns a remark for the reader about the inputs."""
        return ""

    @staticmethod
    def run(model: BlipNlvr, inputs: Inputs, guidance: Guidance):
        return model(*inputs, guidance)

    @staticmethod
    def loss(model: BlipNlvr, output) -> Tensor:
        task = output.logits.float().square().mean()
        return task if output.similarity is None else task + output.similarity

    @staticmethod
    def gflops(model: BlipNlvr, output) -> Tensor:
        return model.gflops(output)

    @staticmethod
    def record(output) -> TowerRecord:
        return output.vision


class Caption(Nlvr):
    """The workload of the whole captioning model: an image and its given caption."""

    config, path = CaptionConfig, Path("configs/caption_coco.yaml")

    @staticmethod
    def towers(model: BlipCaption) -> list[Sequence[nn.Module]]:
        return [model.visual_encoder.blocks]

    @staticmethod
    def inputs(config: CaptionConfig, batch_size: int) -> Inputs:
        ids = torch.randint(5, 30, (batch_size, CAPTION_TOKENS))
        return torch.randn(batch_size, 3, config.image_size, config.image_size), ids, torch.ones_like(ids)

    @staticmethod
    def loss(model: BlipCaption, output: CaptionOutput) -> Tensor:
        return sum(output.losses.values(), torch.zeros(()))

    @staticmethod
    def gflops(model: BlipCaption, output: CaptionOutput) -> Tensor:
        tokens = torch.full_like(output.vision.leaving[-1], CAPTION_TOKENS)
        return sum(model.gflops_by_module(output.vision, tokens).values(), torch.zeros(()))


class Vqa(Nlvr):
    """The workload of the whole model for questions: an image, a question and its given answers."""

    config, path = VqaConfig, Path("configs/vqa.yaml")

    @staticmethod
    def inputs(config: VqaConfig, batch_size: int) -> Inputs:
        most = config.bert_sizes.max_position_embeddings
        if QUESTION_TOKENS > most:
            raise UserError(f"--config: bert.max_position_embeddings is {most}; questions are timed with {QUESTION_TOKENS} tokens")
        ids = torch.randint(5, 30, (batch_size, QUESTION_TOKENS))
        lengths = torch.tensor(ANSWER_LENGTHS * batch_size)
        answers = torch.randint(5, 30, (len(lengths), max(ANSWER_LENGTHS)))
        mask = (torch.arange(answers.shape[1]) < lengths.unsqueeze(1)).long()
        counts = torch.full((batch_size,), len(ANSWER_LENGTHS))
        images = torch.randn(batch_size, 3, config.image_size, config.image_size)
        return images, ids, torch.ones_like(ids), answers * mask, mask, counts

    @staticmethod
    def loss(model: BlipVqa, output: VqaOutput) -> Tensor:
        task = output.answer_losses.mean()
        return task if output.similarity is None else task + output.similarity

    @staticmethod
    def gflops(model: BlipVqa, output: VqaOutput) -> Tensor:
        questions = len(output.question.valid)
        lengths = torch.tensor(ANSWER_LENGTHS * questions), torch.full((questions,), len(ANSWER_LENGTHS))
        lengths = (part.to(output.question.valid.device) for part in lengths)
        return sum(model.gflops_by_module(output.question, *lengths, questions).values(), torch.zeros(()))

    @staticmethod
    def record(output: VqaOutput) -> TowerRecord:
        return output.question.vision


class Image(Nlvr):
    """The workload of the image encoder alone, on an image."""

    @staticmethod
    def inputs(config: NlvrConfig, batch_size: int) -> Inputs:
        return (torch.randn(batch_size, 3, config.image_size, config.image_size),)

    @staticmethod
    def run(model: BlipNlvr, inputs: Inputs, guidance: Guidance):
        return model.visual_encoder(*inputs, model.guided(guidance))

    @staticmethod
    def loss(model: BlipNlvr, output) -> Tensor:
        return mean_square(output[0], output[2])

    @staticmethod
    def gflops(model: BlipNlvr, output) -> Tensor:
        return model.visual_encoder.flops(output[2]).double() / GIGA

    @staticmethod
    def record(output) -> TowerRecord:
        return output[2]


class ClipImage(Image):
    """The workload of the image encoder of CLIP or SigLIP alone, on an image."""

    config, path = ClipRetrievalConfig, Path("configs/retrieval_flickr_clip.yaml")

    @staticmethod
    def built(config: ClipRetrievalConfig) -> AlignedModel:
        """Builds only the image tower: at real size, the parts that only training needs would take three gigabytes."""
        model = AlignedModel()
        model.visual = FAMILIES[config.clip.family].image_tower(clip_size(config, 1), pruner_factory(config))
        model.init_learnable_tokens(learnable_tokens(config))
        return model

    @staticmethod
    def towers(model: AlignedModel) -> list[Sequence[nn.Module]]:
        return [model.visual.transformer.resblocks]

    @staticmethod
    def run(model: AlignedModel, inputs: Inputs, guidance: Guidance) -> Encoded:
        return model.visual(*inputs, model.guided(guidance))

    @staticmethod
    def loss(model: AlignedModel, output: Encoded) -> Tensor:
        return mean_square(output.feature, output.record)

    @staticmethod
    def gflops(model: AlignedModel, output: Encoded) -> Tensor:
        return model.visual.flops(output).double() / GIGA

    @staticmethod
    def record(output: Encoded) -> TowerRecord:
        return output.record


class OneBlock(Nlvr):
    """The workload of a single block of the image encoder, on tokens."""

    @staticmethod
    def towers(model: BlipNlvr) -> list[Sequence[nn.Module]]:
        return [model.visual_encoder.blocks[:1]]

    @staticmethod
    def inputs(config: NlvrConfig, batch_size: int) -> Inputs:
        tokens = 1 + (config.image_size // config.vit_sizes.patch_size) ** 2
        return (torch.randn(batch_size, tokens, config.vit_sizes.embed_dim),)

    @staticmethod
    def run(model: BlipNlvr, inputs: Inputs, guidance: Guidance) -> TowerRecord:
        blocks = model.visual_encoder.blocks[:1]
        x, layout = pack(inputs[0], None) if guidance.packed else (inputs[0], None)
        again = recomputes_scores(x, layout, blocks[0].attn.num_heads)
        return run_blocks(blocks, x, layout, model.guided(guidance), recomputes_scores=again)[2]

    @staticmethod
    def gflops(model: BlipNlvr, output: TowerRecord) -> Tensor:
        return block_flops(model.visual_encoder.blocks[:1], output).double() / GIGA

    @staticmethod
    def record(output: TowerRecord) -> TowerRecord:
        return output


def mean_square(output: Tensor, record: TowerRecord) -> Tensor:
    """Returns a loss whose gradient reaches all parts of an encoder, including its alignment features."""
    task = output.float().square().mean()
    return task if record.features is None else task + record.features.float().square().mean()


WORKLOADS = {"nlvr": Nlvr, "caption": Caption, "vqa": Vqa, "vit": Image, "block": OneBlock, "retrieval_clip": ClipImage}
