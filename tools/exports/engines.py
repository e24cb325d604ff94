"""The inference engines that run exported files: PyTorch tensors in, PyTorch tensors out."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from utils import UserError

EXTRAS = {"onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx", "openvino": "onnx,openvino", "nncf": "onnx,openvino"}
HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}  # of OpenVINO: the precision of what is not quantised


def needed(package: str) -> ModuleType:
    """Imports an optional package.

    Raises:
        UserError: when it is missing; names the extra to install.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"needs the package {package}; install it with: pip install -e '.[{EXTRAS[package]}]'") from None


class Engine:
    """An exported file that is ready to run.

    name, version: of the engine
    outputs: names of what it returns
    """

    name: str
    version: str
    outputs: tuple[str, ...]

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Runs a batch of any size. The inputs are in the order of the file."""
        raise NotImplementedError


class OnnxRuntime(Engine):
    name = "onnxruntime"

    def __init__(self, path: Path, precision: str = "fp32", threads: int | None = None):
        runtime = needed("onnxruntime")
        if precision == "bf16":
            raise UserError("bf16: onnxruntime has no bf16 kernels for CPUs; use openvino, or fp32 or int8")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.names = [each.name for each in self.session.get_inputs()]
        self.outputs = tuple(each.name for each in self.session.get_outputs())
        self.version = runtime.__version__

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        given = {name: part.contiguous().numpy() for name, part in zip(self.names, inputs, strict=True)}
        return [torch.from_numpy(found) for found in self.session.run(None, given)]


class OpenVino(Engine):
    name = "openvino"

    def __init__(self, path: Path, precision: str = "fp32", threads: int | None = None):
        openvino = needed("openvino")
        model = openvino.Core().read_model(path)
        options = {
            "INFERENCE_PRECISION_HINT": HINTS[precision],
            "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
            "NUM_STREAMS": 1,
        }
        compiled = openvino.Core().compile_model(model, "CPU", options)
        self.request = compiled.create_infer_request()
        self.names = [each.get_any_name() for each in compiled.inputs]
        self.outputs = tuple(each.get_any_name() for each in compiled.outputs)
        self.version = openvino.__version__.partition("-")[0]

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        given = {name: part.contiguous().numpy() for name, part in zip(self.names, inputs, strict=True)}
        found = self.request.infer(given, share_inputs=True)
        return [torch.from_numpy(found[index].copy()) for index in range(len(self.outputs))]


ENGINES: dict[str, type[Engine]] = {".onnx": OnnxRuntime, ".xml": OpenVino}
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}


def opened_engine(path: Path, precision: str = "fp32", threads: int | None = None) -> Engine:
    """Opens an exported file, .onnx or .xml, in its engine.

    Args:
        precision: fp32, int8 for a quantised file, or bf16, which OpenVINO rounds to as it runs.
        threads: of a pass; None: as PyTorch uses.
    """
    return ENGINES[path.suffix](path, precision, threads)


def instruction_sets() -> list[str]:
    """Returns the vector and matrix instructions of the CPU by which engines choose their kernels."""
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm", "sve")
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return [torch.backends.cpu.get_cpu_capability()]
    flags: Sequence[str] = next((line.split() for line in text.splitlines() if line.startswith(("flags", "Features"))), ())
    return [name for name in wanted if name in flags]
