"""Compresses a model of another library on your own pictures, without training: a folder of weights in, a faster model out.

    python tools/compress.py --model clip-vit-base-patch16 --images photos --p 0.5 --out clip-p0.5
    python tools/compress.py --model clip-vit-base-patch16 --images photos --texts captions.txt --p 0.5 --out clip-p0.5

--model is a folder as the Hub has them, or a name there: of transformers (CLIP, SigLIP, SigLIP 2, DINOv2, BLIP), open_clip or timm.
--images is a folder of pictures, subfolders included, that are like those the model is for; they need no labels. With --texts, a
file with a text per line, the text encoder is pruned too. A part of the pictures is kept aside to measure how far the features
move. The folder --out gets the weights, the model's own configuration, how it prunes, and a model card; `madtp.load(FOLDER)`
loads it.
"""

import argparse
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from configs.hub import from_hub, is_name
from madtp import UnreachableTarget, load, prune
from madtp.patch import INITS, INSTANCE
from madtp.patch.base import Batch, Pruning
from madtp.patch.folders import DESCRIPTION, save
from tools.compression.card import write_card
from tools.compression.inputs import batches_of, read_pictures, read_texts
from tools.compression.measure import Report, all_features, measure
from tools.compression.sources import CARD, HEAVY, Source, open_source
from utils import UserError, at_least_one, run_main, user_path

EVERY, MOST = 5, 64  # every 5th picture is kept aside, up to 64 of them


def main() -> None:
    args = parse()
    check_out(args.out)
    source = open_source(user_path(str(from_hub(args.model, "--model"))) if is_name(args.model) else user_path(args.model))
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    source.model.to(device)
    pictures, skipped = read_pictures(args.images, args.samples)
    texts = read_texts(args.texts, source)
    aside, used = pictures[::EVERY][:MOST], [picture for index, picture in enumerate(pictures) if index % EVERY]
    calibration, held_out = (list(batches_of(source, some, texts, args.batch_size, device)) for some in (used, aside))
    with torch.inference_mode():
        before = all_features(source, held_out)
    pruning = compress(source, calibration, args)
    report = measure(source, pruning, calibration, held_out, before)
    write(source, report, args.p, args.out)
    print("\n".join(report.lines()))
    for name in skipped:
        print(f"skipped, not a readable picture: {name}")
    print(f"{args.out}: load it with madtp.load({str(args.out)!r})")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of the model, or its name on the Hub")
    parser.add_argument("--images", type=user_path, required=True, metavar="DIR", help="folder of pictures")
    parser.add_argument("--texts", type=user_path, metavar="FILE", help="texts, one per line: prunes the text encoder too")
    parser.add_argument("--p", type=share, default=0.5, help="share of the GFLOPs to remove; default: 0.5")
    parser.add_argument("--out", type=user_path, required=True, metavar="DIR", help="folder of the compressed model")
    parser.add_argument("--samples", type=at_least_one, default=256, help="pictures to read at most; default: 256")
    parser.add_argument("--batch-size", type=at_least_one, default=8, help="default: 8")
    parser.add_argument("--init", choices=("none", *INITS), default="none", help="what learnable tokens are made of; default: none")
    parser.add_argument("--learnable", type=at_least_one, help="number of learnable tokens, with --init; default: 100")
    parser.add_argument("--seed", type=int, default=0, help="of the learnable tokens")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda if available")
    args = parser.parse_args()
    if args.learnable and args.init == "none":
        raise UserError(f"--learnable {args.learnable}: there are none by default; choose what they are made of with --init")
    return args


def share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and below 1, got {text}")
    return value


def compress(source: Source, calibration: list[Batch], args: argparse.Namespace) -> Pruning:
    """Prunes the model, and shows the progress of the search on a terminal."""

    def progress(batches: Iterable[Batch]) -> Iterable[Batch]:
        return tqdm(batches, desc="calibrating", leave=False, disable=not sys.stderr.isatty())

    settings = {"seed": args.seed, "progress": progress}
    if args.init != "none":
        settings |= {"rule": replace(INSTANCE, mag=True), "init": args.init, "num_learnable": args.learnable}
    try:
        return prune(source.model, calibration, args.p, **settings)
    except UnreachableTarget as error:
        raise UserError(f"--p {args.p}: {error}; choose another p, or another --init") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"--model {args.model}: {error}") from None


def check_out(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: is there already, and not empty; choose another folder, or remove it")


def write(source: Source, report: Report, p: float, out: Path) -> None:
    """Writes the folder of the compressed model, and checks that it can be loaded."""
    out.mkdir(parents=True, exist_ok=True)
    for file in source.folder.iterdir():
        heavy = file.suffix in HEAVY or file.name.endswith(".index.json")
        if file.is_file() and not heavy and file.name not in (CARD, DESCRIPTION):
            shutil.copyfile(file, out / file.name)
    measured = {"p": p, "source": source.folder.name, "licence": source.licence, "measured": asdict(report)}
    save(source.model.cpu(), out, source.library, source.architecture, measured)
    write_card(out, source, p, report)
    load(out)


if __name__ == "__main__":
    run_main(main)
