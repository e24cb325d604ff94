"""Counts the kept sets and answers that differ between float32 and bfloat16, on samples of the test split.

    python tools/compare_precision.py --config configs/shapes/nlvr.yaml
    python tools/compare_precision.py --config output/nlvr_p0.5/config.yaml --pretrained output/nlvr_p0.5/checkpoint_best.pth

The temperature is that of the checkpoint, or calibrated in float32 for the `p` of the config; both passes prune at it. Prints, for
each block of each tower, the share of pictures or texts of which another set of tokens has survived so far, and how many tokens
that makes; then, for NLVR2, the share of answers that differ.
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.compress import meet
from engine.restore import saved_setting
from engine.start import start
from engine.train import Precision, move
from madtp.rule import OFF, PruneSetting
from madtp.trace import surviving
from tasks.opened import Opened
from tasks.registry import TASKS, load_any_config
from tasks.view import View, spread
from utils import UserError, init_run, logger, run_main


class Difference(NamedTuple):
    """What differs in a tower, by block.

    sets: (L,) share of samples whose surviving tokens are not the same
    tokens: (L,) tokens that survive in one pass only, mean over the samples
    kept: (L,) tokens that survive in float32, mean over the samples
    """

    sets: Tensor
    tokens: Tensor
    kept: Tensor


def difference(exact: Tensor, rounded: Tensor) -> Difference:
    """Compares the surviving tokens of two passes, (S, L, N) bool each."""
    other = exact ^ rounded
    sets = other.any(dim=2).double().mean(dim=0)
    return Difference(sets, other.sum(dim=2).double().mean(dim=0), exact.sum(dim=2).double().mean(dim=0))


def open_for(args: argparse.Namespace) -> View:
    """Opens the model of a config with the setting that both passes use."""
    given = {"amp": False, "evaluate": True, "device": args.device}
    if args.pretrained:
        given["pretrained"] = args.pretrained
    config = load_any_config(args.config, given)
    if config.uncompressed or config.variant == "released" or config.pattern:
        raise UserError(f"{args.config}: prunes no tokens, has sparse weights, or has variant: released; give another config")
    run = init_run(config.device, config.seed)
    task = TASKS[config.task](config, run)
    model, saved, _ = start(config, run.device, task.build, task.load)
    setting = saved_setting(config, saved)
    if setting is None:
        experiment = task.experiment(model, task.loaders(), saved, losses=task.losses, evaluate=task.evaluate)
        setting, _ = meet(experiment, experiment.measure(OFF) * (1 - config.p), OFF)
    return task.view(Opened(task, model.eval(), setting, None), task.view.test_samples(config, task.tokenizer))


def passes(view: View, ids: list[str]) -> Iterator[dict[str, Tensor]]:
    """Yields, for each batch, the surviving tokens (S, L, N) of each tower, and "answer" (S,) where the output has logits."""
    for batch in view.batches(ids):
        output = view.forward(batch)
        mask = move(batch, view.run.device)[view.text_keys[1]].bool()[:, 1:]
        found = {}
        for tower, record in view.records(output).items():
            pictures, patches = len(record.entering[0]), int(record.entering[0][0]) - 1
            valid = mask if tower == "text" else torch.ones(pictures, patches, dtype=torch.bool, device=mask.device)
            found[tower] = surviving(record, valid).cpu()
        if getattr(output, "logits", None) is not None and output.logits.dim() == 2:
            found["answer"] = output.logits.argmax(dim=1).cpu()
        yield found


@contextmanager
def rounded(view: View) -> Iterator[None]:
    """Context manager in which the view computes in bfloat16."""
    exact, view.precision = view.precision, Precision(view.run.device, True)
    try:
        yield
    finally:
        view.precision = exact


def compare(view: View, ids: list[str]) -> tuple[dict[str, Difference], float | None]:
    """Returns the difference of each tower, and the share of answers that differ; None without answers."""
    exact = list(passes(view, ids))
    with rounded(view):
        other = list(passes(view, ids))
    towers = {name: difference(*(_joined(each, name) for each in (exact, other))) for name in exact[0] if name != "answer"}
    if "answer" not in exact[0]:
        return towers, None
    before, after = (torch.cat([batch["answer"] for batch in each]) for each in (exact, other))
    return towers, float((before != after).double().mean())


def _joined(batches: Iterable[Mapping[str, Tensor]], name: str) -> Tensor:
    """Joins the surviving tokens of all batches; shorter texts get tokens that never survive."""
    parts = [batch[name] for batch in batches]
    width = max(part.shape[2] for part in parts)
    return torch.cat([F.pad(part, (0, width - part.shape[2])) for part in parts])


def table(towers: Mapping[str, Difference], answers: float | None, setting: PruneSetting, samples: int) -> list[str]:
    """Formats the comparison as Markdown."""
    lines = ["| tower, block | other set, % | tokens that differ | tokens kept |", "|---|---|---|---|"]
    for tower, found in towers.items():
        for block, (sets, tokens, kept) in enumerate(zip(*found, strict=True), start=1):
            lines.append(f"| {tower} {block} | {100 * sets:.1f} | {tokens:.2f} | {kept:.1f} |")
    lines.append(f"\n{samples} samples at temperature {setting.temperature:.4g}, pruning from block {setting.prune_from + 1}")
    return lines if answers is None else [*lines, f"answers that differ: {100 * answers:.2f} %"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of an experiment or a run")
    parser.add_argument("--pretrained", metavar="FILE", help="weights, if not those of the config")
    parser.add_argument("--samples", type=int, default=400, metavar="N", help="test samples, evenly spaced")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda if available")
    args = parser.parse_args()
    if args.samples < 1:
        raise UserError(f"--samples must be at least 1, got {args.samples}")
    view = open_for(args)
    if Precision(view.run.device, True).dtype != torch.bfloat16:
        raise UserError(f"--device {view.run.device}: has no bfloat16; give another")
    ids = spread(view.ids, args.samples)
    logger.info("\n".join(table(*compare(view, ids), view.setting, len(ids))))


if __name__ == "__main__":
    run_main(main)
