"""Evaluates an exported model of NLVR2 or of CLIP's retrieval on a split of its run's data, by the task's own metric.

    python tools/evaluate.py --exported output/nlvr_int8 --split test
    python tools/evaluate.py --exported output/clip_openvino --split val --precision bf16 --json output/clip_bf16.json

--exported is a folder that `tools/export.py --format onnx` or `openvino` wrote. Its config.yaml names the data. Files run on the
CPU, in onnxruntime or OpenVINO. --precision bf16 rounds as OpenVINO runs; quantised files stay int8. GFLOPs are those of the
deployment form; zeros of sparse weights count, because these engines multiply by them. An encoder alone has no metric.
"""

import argparse
from pathlib import Path

import torch

from engine.results import write_json
from tools.exports.folder import open_exported, read_description
from utils import run_main, user_path


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exported", type=user_path, required=True, metavar="DIR", help="folder of an exported model")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the parts that are not quantised")
    parser.add_argument("--json", type=user_path, metavar="FILE", help="write the metrics and predictions here")
    args = parser.parse_args()
    result = evaluate(args.exported, args.split, args.precision)
    if args.json:
        write_json(result, args.json)
    metrics = ", ".join(f"{name} {value:.2f}" for name, value in result["metrics"].items())
    print(f"{args.split}: {metrics} at {result['gflops']:.4g} GFLOPs per sample; {result['engine']}, {result['precision']}")


def evaluate(exported: Path, split: str, precision: str) -> dict:
    """Returns the metrics in percent, the GFLOPs of a sample, the predictions, and what they were made with."""
    opened, (_, described) = open_exported(exported, precision), read_description(exported)
    config = opened.task.config.model_copy(update={"evaluate": True})  # whose loaders leave out training
    task = type(opened.task)(config, opened.task.run)
    found = task.evaluate(opened.model, task.loaders()[split], opened.setting)
    return {
        "task": config.task,
        "split": split,
        "engine": described.engine,
        "precision": described.precision if described.precision == "int8" else precision,
        "metrics": found.metrics,
        "gflops": found.gflops,
        "predictions": found.predictions,
    }


if __name__ == "__main__":
    run_main(main)
