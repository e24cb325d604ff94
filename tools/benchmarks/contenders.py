"""The methods that tools/benchmark.py times: dense and pruned models, models of other libraries, and ways of ranking."""

import argparse
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import nn

from clip.model import MLP_RATIO
from configs.load import load_config
from configs.schema import Config
from engine.sparse_inference import sparse_kernels
from engine.train import Precision
from madtp.blocks import Guidance
from madtp.rule import OFF, PruneSetting
from madtp.sparsity.kernels import PATTERN
from madtp.sparsity.layers import sparse_weights
from madtp.sparsity.masks import SparseWeights
from models.weights.reading import read_checkpoint
from tasks import registry
from tools.benchmarks.rankings import RANKINGS
from tools.benchmarks.workloads import WORKLOADS, ClipImage, Forward, Inputs, Method, Prepare
from utils import UserError

LIVELY = 0.1  # standard deviation of random learnable tokens; large enough that token attention is not uniform
BISECTIONS = 12
PRUNED = (0.5, 0.7, 0.8)  # shares of the GFLOPs to remove by default
TASKS = WORKLOADS | RANKINGS
SPARSE_TASKS = ("nlvr", "vit")


def build_methods(args: argparse.Namespace, device: torch.device) -> list[Method]:
    """Builds the methods to compare. The first one is the reference of the speed-ups."""
    if args.task in RANKINGS:
        return ranking_methods(args, device)
    names = args.against.split(",")
    known = {"dense": dense_method, "compiled": compiled_method, "timm": timm_method, "transformers": transformers_method}
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--against {unknown[0]}: not known; choose from {', '.join(known)}")
    if args.train and (args.task == "block" or set(names) != {"dense"}):
        raise UserError("--train: times only whole models of this project; leave out --against and --task block")
    if args.sparse:
        check_sparse(args)
    if args.train and args.profile:
        raise UserError("--profile: times the parts of forward passes; leave out --train")
    if args.train and args.metered:
        raise UserError("--metered: training counts nothing; leave out --train")
    names = [name for name in names if name != "dense"]
    dense = dense_method(args, device)
    methods = [dense, *(known[name](args, device) for name in names)]
    for p in strengths(args):
        methods += pruned_methods(args, device, p, dense.gflops)
    return methods + (sparse_methods(args, device, dense.gflops) if args.sparse else [])


def strengths(args: argparse.Namespace) -> list[float | None]:
    """Returns the shares of the GFLOPs to remove; a single None if --keep-schedule or --temperature determine the pruning."""
    return [None] if args.keep_schedule or args.temperature is not None else [p for p in args.p if p > 0]


def ranking_methods(args: argparse.Namespace, device: torch.device) -> list[Method]:
    refused = {"--p": args.p != PRUNED, "--against": args.against != "dense", "--keep-schedule": args.keep_schedule}
    refused |= {"--temperature": args.temperature, "--train": args.train, "--metered": args.metered, "--sparse": args.sparse}
    if given := [name for name, value in refused.items() if value]:
        raise UserError(f"{given[0]}: task {args.task} compares ways of running the uncompressed model; leave it out")
    config = dense_config(args)
    model = loaded(args, config).eval().to(device)
    return RANKINGS[args.task].methods(config, model, random_inputs(args, 1, device))


def loaded(args: argparse.Namespace, config: Config) -> nn.Module:
    if args.task == "retrieval_clip":
        if args.pretrained:
            raise UserError("--pretrained: task retrieval_clip is timed with random weights; leave it out")
        return ClipImage.built(config)
    task = registry.TASKS[config.task]
    model, _ = task.reference_case(config)
    if args.pretrained:
        task.load(model, read_checkpoint(args.pretrained)["model"], args.pretrained)
    return model


def model_of(args: argparse.Namespace, p: float) -> nn.Module:
    keys = {"p": p, "keep": "instance", "sd_init_std": LIVELY, "prune_every": args.prune_every}
    config = load_config(WORKLOADS[args.task].config, args.config, keys)
    return loaded(args, config).train(args.train)


def random_inputs(args: argparse.Namespace, batch_size: int, device: torch.device) -> Inputs:
    return tuple(part.to(device) for part in TASKS[args.task].inputs(dense_config(args), batch_size))


def dense_config(args: argparse.Namespace) -> Config:
    candidates = {"k_test": args.candidates} if args.candidates else {}
    return load_config(TASKS[args.task].config, args.config, {"p": 0.0, **candidates})


def forward_of(args: argparse.Namespace, model: nn.Module, setting: PruneSetting, packed: bool):
    """Returns a function from inputs to the pass to time: a forward pass, or with --train a forward and backward pass."""
    workload = WORKLOADS[args.task]
    if not args.train:
        return lambda inputs: lambda: workload.run(model, inputs, Guidance(setting, packed=packed))

    def step(inputs: Inputs) -> None:
        model.zero_grad(set_to_none=True)
        with torch.enable_grad():
            # As in training, dense models are packed on a CPU too: their decoders then save padding as well.
            output = workload.run(model, inputs, Guidance(setting, align=packed, packed=inputs[0].device.type == "cpu"))
            workload.loss(model, output).backward()

    return lambda inputs: lambda: step(inputs)


def cost_of(args: argparse.Namespace, model: nn.Module, setting: PruneSetting, packed: bool) -> tuple[float, tuple[float, ...]]:
    """Returns the GFLOPs of a sample and the tokens after each image block, measured on a batch of one."""
    workload = WORKLOADS[args.task]
    device = next(model.parameters()).device
    with Precision(device, args.amp).autocast():  # autocast decides the attention kernel, and thereby the cost of scores
        output = workload.run(model, random_inputs(args, 1, device), Guidance(setting, packed=packed))
        gflops = float(workload.gflops(model, output).mean())
    return gflops, tuple(float(n.double().mean()) for n in workload.record(output).leaving)


def blocks_of(args: argparse.Namespace, model: nn.Module) -> list[nn.Module]:
    return [block for tower in WORKLOADS[args.task].towers(model) for block in tower]


def dense_method(args: argparse.Namespace, device: torch.device) -> Method:
    model = model_of(args, 0.0).to(device)
    forward_with = of_one_shape(forward_of(args, model, OFF, False))
    return Method("dense", 0.0, forward_with, *cost_of(args, model, OFF, False), blocks=blocks_of(args, model))


def compiled_method(args: argparse.Namespace, device: torch.device) -> Method:
    model = model_of(args, 0.0).to(device)
    compiled = torch.compile(lambda inputs: WORKLOADS[args.task].run(model, inputs, Guidance()), dynamic=False)
    forward_with = of_one_shape(lambda inputs: lambda: compiled(inputs))
    return Method("compiled", 0.0, forward_with, *cost_of(args, model, OFF, False))


def of_one_shape(forward_with: Prepare) -> Prepare:
    """Allows cuDNN's attention in passes whose shapes never change. `init_run` switches it off, because pruning changes shapes."""

    def prepare(inputs: Inputs) -> Forward:
        forward = forward_with(inputs)

        def run() -> object:
            torch.backends.cuda.enable_cudnn_sdp(True)
            try:
                return forward()
            finally:
                torch.backends.cuda.enable_cudnn_sdp(False)

        return run

    return prepare


def timm_method(args: argparse.Namespace, device: torch.device) -> Method:
    import timm

    if args.task != "vit":
        raise UserError(f"--against timm: has no model for task {args.task}; compare image encoders with --task vit")
    config = dense_config(args)
    size = config.vit_sizes
    model = timm.models.VisionTransformer(
        config.image_size, size.patch_size, num_classes=0, global_pool="", embed_dim=size.embed_dim, depth=size.depth,
        num_heads=size.num_heads, mlp_ratio=size.mlp_ratio,
    )  # fmt: skip
    return foreign("timm", model, device)


def transformers_method(args: argparse.Namespace, device: torch.device) -> Method:
    from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel, ViTConfig, ViTModel

    config = dense_config(args)
    if args.task == "vit":
        size = config.vit_sizes
        settings = ViTConfig(
            hidden_size=size.embed_dim, num_hidden_layers=size.depth, num_attention_heads=size.num_heads,
            intermediate_size=int(size.embed_dim * size.mlp_ratio), image_size=config.image_size, patch_size=size.patch_size,
            attn_implementation="sdpa",
        )  # fmt: skip
        return foreign("transformers", ViTModel(settings, add_pooling_layer=False), device)
    if args.task == "retrieval_clip":
        size = config.clip
        shared = {
            "hidden_size": size.vision_width, "num_hidden_layers": size.vision_layers, "num_attention_heads": size.vision_heads,
            "intermediate_size": size.vision_hidden or MLP_RATIO * size.vision_width, "image_size": config.image_size,
            "patch_size": size.patch_size, "attn_implementation": "sdpa",
        }  # fmt: skip
        if size.family == "siglip":
            return foreign("transformers", SiglipVisionModel(SiglipVisionConfig(**shared)), device)
        return foreign("transformers", CLIPVisionModel(CLIPVisionConfig(**shared, projection_dim=size.embed_dim)), device)
    raise UserError(
        f"--against transformers: has no model for task {args.task}; compare image encoders with --task vit or retrieval_clip"
    )


def foreign(name: str, model: nn.Module, device: torch.device) -> Method:
    """Returns the method of another library's model."""
    model = model.eval().to(device)
    return Method(name, 0.0, of_one_shape(lambda inputs: lambda: model(*inputs)))


def pruned_methods(args: argparse.Namespace, device: torch.device, p: float | None, dense: float) -> list[Method]:
    """Builds this project's packed model at `p` or with --keep-schedule; with --metered also a method that counts its GFLOPs.

    `dense` is the GFLOPs of a sample without pruning.
    """
    workload = WORKLOADS[args.task]
    model = model_of(args, 0.5).to(device)
    setting = prune(args, model, p, dense)
    gflops, keep = cost_of(args, model, setting, True)
    forward_with, blocks = forward_of(args, model, setting, True), blocks_of(args, model)
    pruned = Method("madtp", round(1 - gflops / dense, 4), forward_with, gflops, keep, blocks=blocks)

    def metered(inputs: Inputs) -> list[float]:
        return workload.gflops(model, workload.run(model, inputs, Guidance(setting, packed=True))).tolist()

    if not args.metered:
        return [pruned]
    return [pruned, replace(pruned, name="metered", prepare=lambda inputs: lambda: metered(inputs))]


def prune(args: argparse.Namespace, model: nn.Module, p: float | None, dense: float) -> PruneSetting:
    """Fixes the share of tokens that blocks keep, so that p of the `dense` GFLOPs are removed, or by --keep-schedule.

    Returns the setting to run with. Its temperature has no effect when shares are fixed.
    """
    if p is not None:
        impose(args, model, share_for(args, model, dense * (1 - p)))
    elif args.keep_schedule:
        schedule, blocks = args.keep_schedule, len(WORKLOADS[args.task].towers(model)[0])
        if len(schedule) != blocks:
            raise UserError(f"--keep-schedule: {len(schedule)} shares for {blocks} blocks; give one per block")
        impose(args, model, *schedule)
    return PruneSetting(1.0 if args.temperature is None else args.temperature)


def check_sparse(args: argparse.Namespace) -> None:
    if args.train or args.task not in SPARSE_TASKS:
        raise UserError(f"--sparse, --shapes: 2:4 weights are timed only in inference, for --task {' or '.join(SPARSE_TASKS)}")


def sparse_methods(args: argparse.Namespace, device: torch.device, dense: float) -> list[Method]:
    return [sparse_method(args, *contender, dense) for contender in sparse_models(args, device, dense)]


def sparse_models(
    args: argparse.Namespace, device: torch.device, dense: float
) -> Iterator[tuple[str, nn.Module, SparseWeights, PruneSetting]]:
    """Yields models with 2:4 weights: one with all tokens, and for each p that weights alone do not reach, one that also prunes."""
    model, sparse = masked_model(args, 0.0, device)
    yield "2:4", model, sparse, OFF
    alone, _ = cost_of(args, model, OFF, False)
    for p in strengths(args):
        if p is None or dense * (1 - p) < alone:
            model, sparse = masked_model(args, 0.5, device)
            yield "madtp+2:4", model, sparse, prune(args, model, p, dense)


def masked_model(args: argparse.Namespace, p: float, device: torch.device) -> tuple[nn.Module, SparseWeights]:
    """Builds a model with `model_of`, and masks its weights by magnitude."""
    model = model_of(args, p).to(device)
    sparse = sparse_weights(model, PATTERN, "all")
    sparse.select(sparse.weights)
    sparse.fix()
    return model, sparse


def sparse_method(
    args: argparse.Namespace, name: str, model: nn.Module, sparse: SparseWeights, setting: PruneSetting, dense: float
) -> Method:
    """Returns the method of a model with sparse weights. `prepare` picks sparse kernels for layers where they are faster."""
    packed = setting.temperature is not None
    gflops, keep = cost_of(args, model, setting, packed)
    forward_with, kernels = forward_of(args, model, setting, packed), ExitStack()
    forward_with = forward_with if packed else of_one_shape(forward_with)

    def prepare(inputs: Inputs) -> Forward:
        kernels.close()
        forward = forward_with(inputs)
        used = kernels.enter_context(sparse_kernels(True, model, sparse, inputs[0].device, forward))["used"]
        method.note = f"{name}: {used} layers on sparse kernels" if used else f"{name}: dense kernels multiply zeros"
        return forward

    method = Method(name, round(1 - gflops / dense, 4), prepare, gflops, keep)
    return method


def impose(args: argparse.Namespace, model: nn.Module, *shares: float) -> None:
    """Fixes the share of tokens that each block keeps, in all towers. `shares` is one for all blocks, or one per block."""
    for tower in WORKLOADS[args.task].towers(model):
        for index, block in enumerate(tower):
            pruner = block.pruner
            pruner.rule = replace(pruner.rule, share=shares[min(index, len(shares) - 1)])


def share_for(args: argparse.Namespace, model: nn.Module, target: float) -> float:
    """Finds, by bisection, the share kept in all blocks at which a sample costs `target` GFLOPs."""
    low, high = 0.01, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        impose(args, model, middle)
        low, high = (middle, high) if cost_of(args, model, PruneSetting(1.0), True)[0] < target else (low, middle)
    return (low + high) / 2
