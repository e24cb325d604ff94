"""Samples that training skipped because their pictures cannot be read (key on_bad_sample), for log.txt and result.json."""

import json
from typing import Any

from configs.schema import Config
from utils import gather_objects


def skipped_samples(config: Config, loader: Any) -> dict[str, dict]:
    """Returns the entry of log.txt on the last pass over a training loader, over all processes; empty with on_bad_sample: stop.

    It holds the "count" of samples replaced, and a line on each of the "pictures".
    """
    if config.on_bad_sample == "stop":
        return {}
    lines = _of_all_processes(loader)
    return {"skipped_samples": {"count": len(lines), "pictures": sorted(set(lines))}}


def skipped_in_run(config: Config, calibration: Any) -> dict[str, dict]:
    """Returns the entry of result.json: that of all epochs in log.txt, and the pictures of the calibration subset."""
    if config.on_bad_sample == "stop":
        return {}
    log = config.output_dir / "log.txt"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() and not config.evaluate else []
    epochs = [json.loads(line).get("skipped_samples", {"count": 0, "pictures": []}) for line in lines]
    return {
        "skipped_samples": {
            "count": sum(epoch["count"] for epoch in epochs),
            "pictures": sorted({picture for epoch in epochs for picture in epoch["pictures"]}),
            "calibration": sorted(set(_of_all_processes(calibration))),
        }
    }


def _of_all_processes(loader: Any) -> list[str]:
    return [line for part in gather_objects(loader.replaced) for line in part]
