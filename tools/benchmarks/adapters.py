"""Times models of other libraries that `madtp.prune` has pruned against themselves unpruned, at real size with random weights.

    python -m tools.benchmarks.adapters --p 0.5 --batch-size 8 --device cpu --out benchmarks

Images are noise. The temperature is searched on a few of them, and each image keeps its own number of tokens. The pruned model and
the library's own forward pass take turns.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from madtp.patch import prune
from madtp.patch.base import Batch
from madtp.rule import OFF, PruneSetting
from tools.benchmark import machine, time_in_turn, write_csv
from utils import UserError, at_least_one, init_run, run_main, user_path

SIDE, PATCH = 384, 16
CALIBRATION = 8  # images of noise
WORDS, TEXT = 30522, 20  # BLIP's vocabulary, and the tokens of a text


@dataclass
class Row:
    """The measurement of a model.

    p: share of the GFLOPs removed on the timed batch
    dense, pruned: samples per second, medians over rounds
    speedup, lowest: their ratio in a round, the median and the lowest
    """

    model: str
    p: float
    batch_size: int
    dense: float
    pruned: float
    speedup: float
    lowest: float
    gflops_dense: float
    gflops_pruned: float


def images(batch_size: int) -> Batch:
    return torch.randn(batch_size, 3, SIDE, SIDE)


def timm_vit() -> nn.Module:
    import timm

    return timm.create_model("vit_base_patch16_384", pretrained=False, num_classes=0)


def open_clip_vit() -> nn.Module:
    import open_clip

    return open_clip.create_model("ViT-B-16", pretrained=None, force_image_size=SIDE)


def transformers_clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    vision = {"image_size": SIDE, "patch_size": PATCH}  # ViT-B otherwise
    return CLIPModel(CLIPConfig(vision_config=vision))


def transformers_siglip() -> nn.Module:
    from transformers import SiglipConfig, SiglipModel

    return SiglipModel(SiglipConfig(vision_config={"image_size": SIDE, "patch_size": PATCH}))


def transformers_dino() -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(Dinov2Config(image_size=SIDE, patch_size=PATCH))


def transformers_blip() -> nn.Module:
    from transformers import BlipConfig, BlipForImageTextRetrieval

    # By itself the image encoder starts at zero, where all tokens are alike.
    vision = {"image_size": SIDE, "patch_size": PATCH, "initializer_range": 0.02}
    return BlipForImageTextRetrieval(BlipConfig(vision_config=vision))


def pairs(batch_size: int) -> Batch:
    ids = torch.randint(1000, WORDS, (batch_size, TEXT))
    return {"pixel_values": images(batch_size), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


@dataclass(frozen=True)
class Contender:
    """A model: how it is built, its batch of so many samples, and its own forward pass on it."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    run: Callable[[Any, Any], Any]


CONTENDERS = (
    Contender("timm ViT-B/16", timm_vit, images, lambda model, batch: model(batch)),
    Contender("open_clip ViT-B/16", open_clip_vit, images, lambda model, batch: model.encode_image(batch)),
    Contender("transformers CLIP ViT-B/16", transformers_clip, images, lambda model, batch: model.get_image_features(batch)),
    Contender("transformers SigLIP-B/16", transformers_siglip, images, lambda model, batch: model.get_image_features(batch)),
    Contender("transformers DINOv2-B/16", transformers_dino, images, lambda model, batch: model(batch)),
    Contender("transformers BLIP, matching", transformers_blip, pairs, lambda model, batch: model(**batch)),
)


def measure(contender: Contender, p: float, batch_size: int, rounds: int, device: torch.device) -> Row:
    """Builds, prunes and times a model."""
    model = contender.build().eval().to(device)
    calibration, batch = (_moved(contender.batch(size), device) for size in (CALIBRATION, batch_size))
    pruning = prune(model, calibration, p)
    setting = pruning.setting
    pruned_gflops, dense_gflops = pruning.compare([batch], setting)

    def run(mode: PruneSetting) -> None:
        pruning.setting = mode
        contender.run(model, batch)

    (dense, pruned), _ = time_in_turn([partial(run, OFF), partial(run, setting)], rounds, device)
    ratios = [a / b for a, b in zip(dense, pruned, strict=True)]
    rates = (batch_size / statistics.median(seconds) for seconds in (dense, pruned))
    removed = round(1 - pruned_gflops / dense_gflops, 4)
    return Row(contender.name, removed, batch_size, *rates, statistics.median(ratios), min(ratios), dense_gflops, pruned_gflops)


def _moved(batch: Batch, device: torch.device) -> Batch:
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    return {name: part.to(device) for name, part in batch.items()}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="", help="only those whose names contain this, such as timm")
    parser.add_argument("--p", type=float, default=0.5, help="share of the GFLOPs to remove; default: 0.5")
    parser.add_argument("--batch-size", type=at_least_one, default=8)
    parser.add_argument("--rounds", type=at_least_one, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=user_path, help="folder for a CSV file")
    args = parser.parse_args()
    init_run(args.device, 0)
    rows = []
    chosen = [contender for contender in CONTENDERS if args.models.lower() in contender.name.lower()]
    if not chosen:
        raise UserError(f"--models {args.models}: in no name; choose from {', '.join(each.name for each in CONTENDERS)}")
    for contender in chosen:
        row = measure(contender, args.p, args.batch_size, args.rounds, torch.device(args.device))
        rows.append(row)
        print(f"{row.model}: {row.p:.1%} fewer GFLOPs, {row.speedup:.2f} times as fast (lowest round {row.lowest:.2f})", flush=True)
        if args.out:  # after each, so that none is lost
            command = f"python -m tools.benchmarks.adapters {' '.join(sys.argv[1:])}"
            write_csv(args.out / f"adapters_{args.device.replace(':', '')}.csv", command, machine(args.device), rows)


if __name__ == "__main__":
    run_main(main)
