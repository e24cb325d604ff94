"""Evaluation in the deployment form (`keep: fixed`): the numbers of tokens that every sample keeps, from the calibration subset."""

from dataclasses import replace

import torch

from engine.experiment import Experiment
from engine.train import move
from madtp.deploy import Branches, Counts, KeptTokens, fix_counts, recording, solve_counts
from madtp.pruning import WHOLE
from madtp.rule import PruneSetting
from utils import gather_objects, logger


@torch.no_grad()
def fix_tokens(experiment: Experiment, setting: PruneSetting, target: float, branches: Branches | None = None) -> Counts:
    """Gives the model the fixed numbers of tokens that meet `target` GFLOPs, from what samples keep at `setting`.

    Only the blocks of `branches` get them, all of the model's by default.
    """
    if setting.temperature is None:
        return {}
    branches = experiment.model.branches if branches is None else branches
    experiment.model.eval()
    with recording(branches) as kept, experiment.precision.autocast():
        for batch in experiment.calibration_batches:
            experiment.gflops(experiment.model, move(batch, experiment.run.device), setting)
    everyones = gather_objects(kept)
    kept = {name: KeptTokens.joined([part[name] for part in everyones]) for name in kept}
    never = replace(setting, temperature=0.0)

    def measure(counts: Counts) -> float:
        fix_counts(branches, counts)
        return experiment.measure(never)

    counts, cost = solve_counts(kept, measure, target)
    fix_counts(branches, counts)
    shown = "; ".join(f"{name} {' '.join('all' if n == WHOLE else str(n) for n in each)}" for name, each in counts.items())
    logger.info("every sample keeps, block by block: %s; %.4f GFLOPs (target %.4f)", shown, cost, target)
    return counts
