"""GFLOPs and parameters of a model, from its config alone: no data, no weights, no tokenizer.

    python tools/flops.py --config configs/nlvr.yaml [--temperature T | --p P] [--json]

Counts the reference case (two images, 36 text tokens) by closed form and by fvcore. With --temperature the model prunes; with
--p the temperature that removes this share is looked for first. Scores of random weights mean little, so give --pretrained for
a trained model's counts; the two ways of counting must agree whatever the weights are.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import NlvrConfig, load_config  # noqa: E402
from data.text import load_tokenizer  # noqa: E402
from engine.flop_table import flop_table, fvcore_gflops  # noqa: E402
from engine.results import count_parameters  # noqa: E402
from madtp.budget import UnreachableTarget, calibrate  # noqa: E402
from madtp.pruning import OFF, PruneSetting  # noqa: E402
from models.blip_nlvr import REFERENCE_TEXT_TOKENS, BlipNlvr, reference_gflops  # noqa: E402
from models.build import nlvr_from_config  # noqa: E402
from models.pretrained import load_nlvr_weights, read_checkpoint  # noqa: E402
from utils import UserError, run_main  # noqa: E402

BERT_VOCABULARY = 30524  # bert-base-uncased with [DEC] and [ENC]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path)
    parser.add_argument("--pretrained", help="weights to load")
    strength = parser.add_mutually_exclusive_group()
    strength.add_argument("--temperature", type=float, help="prune at this temperature")
    strength.add_argument("--p", type=float, help="prune at the temperature that removes this share of the GFLOPs")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args()
    pruned = args.temperature is not None or bool(args.p)
    config = load_config(NlvrConfig, args.config, {"p": args.p or (0.5 if pruned else 0.0)})
    torch.manual_seed(config.seed)
    model = nlvr_from_config(config, vocabulary_size(config)).eval()
    if args.pretrained:
        load_nlvr_weights(model, read_checkpoint(args.pretrained)["model"], args.pretrained)
    inputs = reference_inputs(config)
    setting = OFF
    if args.temperature is not None:
        setting = PruneSetting(args.temperature, config.prune_from)
    elif args.p:
        setting = setting_for(model, inputs, args.p, config.prune_from)
    report = count(model, inputs, setting)
    if args.json:
        print(json.dumps(report))
        return
    print(flop_table(model, inputs))
    print(f"uncompressed reference: {reference_gflops(model):.4f} GFLOPs, {report['params'] / 1e6:.1f} M parameters")
    if setting.temperature is not None:
        print(f"pruning from block {setting.prune_from} at temperature {setting.temperature:.4g}:")
    print(f"closed form {report['gflops']['closed_form']:.4f}, fvcore {report['gflops']['fvcore']:.4f} GFLOPs")


def vocabulary_size(config: NlvrConfig) -> int:
    """The tokenizer's size, or BERT's where there is no tokenizer: embeddings cost parameters, not GFLOPs."""
    try:
        return len(load_tokenizer(config.tokenizer))
    except UserError:
        return BERT_VOCABULARY


def reference_inputs(config: NlvrConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A random image twice, so that `keep: instance` pads neither, and a text of the reference length (or the longest possible)."""
    tokens = min(REFERENCE_TEXT_TOKENS, config.bert_sizes.max_position_embeddings)
    images = torch.randn(1, 1, 3, config.image_size, config.image_size).expand(1, 2, -1, -1, -1)
    text = torch.randint(5, 30, (1, tokens))
    return images, text, torch.ones_like(text)


@torch.no_grad()
def count(model: BlipNlvr, inputs: tuple[torch.Tensor, ...], setting: PruneSetting) -> dict:
    parts = model.gflops_by_module(model(*inputs, setting=setting), setting=setting)
    by_module = {name: float(value[0]) for name, value in parts.items()}
    total = sum(by_module.values())
    counted = sum(fvcore_gflops(model, inputs, setting).values())
    gflops = {"closed_form": total, "fvcore": counted, "deployment": total}
    params = count_parameters(model)["total"]
    return {"gflops": gflops, "by_module": by_module, "params": params, **asdict(setting)}


@torch.no_grad()
def setting_for(model: BlipNlvr, inputs: tuple[torch.Tensor, ...], p: float, prune_from: int) -> PruneSetting:
    def measure(setting: PruneSetting) -> float:
        return float(model.gflops(model(*inputs, setting=setting), setting=setting)[0])

    dense = measure(OFF)
    try:
        return calibrate(measure, dense * (1 - p), prune_from=prune_from, max_prune_from=model.depth - 1).setting
    except UnreachableTarget as error:
        low, high = 1 - error.high / dense, 1 - error.low / dense
        raise UserError(f"--p {p:g} is out of reach: these weights allow {low:.3f} to {high:.3f}; choose p in that range") from None


if __name__ == "__main__":
    run_main(main)
