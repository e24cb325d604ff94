"""What a series of runs needs before it starts: commands, files, disk, and training compute."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from configs.schema import Config
from tasks.registry import TASKS
from tools.tables.hours import Estimator
from tools.tables.plan import Job, config_of


def needs_of(jobs: Sequence[Job], launch: str, samples: Mapping[str, int], estimator: Estimator) -> str:
    """Describes the runs: the command of each, and the files, the disk and the time that they need.

    samples: data set -> training samples; for others no time is estimated
    """
    lines, files, disk, hours = [], set(), 0, 0.0
    for job in jobs:
        config = config_of(job)
        lines.append(f"{launch} {shlex.join(job.command)}")
        size = 0 if job.evaluates else checkpoint_bytes(config)
        disk += size
        time = 0.0 if job.evaluates or job.data not in samples else estimator.hours(config, samples[job.data])
        hours += time
        lines.append(f"    writes {size / 1e9:.2f} GB" + (f"; trains for about {time:.1f} {estimator.unit}" if time else ""))
        files |= set(files_of(config)) if job.parent is None else set(files_of(config)) - {config.pretrained}
    found = [f"{'found' if Path(file).exists() else 'MISSING'}  {file}" for file in sorted(files)]
    total = [f"{len(jobs)} runs; disk: {disk / 1e9:.1f} GB in checkpoints."]
    if hours:
        total.append(
            f"Training: about {hours:.0f} {estimator.unit}, without evaluations and reading; estimated from a training step of each"
            " image encoder, measured here at its real size with random weights."
        )
    return "\n".join([*lines, "", "Files:", *found, "", *total])


def files_of(config: Config) -> list[str]:
    """Returns the files and folders that a run reads."""
    names = [*config.train_files, config.val_file, config.test_file, getattr(config, "answer_list", "")]
    annotations = [str(config.table or config.annotation_file(name)) for name in dict.fromkeys(filter(None, names))]
    folders = [str(getattr(config, key)) for key in config.image_keys]
    return [*folders, *annotations, *filter(None, (config.pretrained, config.teacher))]


def checkpoint_bytes(config: Config) -> int:
    """Returns the size of a run's checkpoints."""
    return sum(checkpoint_sizes(config))


def checkpoint_sizes(config: Config) -> tuple[int, int]:
    """Returns the size in bytes of the best weights, and of the last with two moments each of AdamW."""
    with torch.device("meta"):  # without memory
        model, _ = TASKS[config.task].reference_case(config)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    whole = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    return whole, whole + 2 * trained
