"""The deployment form in an inference engine, for tools/benchmark.py: dense and pruned models in one engine and precision."""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from madtp.blocks import Encoded, Guidance
from madtp.deploy import fixed_record
from madtp.flops import GIGA
from madtp.pruning import WHOLE
from madtp.rule import OFF, PruneSetting
from models.blip_nlvr import NlvrOutput
from tasks.task import Inputs
from tools.benchmarks.contenders import BISECTIONS, cost_of, model_of, random_inputs, strengths
from tools.benchmarks.workloads import WORKLOADS, Forward, Method
from tools.exports.engines import needed, opened_engine
from tools.exports.parts import Part, clip_image_part, image_part, nlvr_part
from tools.exports.writing import check, quantise_onnx, quantise_openvino, write_onnx, write_openvino
from utils import UserError

ENGINES = {
    "torch": ("fp32", "bf16"), "compile": ("fp32", "bf16"), "onnxruntime": ("fp32", "int8"), "openvino": ("fp32", "bf16", "int8"),
}  # fmt: skip
PARTS: dict[str, Callable[[nn.Module, Guidance, int], Part]] = {
    "nlvr": nlvr_part, "vit": image_part, "retrieval_clip": clip_image_part,
}  # fmt: skip
ON = PruneSetting(0.0)
CALIBRATION = 4  # samples of noise that find the ranges of a quantised model
CHECKED = 2  # samples that are compared with PyTorch


def engine_methods(args: argparse.Namespace, device: torch.device) -> list[Method]:
    """Builds the dense model and one for each p, whose blocks keep a fixed share of the tokens, in the engine of the arguments."""
    check_engine(args)
    dense = engine_method(args, "dense", model_of(args, 0.0).to(device), OFF, None)
    methods = [dense]
    for p in strengths(args):
        model = model_of(args, 0.5).to(device)
        entering = tokens_entering(args, model)
        shares = args.keep_schedule if p is None else (share_for(args, model, entering, dense.gflops * (1 - p)),)
        fix_shares(args, model, entering, *shares)
        methods.append(engine_method(args, "fixed", model, ON, dense.gflops))
    return methods


def check_engine(args: argparse.Namespace) -> None:
    refused = {"--train": args.train, "--metered": args.metered, "--sparse": args.sparse, "--shapes": args.shapes}
    refused |= {"--amp": args.amp, "--temperature": args.temperature, "--against": args.against != "dense"}
    if given := [name for name, value in refused.items() if value]:
        raise UserError(f"{given[0]}: does not go with --engine, which compares dense with fixed numbers of tokens; leave it out")
    if args.task not in PARTS:
        raise UserError(f"--engine: is for --task {', '.join(PARTS)}")
    if args.precision not in ENGINES[args.engine]:
        known = " or ".join(ENGINES[args.engine])
        raise UserError(f"--precision {args.precision}: engine {args.engine} runs {known} here; choose one, or another engine")
    if args.device != "cpu" and RUNNERS[args.engine] is in_file:
        raise UserError(f"--device {args.device}: engine {args.engine} runs on the CPU here; use --device cpu")


def engine_method(args: argparse.Namespace, name: str, model: nn.Module, setting: PruneSetting, dense: float | None) -> Method:
    """Returns the method of a model; `dense` is the GFLOPs of a sample without pruning, None for the dense model itself."""
    gflops, keep = cost_of(args, model, setting, False)
    inputs = random_inputs(args, 3, torch.device(args.device))
    part = PARTS[args.task](model, Guidance(setting, learnable_tokens=model.learnable_tokens), text_tokens(inputs))
    run, note = RUNNERS[args.engine](args, part, tuple(part.select(inputs)))

    select = part.select  # alone: an exported file needs the weights no more

    def prepare(inputs: Inputs) -> Forward:
        given = select(inputs)
        return lambda: run(*given)

    return Method(name, 0.0 if dense is None else round(1 - gflops / dense, 4), prepare, gflops, keep, note=note)


def text_tokens(inputs: Inputs) -> int:
    return inputs[1].shape[1] if len(inputs) > 1 else 0


def in_torch(args: argparse.Namespace, part: Part, example: Inputs) -> tuple[Callable, str]:
    return part.module, ""


def compiled(args: argparse.Namespace, part: Part, example: Inputs) -> tuple[Callable, str]:
    # On a GPU in CUDA graphs: the launches of a small batch take longer than its work.
    mode = "reduce-overhead" if args.device.startswith("cuda") else None
    return torch.compile(part.module, dynamic=False, mode=mode), ""


def in_file(args: argparse.Namespace, part: Part, example: Inputs) -> tuple[Callable, str]:
    """Exports a part and opens it in its engine. Returns it with a note on its deviation from PyTorch in fp32.

    In fewer bits, other tokens are as good as those of random weights and noise, and a deviation says nothing.
    """
    samples = [tuple(part.select(random_inputs(args, 1, torch.device("cpu")))) for _ in range(CALIBRATION)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{part.name}.onnx"
        write_onnx(part, example, path)
        if args.engine == "openvino":
            write_openvino(path, path.with_suffix(".xml"))
            path = path.with_suffix(".xml")
        if args.precision == "int8":
            exact, path = path, path.with_stem(f"{part.name}_int8")
            if args.engine == "openvino":
                quantise_openvino(exact, path, part, samples)
            else:
                quantise_onnx(exact, path)
        engine = opened_engine(path, args.precision)
        return engine, str(check(part, engine, samples, CHECKED)) if args.precision == "fp32" else ""


RUNNERS = {"torch": in_torch, "compile": compiled, "onnxruntime": in_file, "openvino": in_file}


def engine_version(name: str) -> str:
    return torch.__version__ if name in ("torch", "compile") else needed(name).__version__.partition("-")[0]


def fix_shares(args: argparse.Namespace, model: nn.Module, entering: list[int], *shares: float) -> None:
    """Fixes the number of tokens that each block keeps, in all towers that run.

    Args:
        entering: tokens that enter each of these towers.
        shares: one for all blocks, or one per block.
    """
    towers = WORKLOADS[args.task].towers(model)
    if len(shares) not in (1, len(towers[0])):
        raise UserError(f"--keep-schedule: {len(shares)} shares for {len(towers[0])} blocks; give one per block")
    for tower, tokens in zip(towers, entering, strict=False):  # the image encoder comes first, and may run alone
        for index, block in enumerate(tower):
            pruner = block.pruner
            wanted = max(1, round((tokens - 1) * shares[min(index, len(shares) - 1)]))
            prunes = ON.at(index, pruner.rule) is not None and tokens - 1 - wanted >= 2  # for one token comes the merged one
            pruner.fixed = wanted if prunes else WHOLE
            tokens = tokens if pruner.fixed == WHOLE else 1 + wanted + pruner.rule.merge


def tokens_entering(args: argparse.Namespace, model: nn.Module) -> list[int]:
    """Returns the tokens that enter each tower that runs, class token included."""
    seen: list[int] = []
    towers = WORKLOADS[args.task].towers(model)
    hooks = [tower[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0].shape[1])) for tower in towers]
    WORKLOADS[args.task].run(model, random_inputs(args, 1, torch.device(args.device)), Guidance())
    for hook in hooks:
        hook.remove()
    return seen


def share_for(args: argparse.Namespace, model: nn.Module, entering: list[int], target: float) -> float:
    """Finds, by bisection, the share kept in all blocks at which a sample costs `target` GFLOPs."""
    low, high = 0.01, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        fix_shares(args, model, entering, middle)
        low, high = (middle, high) if gflops_of_counts(args, model, entering) < target else (low, middle)
    return (low + high) / 2


def gflops_of_counts(args: argparse.Namespace, model: nn.Module, entering: list[int]) -> float:
    """Returns the GFLOPs of a sample from the blocks' numbers of tokens, without a pass."""
    records = []
    for tower, tokens in zip(WORKLOADS[args.task].towers(model), entering, strict=False):
        samples = torch.full((2 if args.task == "nlvr" and not records else 1,), tokens)  # both images of a pair
        counts = [block.pruner.fixed for block in tower]
        records.append(fixed_record(counts, samples, tower[0].pruner.rule, ON, len(tower)))
    empty = torch.empty(0)
    if args.task == "nlvr":
        return float(model.gflops(NlvrOutput(empty, *records)))
    if args.task == "vit":
        return float(model.visual_encoder.flops(records[0])) / GIGA
    return float(model.visual.flops(Encoded(empty, None, empty, records[0]))) / GIGA
