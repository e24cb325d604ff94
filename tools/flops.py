"""Counts the GFLOPs and parameters of a model from its config, without data, weights or tokenizer.

    python tools/flops.py --config configs/nlvr.yaml [--temperature T | --p P] [--json]

Counts the paper's reference case in closed form and with fvcore (NLVR2: two images, 36 text tokens; retrieval: a pair in a training
step, its text padded to the maximum). Also counts a sample in deployment: a pair whose text is read once, the writing of a caption
of `max_length` tokens, or a question whose answer is ranked among `k_test` candidates or written.
--temperature prunes at that temperature; --p searches the temperature that removes this share. Random weights give meaningless
scores, so use --pretrained for the counts of a trained model. The closed form and fvcore agree for any weights, unless the config
has sparse weights: the closed form counts N:M layers at N / M, fvcore does not. --p is then the share that tokens and weights
remove together.
"""

import argparse
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial

import torch

from engine.flop_table import flop_table, fvcore_gflops
from engine.results import count_parameters
from madtp.blocks import Guidance
from madtp.budget import UnreachableTarget, calibrate
from madtp.rule import OFF, PruneSetting
from madtp.sparsity.layers import sparse_weights
from madtp.sparsity.masks import SparseWeights
from models.weights.reading import read_checkpoint
from tasks.registry import TASKS, load_any_config
from tasks.task import Inputs
from utils import UserError, home_expanded, run_main, user_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=user_path)
    parser.add_argument("--task", choices=TASKS, help="the task, if the config has no key 'task'")
    parser.add_argument("--pretrained", type=home_expanded, help="weights to load")
    strength = parser.add_mutually_exclusive_group()
    strength.add_argument("--temperature", type=float, help="prune at this temperature")
    strength.add_argument("--p", type=float, help="prune at the temperature that removes this share of the GFLOPs")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of a table")
    args = parser.parse_args()
    pruned = args.temperature is not None or bool(args.p)
    config = load_any_config(args.config, {"p": args.p or (0.5 if pruned else 0.0)}, args.task)
    torch.manual_seed(config.seed)
    task = TASKS[config.task]
    model, inputs = task.reference_case(config)
    model.eval()
    saved = read_checkpoint(args.pretrained) if args.pretrained else {}
    if saved:
        task.load(model, saved["model"], args.pretrained)
    setting, dense = OFF, total(model, inputs, OFF)
    sparse = sparse_weights(model, config.pattern, config.sparse_layers) if config.pattern else None
    with as_sparse(sparse, saved.get("masked")):
        if args.temperature is not None:
            setting = PruneSetting(args.temperature, config.prune_from)
        elif args.p:
            setting = setting_for(model, inputs, args.p, config.prune_from, dense)
        report = count(model, inputs, setting, partial(task.reference_deployment, config))
    if args.json:
        print(json.dumps(report))
        return
    print(flop_table(model, inputs))
    print(f"uncompressed: {dense:.4f} GFLOPs, {report['params'] / 1e6:.1f} M parameters")
    if setting.temperature is not None:
        print(f"pruning from block {setting.prune_from} at temperature {setting.temperature:.4g}:")
    print("closed form {closed_form:.4f}, fvcore {fvcore:.4f}, deployment {deployment:.4f} GFLOPs".format(**report["gflops"]))


def as_sparse(sparse: SparseWeights | None, masked: list[str] | None) -> AbstractContextManager:
    """Returns a context manager in which the weights `masked` are counted as sparse; all that can be sparse if it is None."""
    return sparse.counted(sparse.weights if masked is None else masked) if sparse else nullcontext()


@torch.no_grad()
def count(
    model: torch.nn.Module,
    inputs: Inputs,
    setting: PruneSetting,
    deployment: Callable[[torch.nn.Module, Inputs, Guidance], torch.Tensor],
) -> dict:
    """Counts a pass in closed form and with fvcore. `deployment` returns the GFLOPs (1,) of a sample in deployment."""
    guidance = Guidance(setting)
    by_module = {name: float(value[0]) for name, value in model.costs(*inputs, guidance=guidance)[0].items()}
    counted = sum(fvcore_gflops(model, inputs, guidance).values())
    in_use = float(deployment(model, inputs, guidance)[0])
    gflops = {"closed_form": sum(by_module.values()), "fvcore": counted, "deployment": in_use}
    params = count_parameters(model)["total"]
    return {"gflops": gflops, "by_module": by_module, "params": params, **asdict(setting)}


@torch.no_grad()
def total(model: torch.nn.Module, inputs: Inputs, setting: PruneSetting) -> float:
    return float(sum(model.costs(*inputs, guidance=Guidance(setting))[0].values())[0])


def setting_for(model: torch.nn.Module, inputs: Inputs, p: float, prune_from: int, dense: float) -> PruneSetting:
    """Finds the setting that brings the model to a share 1 - p of the `dense` GFLOPs. OFF if sparse weights suffice.

    Raises:
        UserError: when no setting does; names the possible range of p.
    """

    def measure(setting: PruneSetting) -> float:
        return total(model, inputs, setting)

    if measure(OFF) <= dense * (1 - p):
        return OFF
    try:
        return calibrate(measure, dense * (1 - p), prune_from=prune_from, max_prune_from=model.depth - 1).setting
    except UnreachableTarget as error:
        low, high = 1 - error.high / dense, 1 - error.low / dense
        raise UserError(f"--p {p:g} is out of reach: these weights allow {low:.3f} to {high:.3f}; choose p in that range") from None


if __name__ == "__main__":
    run_main(main)
