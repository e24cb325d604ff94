"""A run's compressed weights as one .safetensors file to hand on, with what predicting and evaluating need beside them.

    python tools/export.py --checkpoint output/nlvr_p0.8/checkpoint_best.pth --out output/nlvr_p0.8_exported
    python tools/export.py --checkpoint output/nlvr_p0.8/checkpoint_best.pth --out output/small --packed --half

--out is a folder, which gets model.safetensors and config.yaml, or the path of a .safetensors file, beside which config.yaml goes.
Both work as any run's: `tools/predict.py --checkpoint FILE`, `compress_*_dtp.py --config CONFIG --evaluate --pretrained FILE`.
What training alone uses, as momentum encoders and queues, is left out; retrieval's GFLOPs of a training step are then those with
momentum encoders that equal the others.
--packed stores of N:M sparse weights the values that are kept and their places; what reads the file gets the weights whole, to the
bit. --half rounds to float16.
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
from utils import UserError, run_main

MIB = 2**20


@dataclass
class Exported:
    """What was written. dense, now: bytes, of all weights in float32 and of the file."""

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
    """Write the weights of a checkpoint, and its config beside them.

    Raises:
        UserError: when the checkpoint is not what it says it is, or something else is where the files would go.
    """
    saved = read_checkpoint(checkpoint)
    path = out if out.suffix == ".safetensors" else out / "model.safetensors"
    if out.is_file() and out != path or path.exists() and path.samefile(checkpoint):
        raise UserError(f"--out {out}: is a file that is there already; give a folder, or another .safetensors file")
    settings = load_any_config(config or checkpoint.with_name("config.yaml"), saved_rule(saved), task)
    used = (name for name in saved["model"] if is_read(name) or name == "temp")  # by which a teacher divides
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
    """The pattern of the masked weights, which they have; None where none are masked.

    Raises:
        UserError: when one of them is missing, or has more that is not zero.
    """
    if not saved.get("masked"):
        return None
    if config.pattern is None:
        raise UserError(f"{source}: has masked weights, but no sparsity_type says how; give the run's own --config")
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
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="the weights that a run made")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the run's config.yaml, where it does not lie beside them")
    parser.add_argument("--task", choices=TASKS, help="where the file has no key 'task'")
    parser.add_argument("--out", type=Path, required=True, help="a folder, or a .safetensors file")
    parser.add_argument("--packed", action="store_true", help="store what is kept of sparse weights, and where it goes")
    parser.add_argument("--half", action="store_true", help="float16")
    args = parser.parse_args()
    print(export(args.checkpoint, args.config, args.out, args.packed, args.half, args.task).report())


if __name__ == "__main__":
    run_main(main)
