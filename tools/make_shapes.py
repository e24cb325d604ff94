"""Writes a Shapes data set in the published formats, unless the same one is there.

    python tools/make_shapes.py --out shapes --seed 1 --size 20000 --statements-per-pair 4
"""

import argparse
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from data.shapes.search import FULL, Level
from data.shapes.write import TASKS, check, make_shapes
from engine.results import write_json
from utils import UserError, at_least_one, run_main, user_path

GENERATOR = Path(__file__).resolve().parents[1] / "data" / "shapes"
WRITTEN = {"nlvr": "nlvr_*.json", "retrieval": "flickr30k_*.json", "caption": "coco_karpathy_*.json", "vqa": "vqa_*.json"}


def show_progress(results: Iterable, total: int, label: str) -> Iterable:
    """Shows a progress bar over chunks, on a terminal only."""
    return tqdm(results, total=total, desc=label, unit="chunk", disable=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=user_path, required=True, help="folder of the data set")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--size", type=int, required=True, help="number of training pairs, and of training pictures")
    parser.add_argument("--tasks", default=",".join(TASKS), help="some of " + ",".join(TASKS))
    parser.add_argument("--statements-per-pair", type=int, default=1, help="NLVR2: statements per training pair")
    parser.add_argument("--eval-size", type=int, default=4000, help="number of pairs, and of pictures, in val and in test")
    parser.add_argument("--val-size", type=int, help="number for val, if it differs from test")
    parser.add_argument("--workers", type=at_least_one, help="number of processes; default: all cores")
    parser.add_argument("--most-things", type=int, default=FULL.most, help="most things in a picture; fewer is easier")
    parser.add_argument("--templates", default=",".join(FULL.templates), help="NLVR2: some of " + ",".join(FULL.templates))
    args = parser.parse_args()
    tasks, level = args.tasks.split(","), Level(args.most_things, tuple(args.templates.split(",")))
    val_size = args.eval_size if args.val_size is None else args.val_size
    said = {name: value for name, value in vars(args).items() if name not in ("out", "workers")}
    stamp, path = {"command": said, "generator": digest(GENERATOR)}, args.out / f"made_{args.tasks.replace(',', '_')}.json"
    try:
        check(tasks, level, args.size, args.eval_size, val_size, args.statements_per_pair)
        if path.is_file():
            if json.loads(path.read_text()) == {**stamp, "complete": True}:
                print(f"{args.out}: made before by the same command and code, used again")
                return
        elif found := others(args.out, tasks):
            raise UserError(f"{found}: this program did not make it, or made it with other --tasks; move it, or give another --out")
        args.out.mkdir(parents=True, exist_ok=True)
        write_json({**stamp, "complete": False}, path)
        make_shapes(
            args.out, args.seed, args.size, tasks, args.statements_per_pair, args.eval_size, args.workers, level, show_progress,
            val_size,
        )  # fmt: skip
        write_json({**stamp, "complete": True}, path)
    except (ValueError, OSError) as error:
        raise UserError(f"{args.out}: {error}") from None


def others(out: Path, tasks: Iterable[str]) -> Path | None:
    """Finds a file that these tasks would write but that exists already; None if there is none."""
    return next((found for task in tasks if task in WRITTEN for found in sorted((out / "annotations").glob(WRITTEN[task]))), None)


def digest(folder: Path) -> str:
    """Hashes the Python files of a folder: other code makes other data."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))).hexdigest()[:16]


if __name__ == "__main__":
    run_main(main)
