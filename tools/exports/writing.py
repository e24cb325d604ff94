"""Writing a part of a model as ONNX or OpenVINO, quantising it, and checking the file against PyTorch."""

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from madtp.rule import OFF
from tasks.task import Inputs
from tools.exports.engines import SUFFIXES, Engine, needed, opened_engine
from tools.exports.parts import Part
from utils import UserError

TOLERANCE = 1e-4  # largest deviation from PyTorch in fp32, relative to the largest value of a sample's output
ROUNDING = 1e-6  # relative size of a change of the inputs that is no more than rounding
TRIES = 4  # of such changes
CHECKED = 8  # samples that check a file by default
MOVING = ("Transpose", "Reshape", "Convert")  # layers of OpenVINO that move or convert values alone
LARGEST = 2**30  # bytes of weights in an .onnx file; more lie beside it, because its format ends at 2 GiB


@dataclass
class Check:
    """The deviation of a file from PyTorch.

    deviation: the largest one, relative to the largest value of a sample's output, over the decided samples
    samples: compared ones
    undecided: those left out: rounding alone makes PyTorch keep other tokens, because two are as important at the cut
    """

    engine: str
    version: str
    deviation: float
    samples: int
    undecided: int

    def __str__(self) -> str:
        left_out = f", {self.undecided} of them left out as ties" if self.undecided else ""
        return f"deviates from PyTorch by {self.deviation:.1e} in {self.engine} ({self.samples} samples{left_out})"


@torch.no_grad()
def write_onnx(part: Part, example: Inputs, path: Path) -> None:
    """Writes a part with a batch of any size. `example`: its inputs for a batch of two samples or more.

    Raises:
        UserError: when the model does not keep the batch free, or onnx or onnxscript is not installed.
    """
    needed("onnx"), needed("onnxscript")
    batch = torch.export.Dim("batch", min=1, max=4096)
    shapes = tuple({0: batch} for _ in example)
    # Exported first: given the module, torch.onnx would fall back on a fixed batch without saying so.
    program = torch.export.export(part.module.eval(), example, dynamic_shapes=shapes, strict=False)
    size = sum(tensor.numel() * tensor.element_size() for tensor in part.module.parameters())
    with quiet():
        written = torch.onnx.export(
            program, dynamo=True, input_names=list(part.inputs), output_names=list(part.outputs), verbose=False
        )
        written.save(str(path), external_data=size > LARGEST)


def write_openvino(onnx: Path, path: Path) -> None:
    """Converts an .onnx file to an .xml file with its .bin file."""
    openvino = needed("openvino")
    openvino.save_model(openvino.convert_model(onnx), path, compress_to_fp16=False)


def quantise_onnx(source: Path, path: Path) -> None:
    """Quantises weights ahead and activations as the file runs (onnxruntime's dynamic quantisation), per channel."""
    needed("onnxruntime")
    onnx = needed("onnx")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source, load_external_data=False)
    del model.graph.value_info[:]  # shapes that PyTorch 2.7 writes can contradict those that quantisation infers
    bare = source.with_name(f"{source.stem}_bare.onnx")  # beside the source, whose .data file it names
    onnx.save(model, bare)
    large = source.stat().st_size + sum(each.stat().st_size for each in source.parent.glob(f"{source.name}.data")) > LARGEST
    with quiet():
        quantize_dynamic(
            bare, path, op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8, per_channel=True,
            use_external_data_format=large,
        )  # fmt: skip
    bare.unlink()


def quantise_openvino(source: Path, path: Path, part: Part, samples: Sequence[Inputs]) -> None:
    """Quantises weights and activations by NNCF, with the ranges that activations take on `samples`, inputs of the part.

    In a model that prunes, the products that decide which tokens stay are left in full precision.
    """
    nncf, openvino = needed("nncf"), needed("openvino")
    nncf.set_log_level(logging.ERROR)
    dataset = nncf.Dataset(list(samples), lambda batch: {name: each.numpy() for name, each in zip(part.inputs, batch, strict=True)})
    model, guidance = openvino.Core().read_model(source), part.module.guidance
    exact = [] if guidance.setting == OFF else deciding_products(model, guidance.learnable_tokens)
    with quiet():
        model = nncf.quantize(
            model, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(samples),
            ignored_scope=nncf.IgnoredScope(names=exact),
        )  # fmt: skip
        openvino.save_model(model, path, compress_to_fp16=False)


def deciding_products(model: Any, learnable_tokens: Tensor | None) -> list[str]:
    """Returns the names of an OpenVINO model's products that the scores of tokens come from.

    These are products of two activations, of which the attention map is one, and those with the learnable tokens.
    """
    learnable = None if learnable_tokens is None else learnable_tokens.detach().cpu().numpy()
    found = []
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        factors = [each for each in map(_constant, node.input_values()) if each is not None]
        aligns = learnable is not None and any(np.array_equal(each, way) for each in factors for way in (learnable, learnable.T))
        if not factors or aligns:
            found.append(node.get_friendly_name())
    return found


def _constant(value: Any) -> Any | None:
    """Returns the array of a constant, also behind layers that only move its values; None for what depends on the input."""
    node = value.get_node()
    while node.get_type_name() in MOVING:
        node = node.input_value(0).get_node()
    return node.data if node.get_type_name() == "Constant" else None


@contextlib.contextmanager
def quiet():
    """Keeps what exporters and quantisers say about their progress off the terminal, their warnings of each operator too."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx", "root")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def write(
    part: Part, kind: str, int8: bool, folder: Path, samples: Sequence[Inputs], number: int = CHECKED
) -> tuple[Path, Check, Check | None]:
    """Writes a part and checks what was written against PyTorch.

    Args:
        kind: "onnx" or "openvino".
        samples: real inputs of the part, in batches; all calibrate the quantisation.
        number: of samples, the first ones, that check the file.
    Returns:
        the file, the check in fp32, and that of the quantised file if it is one.
    Raises:
        UserError: when the file in fp32 deviates by more than TOLERANCE, or a package is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{part.name}{'_int8' if int8 else ''}{SUFFIXES[kind]}"
    with tempfile.TemporaryDirectory() as place:
        plain = Path(place) / f"{part.name}.onnx"
        example = tuple(torch.cat([tensor[:1]] * 3) for tensor in samples[0])
        exact = path if kind == "onnx" and not int8 else plain
        write_onnx(part, example, exact)
        if kind == "openvino":
            exact = Path(place) / f"{part.name}.xml" if int8 else path
            write_openvino(plain, exact)
        checked = check(part, opened_engine(exact), samples, number)
        if not checked.deviation <= TOLERANCE:
            raise UserError(f"{path}: {checked}; more than {TOLERANCE:g}, so the file is of no use")
        if not int8:
            return path, checked, None
        if kind == "openvino":
            quantise_openvino(exact, path, part, samples)
        else:
            quantise_onnx(exact, path)
    return path, checked, check(part, opened_engine(path, "int8"), samples, number)


@torch.no_grad()
def check(part: Part, engine: Engine, samples: Sequence[Inputs], number: int = CHECKED) -> Check:
    """Compares an engine with PyTorch on the first samples: in batches of all and one by one."""
    inputs = tuple(torch.cat(parts)[:number] for parts in zip(*samples, strict=True))
    alone = [tuple(tensor[index : index + 1] for tensor in inputs) for index in range(len(inputs[0]))]
    expected = [part.module(*sample) for sample in alone]
    together = engine(*inputs)
    batched = [deviation(expected[index], [each[index : index + 1] for each in together]) for index in range(len(alone))]
    found = [max(first, deviation(wanted, engine(*sample))) for first, wanted, sample in zip(batched, expected, alone, strict=True)]
    decided = [value for value, sample in zip(found, alone, strict=True) if value <= TOLERANCE or is_decided(part.module, sample)]
    largest = max(decided) if decided else float("nan")
    return Check(engine.name, engine.version, largest, len(found), len(found) - len(decided))


def deviation(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Returns the largest difference, relative to the largest value of its output; infinite where one is no number."""
    parts = [(a - b).abs().max() / a.abs().max().clamp(min=1e-30) for a, b in zip(expected, found, strict=True)]
    return max(float(part) if part.isfinite() else float("inf") for part in parts)


def is_decided(run: Callable[..., Sequence[Tensor]], sample: Inputs) -> bool:
    """Tells whether PyTorch's own result stays when its inputs change by no more than rounding."""
    generator, expected = torch.Generator().manual_seed(0), run(*sample)
    for _ in range(TRIES):
        noise = [torch.randn(part.shape, generator=generator) if part.is_floating_point() else None for part in sample]
        changed = (part if by is None else part * (1 + ROUNDING * by) for part, by in zip(sample, noise, strict=True))
        if deviation(expected, run(*changed)) > TOLERANCE:
            return False
    return True
