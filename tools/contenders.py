"""What tools/benchmark.py times: tasks (a model whole, a tower, a block) and methods (dense, pruned, other libraries' models)."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from config import NlvrConfig
from madtp.flops import GIGA
from madtp.packing import pack
from madtp.pruning import OFF, PruneSetting, TokenPruner
from models.attention import scored_again
from models.blip_nlvr import REFERENCE_TEXT_TOKENS, BlipNlvr
from models.build import nlvr_from_config
from models.pretrained import load_nlvr_weights, read_checkpoint
from models.tower import TowerRecord, count_tokens
from options import load_config
from tools.flops import BERT_VOCABULARY
from utils import UserError

LIVELY = 0.1  # standard deviation of random learnable tokens: alignment that is not flat
BISECTIONS = 12

Forward = Callable[[], object]


@dataclass
class Method:
    """A model to time: `prepare(inputs)` gives the forward pass, GFLOPs and kept tokens are of one sample."""

    name: str
    p: float
    prepare: Callable[[tuple[Tensor, ...]], Forward]
    gflops: float | None = None
    keep: tuple[float, ...] = ()


class Nlvr:
    """Two images and a text."""

    @staticmethod
    def inputs(config: NlvrConfig, batch_size: int) -> tuple[Tensor, ...]:
        size, tokens = config.image_size, min(REFERENCE_TEXT_TOKENS, config.bert_sizes.max_position_embeddings)
        ids = torch.randint(5, 30, (batch_size, tokens))
        return torch.randn(batch_size, 2, 3, size, size), ids, torch.ones_like(ids)

    @staticmethod
    def run(model: BlipNlvr, inputs: tuple[Tensor, ...], setting: PruneSetting, packed: bool, align: bool = False):
        return model(*inputs, setting, align, packed)

    @staticmethod
    def loss(model: BlipNlvr, output) -> Tensor:
        task = output.logits.float().square().mean()
        return task if output.vision.features is None else task + model.similarity(output)

    @staticmethod
    def cost(model: BlipNlvr, output, setting: PruneSetting) -> tuple[float, TowerRecord]:
        return float(model.gflops(output, setting).mean()), output.vision


class Vit:
    """An image, and the image encoder alone."""

    @staticmethod
    def inputs(config: NlvrConfig, batch_size: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch_size, 3, config.image_size, config.image_size),)

    @staticmethod
    def run(model: BlipNlvr, inputs: tuple[Tensor, ...], setting: PruneSetting, packed: bool, align: bool = False):
        return model.visual_encoder(*inputs, model.learnable_tokens, setting, align, packed)

    @staticmethod
    def loss(model: BlipNlvr, output) -> Tensor:
        tokens, _, record = output
        task = tokens.float().square().mean()
        return task if record.features is None else task + record.features.float().square().mean()

    @staticmethod
    def cost(model: BlipNlvr, output, setting: PruneSetting) -> tuple[float, TowerRecord]:
        return float(model.visual_encoder.flops(output[2], setting).double().mean() / GIGA), output[2]


class OneBlock:
    """The tokens that enter a block of the image encoder, and that block alone."""

    @staticmethod
    def inputs(config: NlvrConfig, batch_size: int) -> tuple[Tensor, ...]:
        tokens = 1 + (config.image_size // config.vit_sizes.patch_size) ** 2
        return (torch.randn(batch_size, tokens, config.vit_sizes.embed_dim),)

    @staticmethod
    def run(model: BlipNlvr, inputs: tuple[Tensor, ...], setting: PruneSetting, packed: bool):
        x, layout = pack(inputs[0], None) if packed else (inputs[0], None)
        before = count_tokens(x, layout)
        temperature = setting.at(0)
        x, layout, kept, _ = model.visual_encoder.blocks[0](x, layout, model.learnable_tokens, temperature, False)
        record = TowerRecord(packed=packed, scored_again=scored_again(x, layout))
        record.add(before, count_tokens(x, layout), kept, None)
        return record

    @staticmethod
    def cost(model: BlipNlvr, record: TowerRecord, setting: PruneSetting) -> tuple[float, TowerRecord]:
        ran = record.ran(setting.at(0) is not None, training=False)
        total = model.visual_encoder.blocks[0].flops(record.entering[0], record.leaving[0], ran)
        return float(total.double().mean() / GIGA), record


TASKS = {"nlvr": Nlvr, "vit": Vit, "block": OneBlock}


def build_methods(args: argparse.Namespace, device: torch.device) -> list[Method]:
    names = args.against.split(",")
    known = {"dense": dense_method, "compiled": compiled_method, "timm": timm_method, "transformers": transformers_method}
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--against {unknown[0]}: not known; choose of {', '.join(known)}")
    if args.train and (args.task == "block" or set(names) != {"dense"}):
        raise UserError("--train: times the models of this project alone, of task nlvr or vit")
    names = ["dense", *(name for name in names if name != "dense")]  # what the others are measured by comes first
    methods = [known[name](args, device) for name in names]
    if args.keep_schedule or args.temperature:
        return [*methods, pruned_method(args, device, None)]
    return methods + [pruned_method(args, device, p) for p in args.p if p > 0]


def model_of(args: argparse.Namespace, p: float) -> BlipNlvr:
    config = load_config(NlvrConfig, args.config, {"p": p, "keep": "instance", "sd_init_std": LIVELY})
    model = nlvr_from_config(config, BERT_VOCABULARY).train(args.train)
    if args.pretrained:
        load_nlvr_weights(model, read_checkpoint(args.pretrained)["model"], args.pretrained)
    return model


def random_inputs(args: argparse.Namespace, batch_size: int, device: torch.device) -> tuple[Tensor, ...]:
    config = load_config(NlvrConfig, args.config, {"p": 0.0})
    return tuple(part.to(device) for part in TASKS[args.task].inputs(config, batch_size))


def forward_of(args: argparse.Namespace, model: BlipNlvr, setting: PruneSetting, packed: bool):
    """inputs -> the pass that is timed of a task's model."""
    task = TASKS[args.task]
    if not args.train:
        return lambda inputs: lambda: task.run(model, inputs, setting, packed)

    def step(inputs: tuple[Tensor, ...]) -> None:
        model.zero_grad(set_to_none=True)
        with torch.enable_grad():
            output = task.run(model, inputs, setting, packed and inputs[0].device.type == "cpu", align=packed)
            task.loss(model, output).backward()

    return lambda inputs: lambda: step(inputs)


def cost_of(args: argparse.Namespace, model: BlipNlvr, setting: PruneSetting, packed: bool) -> tuple[float, tuple[float, ...]]:
    """GFLOPs of a sample and the tokens after each image block, from a batch of one."""
    inputs = random_inputs(args, 1, next(model.parameters()).device)
    gflops, record = TASKS[args.task].cost(model, TASKS[args.task].run(model, inputs, setting, packed), setting)
    return gflops, tuple(float(n.double().mean()) for n in record.leaving)


def dense_method(args: argparse.Namespace, device: torch.device) -> Method:
    model = model_of(args, 0.0).to(device)
    return Method("dense", 0.0, forward_of(args, model, OFF, False), *cost_of(args, model, OFF, False))


def compiled_method(args: argparse.Namespace, device: torch.device) -> Method:
    model = model_of(args, 0.0).to(device)
    compiled = torch.compile(lambda inputs: TASKS[args.task].run(model, inputs, OFF, False))
    return Method("compiled", 0.0, lambda inputs: lambda: compiled(inputs), *cost_of(args, model, OFF, False))


def timm_method(args: argparse.Namespace, device: torch.device) -> Method:
    import timm

    config = vit_only(args, "timm")
    size = config.vit_sizes
    model = timm.models.VisionTransformer(
        config.image_size, size.patch_size, num_classes=0, global_pool="", embed_dim=size.embed_dim, depth=size.depth,
        num_heads=size.num_heads, mlp_ratio=size.mlp_ratio,
    )  # fmt: skip
    model = model.eval().to(device)
    return Method("timm", 0.0, lambda inputs: lambda: model(*inputs))


def transformers_method(args: argparse.Namespace, device: torch.device) -> Method:
    from transformers import ViTConfig, ViTModel

    config = vit_only(args, "transformers")
    size = config.vit_sizes
    settings = ViTConfig(
        hidden_size=size.embed_dim, num_hidden_layers=size.depth, num_attention_heads=size.num_heads,
        intermediate_size=int(size.embed_dim * size.mlp_ratio), image_size=config.image_size, patch_size=size.patch_size,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = ViTModel(settings, add_pooling_layer=False).eval().to(device)
    return Method("transformers", 0.0, lambda inputs: lambda: model(*inputs))


def vit_only(args: argparse.Namespace, name: str) -> NlvrConfig:
    if args.task != "vit":
        raise UserError(f"--against {name}: has no model of task {args.task}; compare image encoders with --task vit")
    return load_config(NlvrConfig, args.config, {"p": 0.0})


def pruned_method(args: argparse.Namespace, device: torch.device, p: float | None) -> Method:
    """This project's packed model at `p`, or under --keep-schedule."""
    dense = cost_of(args, model_of(args, 0.0).to(device), OFF, False)[0]
    model = model_of(args, 0.5).to(device)
    setting = PruneSetting(args.temperature or 1.0)  # which temperature does not matter where the share is imposed
    if p is not None:
        impose(model, share_for(args, model, dense * (1 - p)))
    elif args.keep_schedule:
        schedule = args.keep_schedule
        blocks = 1 if args.task == "block" else model.visual_encoder.depth
        if len(schedule) != blocks:
            raise UserError(f"--keep-schedule: {len(schedule)} shares for {blocks} blocks; give one a block")
        impose(model, *schedule)
    gflops, keep = cost_of(args, model, setting, True)
    return Method("madtp", round(1 - gflops / dense, 4), forward_of(args, model, setting, True), gflops, keep)


def impose(model: BlipNlvr, *shares: float) -> None:
    """The share that each block keeps, in both towers; one for all, or one a block."""
    for tower in (model.visual_encoder.blocks, model.text_encoder.encoder.layer):
        for index, block in enumerate(tower):
            pruner: TokenPruner = block.pruner
            pruner.rule = replace(pruner.rule, share=shares[min(index, len(shares) - 1)])


def share_for(args: argparse.Namespace, model: BlipNlvr, target: float) -> float:
    """The share, the same in all blocks, at which a sample costs `target` GFLOPs."""
    low, high = 0.01, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        impose(model, middle)
        low, high = (middle, high) if cost_of(args, model, PruneSetting(1.0), True)[0] < target else (low, middle)
    return (low + high) / 2
