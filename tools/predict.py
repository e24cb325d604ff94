"""Predicts for your own images with the checkpoint of a run of any task, and counts the GFLOPs.

    python tools/predict.py --checkpoint output/nlvr_p0.5/checkpoint_best.pth --image a.jpg --image b.jpg --text "Both are red."
    python tools/predict.py --checkpoint output/vqa_p0.5/checkpoint_best.pth --image a.jpg --text "What is on the table?"
    python tools/predict.py --checkpoint output/caption_p0.4/checkpoint_best.pth --image a.jpg
    python tools/predict.py --checkpoint output/coco_p0.45/checkpoint_best.pth --image a.jpg --text "a dog" --text "a cat"

The config.yaml of the run must be next to the checkpoint, or be given with --config. Retrieval ranks several texts for one image,
or several images for one text. Weights without a temperature need a --config and run dense. GFLOPs are those of the whole answer;
"uncompressed" is the same answer without pruned tokens or sparse weights. --explain draws the tokens kept in each block, like
tools/visualize.py.

--checkpoint may also be what `tools/export.py --format onnx` or `openvino` wrote of NLVR2 or CLIP, the folder or a file in it. That
runs on the CPU and draws nothing.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from data.text import clean_sentence
from engine.sparse_inference import sparse_kernels
from engine.threads import threads_for
from engine.train import Precision
from tasks.opened import Opened
from tasks.registry import TASKS, open_checkpoint
from tools.exports.folder import is_exported_model, open_exported
from tools.visualize import write_drawings
from utils import UserError, home_expanded, run_main, user_path


def check_inputs(images: Sequence[str], texts: Sequence[str], explain: Path | None) -> None:
    """Checks the inputs as far as that is possible without a model.

    Raises:
        UserError: when an image is missing, a text has no words, or the path `explain` does not end in .png.
    """
    for path in images:
        if not Path(path).exists():
            raise UserError(f"{path}: no such picture; give the path of one with --image")
    for text in texts:
        if not clean_sentence(text, "caption", 1):
            raise UserError(f"--text {text!r}: has no words; write what the model is to read")
    if explain is not None and explain.suffix != ".png":
        raise UserError(f"--explain {explain}: must end in .png")


def opened_model(args: argparse.Namespace) -> Opened:
    """Opens the checkpoint or the exported model that the arguments name."""
    if not is_exported_model(Path(args.checkpoint)):
        return open_checkpoint(args.checkpoint, args.config, args.device, args.task)
    if args.explain or args.config:
        given = "--explain" if args.explain else "--config"
        raise UserError(f"{given}: exported files tell no tokens, and have their own config.yaml; leave it out")
    return open_exported(Path(args.checkpoint), device=args.device)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint",
        type=home_expanded,
        required=True,
        metavar="FILE",
        help="checkpoint of a run, weights of a dense model, or an exported model",
    )
    parser.add_argument("--config", type=home_expanded, metavar="FILE", help="config.yaml of the run, if not beside it")
    parser.add_argument("--task", choices=TASKS, help="the task, if the config has no key 'task'")
    shared = {"action": "append", "default": []}
    parser.add_argument("--image", type=home_expanded, metavar="FILE", help="an image; may be repeated", **shared)
    parser.add_argument("--text", metavar="TEXT", help="a sentence or a question; may be repeated", **shared)
    parser.add_argument("--explain", type=user_path, metavar="PNG", help="draw the tokens kept in each block")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda if available")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of lines")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)  # keeps log messages out of stdout, which is for the answer
    check_inputs(args.image, args.text, args.explain)
    opened = opened_model(args)
    config, device = opened.task.config, opened.task.run.device
    predictor = opened.task.predictor(opened, args.image, args.text)
    shown = predictor.shown() if args.explain else None
    with (
        threads_for(predictor.work(), device),
        Precision(device, config.amp).autocast(),
        sparse_kernels(config.sparse_kernels, opened.model, opened.sparse, device, predictor.predict) as kernels,
    ):
        prediction = predictor.predict()
    if args.explain:
        write_drawings(predictor.samples(shown, prediction), args.explain)
    if args.json:
        print(json.dumps({"task": config.task, **prediction.content(), "sparse_kernels": kernels}))
        return
    print(prediction.report())
    if kernels["of"]:
        print("sparse weights on sparse kernels: {used} of {of}, the others on dense ones".format(**kernels))


if __name__ == "__main__":
    run_main(main)
