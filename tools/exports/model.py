"""The export of a whole deployment: its parts, checked, with their description."""

from collections.abc import Sequence
from pathlib import Path

import torch

from configs.load import save_config
from madtp.pruning import WHOLE
from madtp.rule import OFF
from tasks.task import Inputs
from tools.exports.deployment import Deployment, calibration, deployed, text_length
from tools.exports.engines import needed
from tools.exports.folder import DESCRIPTION, Description
from tools.exports.parts import Part, parts_of
from tools.exports.writing import CHECKED, Check, write
from utils import UserError

PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
SAMPLES = 256  # of the calibration slice that find the ranges of a quantised model


@torch.no_grad()
def export_model(
    checkpoint: Path, config: Path | None, out: Path, kind: str, int8: bool = False, parts: Sequence[str] = (),
    text_tokens: int | None = None, task: str | None = None, checked: int = CHECKED,
) -> str:  # fmt: skip
    """Writes a checkpoint's model in its deployment form, and returns a report.

    Args:
        checkpoint, config, task: as for the export of weights.
        out: a folder.
        kind: "onnx" or "openvino".
        parts: names of the parts to write; the task's own choice if empty.
        text_tokens: length of texts; None: the longest of the data.
        checked: number of calibration samples that check each file.
    Raises:
        UserError: when a package is missing, the model has no deployment form, or a file deviates from PyTorch.
    """
    packages = (*PACKAGES[kind], *(("nncf",) if int8 and kind == "openvino" else ()))
    versions = {name: getattr(needed(name), "__version__", "") for name in packages} | {"torch": torch.__version__}
    if out.exists() and not out.is_dir() or (out / "checkpoint_best.pth").exists():
        raise UserError(f"--out {out}: give a new folder for the files")
    deployment = deployed(checkpoint, config, task)
    length = text_length(deployment, text_tokens)
    described = Description(
        task=deployment.config.task,
        engine=kind,
        precision="int8" if int8 else "fp32",
        p=deployment.config.p,
        counts={name: [None if n == WHOLE else n for n in each] for name, each in deployment.counts.items()},
        prune_from=deployment.setting.prune_from,
        text_tokens=length,
        calibration_samples=sum(len(inputs[0]) for inputs in deployment.inputs),
        versions=versions,
        parts={},
    )
    lines = []
    for part in parts_of(deployment.config.task, deployment.model, deployment.setting, length, parts):
        samples = calibration(deployment, part.select, max(SAMPLES, checked))
        path, exact, quantised = write(part, kind, int8, out, samples, checked)
        described.parts[part.name] = description(part, deployment, samples[0], path, exact, quantised)
        lines.append(report(path, described.parts[part.name], exact, quantised))
    save_config(deployment.config, out / "config.yaml")
    described.save(out)
    return "\n".join([*lines, f"{out / DESCRIPTION}: what the files hold"])


def description(part: Part, deployment: Deployment, sample: Inputs, path: Path, exact: Check, quantised: Check | None) -> dict:
    """Returns what deployment.json says of a part. GFLOPs are the mean over the calibration samples of its check."""
    found = part.module(*sample)
    checks = {"fp32": exact} | ({"int8": quantised} if quantised else {})
    costs = [float(part.gflops(sample, setting).double().mean()) for setting in (deployment.setting, OFF)]
    return {
        "file": path.name,
        "inputs": {name: shape_of(tensor) for name, tensor in zip(part.inputs, sample, strict=True)},
        "outputs": {name: shape_of(tensor) for name, tensor in zip(part.outputs, found, strict=True)},
        "gflops": costs[0],
        "gflops_uncompressed": costs[1],
        "checked": {name: vars(check) for name, check in checks.items()},
    }


def shape_of(tensor: torch.Tensor) -> dict:
    return {"shape": ["batch", *tensor.shape[1:]], "type": str(tensor.dtype).removeprefix("torch.")}


def report(path: Path, part: dict, exact: Check, quantised: Check | None) -> str:
    size = sum(each.stat().st_size for each in path.parent.glob(f"{path.stem}.*")) / 2**20
    line = f"{path}: {size:.1f} MiB, {part['gflops']:.4g} GFLOPs, uncompressed {part['gflops_uncompressed']:.4g}; {exact}"
    return line + (f"; in int8 it {quantised}" if quantised else "")
