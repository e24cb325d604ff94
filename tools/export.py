"""Exports the compressed weights of a run to a .safetensors file, or its model to ONNX or OpenVINO.

    python tools/export.py --checkpoint output/nlvr_p0.8/checkpoint_best.pth --out output/nlvr_p0.8_exported
    python tools/export.py --checkpoint output/nlvr_p0.8/checkpoint_best.pth --out output/small --packed --half
    python tools/export.py --checkpoint output/nlvr_p0.8/checkpoint_best.pth --out output/nlvr_onnx --format onnx
    python tools/export.py --checkpoint output/nlvr_p0.8/checkpoint_best.pth --out output/nlvr_int8 --format openvino --int8

safetensors: --out is a folder for model.safetensors and config.yaml, or the path of a .safetensors file; config.yaml is then
written next to it. Both are used like the files of a run: `tools/predict.py --checkpoint FILE`, `compress_*_dtp.py --config CONFIG
--evaluate --pretrained FILE`.
Parts that only training uses, such as momentum encoders and queues, are left out. The GFLOPs of a retrieval training step are then
counted as if the momentum encoders had the weights of the online encoders.
--packed stores only the kept values of N:M sparse weights and their positions. Loading restores the weights to the bit. --half
rounds to float16.

onnx, openvino: --out is a folder for a file per part, config.yaml, and deployment.json, which describes them. The model is written
in its deployment form: every sample keeps the same number of tokens in a block, found on the calibration slice of the run's own
data as `keep: fixed` does, and the batch may have any size. NLVR2 is written whole (--parts image_encoder: its image encoder), CLIP
as its two towers, and of VQA, captioning and BLIP's retrieval the image encoder. Each file is run on calibration samples and
compared with PyTorch; one that deviates by more than 1e-4 is refused. --int8 quantises it afterwards: onnx by onnxruntime's dynamic
quantisation, openvino by NNCF with the calibration slice. tools/evaluate.py and tools/predict.py run the files.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from configs.load import save_config
from configs.schema import Config
from engine.restore import SAVED, check_sparse, saved_rule
from madtp.sparsity.masks import Pattern
from models.weights.reading import is_read, read_checkpoint
from models.weights.safetensors import save_exported
from tasks.registry import TASKS, load_any_config
from tools.exports.engines import SUFFIXES
from tools.exports.model import export_model
from tools.exports.writing import CHECKED
from utils import UserError, at_least_one, run_main, user_path

MIB = 2**20


@dataclass
class Exported:
    """The result of an export.

    path: the file
    dense: bytes of all weights in float32
    now: bytes of the file
    parameters, nonzero: number of all parameters, and of those that are not zero
    """

    path: Path
    dense: int
    now: int
    parameters: int
    nonzero: int

    def report(self) -> str:
        return (
            f"{self.path}: {self.now / MIB:.2f} MiB, dense in float32 {self.dense / MIB:.2f} MiB;"
            f" {self.nonzero} of {self.parameters} parameters are not zero"
        )


def export(checkpoint: Path, config: Path | None, out: Path, packed: bool, half: bool, task: str | None = None) -> Exported:
    """Writes the weights of a checkpoint, and its config.yaml next to them.

    Args:
        checkpoint: the file that a run saved.
        config: the config.yaml of the run; None if it is next to the checkpoint.
        out: a folder, or a .safetensors file.
        packed: store only the kept values of sparse weights.
        half: round to float16.
        task: the task, if the config has no key 'task'.

    Raises:
        UserError: when the checkpoint is inconsistent, or other files are in the way.
    """
    saved = read_checkpoint(checkpoint)
    path = out if out.suffix == ".safetensors" else out / "model.safetensors"
    if out.is_file() and out != path or path.exists() and path.samefile(checkpoint):
        raise UserError(f"--out {out}: the file is there already; give a folder, or another .safetensors file")
    settings = load_any_config(config or checkpoint.with_name("config.yaml"), saved_rule(saved), task)
    # temp, the contrastive temperature, is needed to use the model as a teacher.
    used = (name for name in saved["model"] if is_read(name) or name == "temp")
    weights = {name: saved["model"][name].detach() for name in used}
    state = {"task": settings.task, **{key: saved[key] for key in SAVED if key in saved}}
    pattern = checked_pattern(settings, weights, saved, checkpoint)
    if packed and pattern is None:
        raise UserError(f"--packed: {checkpoint} has no sparse weights; leave it out")
    floats = [tensor for tensor in weights.values() if tensor.is_floating_point()]
    if half:
        weights = {name: in_half(name, tensor, checkpoint) for name, tensor in weights.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_config(settings, path.with_name("config.yaml"))
    save_exported(path, weights, state, pattern if packed else None)
    parameters, nonzero = sum(t.numel() for t in floats), sum(int(t.count_nonzero()) for t in floats)
    return Exported(path, 4 * parameters, path.stat().st_size, parameters, nonzero)


def checked_pattern(config: Config, weights: Mapping[str, Tensor], saved: Mapping, source: Path) -> Pattern | None:
    """Returns the pattern of the masked weights, after checking that they have it; None if no weights are masked.

    Raises:
        UserError: when a masked weight is missing, or has more nonzero values than the pattern allows.
    """
    if not saved.get("masked"):
        return None
    if config.pattern is None:
        raise UserError(f"{source}: has masked weights, but no sparsity_type says how; give the config of that run with --config")
    pattern = Pattern(*config.pattern)
    for name in saved["masked"]:
        if name not in weights:
            raise UserError(f"{source}: lacks {name}, which it calls masked; export a run's checkpoint_best.pth")
    check_sparse({name: weights[name] for name in saved["masked"]}, pattern, str(source))
    return pattern


def in_half(name: str, tensor: Tensor, source: Path) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    rounded = tensor.half()
    if not rounded.isfinite().all():
        raise UserError(f"--half: {name} of {source} is beyond float16; leave it out")
    return rounded


def write_config(config: Config, path: Path) -> None:
    if path.is_file():
        if load_any_config(path) != config:
            raise UserError(f"{path}: is of another run; choose another folder with --out")
    else:
        save_config(config, path)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=user_path, required=True, metavar="FILE", help="checkpoint that a run saved")
    parser.add_argument("--config", type=user_path, metavar="FILE", help="config.yaml of the run, if not next to the checkpoint")
    parser.add_argument("--task", choices=TASKS, help="the task, if the config has no key 'task'")
    parser.add_argument("--out", type=user_path, required=True, help="a folder, or a .safetensors file")
    parser.add_argument("--format", choices=("safetensors", *SUFFIXES), default="safetensors", help="default: safetensors")
    parser.add_argument("--packed", action="store_true", help="store only the kept values of sparse weights, and their positions")
    parser.add_argument("--half", action="store_true", help="round to float16")
    parser.add_argument("--int8", action="store_true", help="onnx, openvino: quantise to 8 bits")
    parser.add_argument("--parts", default="", help="onnx, openvino: parts to write, separated by commas; default: see above")
    parser.add_argument(
        "--text-tokens", type=at_least_one, help="onnx, openvino: length of texts; default: the longest of the data"
    )
    parser.add_argument("--check-samples", type=at_least_one, help="onnx, openvino: samples that check each file; default: 8")
    args = parser.parse_args()
    if args.format == "safetensors":
        refuse(args, "onnx or openvino", "int8", "parts", "text_tokens", "check_samples")
        print(export(args.checkpoint, args.config, args.out, args.packed, args.half, args.task).report())
        return
    refuse(args, "safetensors", "packed", "half")
    parts = [name for name in args.parts.split(",") if name]
    checked = args.check_samples or CHECKED
    print(export_model(args.checkpoint, args.config, args.out, args.format, args.int8, parts, args.text_tokens, args.task, checked))


def refuse(args: argparse.Namespace, wanted: str, *names: str) -> None:
    for name in names:
        if getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')}: is for --format {wanted}; leave it out")


if __name__ == "__main__":
    run_main(main)
