"""Compress CLIP for image-text retrieval on COCO or Flickr30k.

    torchrun --nproc_per_node=8 -- compress_retrieval_clip_dtp.py --config configs/retrieval_coco_clip.yaml --p 0.5
    python compress_retrieval_clip_dtp.py --config configs/shapes/retrieval_clip.yaml --p 0.5

Writes <output_dir>/{config.yaml, log.txt, checkpoint_last.pth, checkpoint_best.pth, predictions_{val,test}.json, result.json}.
"""

from functools import partial

import torch

from clip.tokenizer import load_clip_tokenizer
from configs.schema import ClipRetrievalConfig
from data.captions import Split, build_loaders
from engine.compress import run_experiment
from engine.experiment import Evaluation, Experiment, mean_cost
from tasks.ranking import predictions, rank
from madtp.pruning import PruneSetting
from metrics.retrieval import recalls
from models.build import clip_from_config
from models.weights.clip import load_clip_weights
from engine.start import start
from configs.load import parse_command_line
from utils import init_run, run_main

TOP = 10  # of the similar ones: no recall looks further


def main() -> None:
    config = parse_command_line(__doc__, ClipRetrievalConfig)
    run = init_run(config.device, config.seed)
    tokenizer = load_clip_tokenizer(config.tokenizer)
    loaders = build_loaders(config, run, tokenizer)
    build = partial(clip_from_config, vocab_size=len(tokenizer))
    model, checkpoint, teacher = start(config, run.device, build, load_clip_weights)

    align = not config.uncompressed
    packed_training = run.device.type == "cpu"  # there it was measured to be faster

    def losses(model: torch.nn.Module, batch: dict, setting: PruneSetting) -> dict[str, torch.Tensor]:
        alpha = config.alpha * min(1.0, batch["epoch"])  # the momentum encoders have little to say at first
        pairs = batch["image"], batch["input_ids"], batch["attention_mask"], batch["image_ids"]
        named = model(*pairs, alpha, setting, align, packed_training)
        if teacher is not None:
            named |= teacher.losses(lambda teacher: teacher.encode_pairs(*pairs[:3], packed=True))
        return named

    def costs(model: torch.nn.Module, batch: dict, setting: PruneSetting) -> tuple[dict, torch.Tensor]:
        return model.costs(batch["image"], batch["input_ids"], batch["attention_mask"], setting=setting, packed=True)

    def gflops(model: torch.nn.Module, batch: dict, setting: PruneSetting) -> torch.Tensor:
        return sum(costs(model, batch, setting)[0].values())

    def evaluate(model: torch.nn.Module, split: Split, setting: PruneSetting) -> Evaluation:
        by_image, by_text = rank(model, split, setting, True, run, TOP, matching=False)
        metrics = recalls(by_image.candidates, by_text.candidates, torch.tensor(split.image_of_text))
        cost = mean_cost(model, split.pairs, gflops, setting, run)
        return Evaluation(metrics, cost, predictions(by_image, by_text, split.names))

    run_experiment(
        Experiment(
            config, run, model, loaders, losses, evaluate, gflops,
            inputs=lambda batch: (batch["image"][:1], batch["input_ids"][:1], batch["attention_mask"][:1]),
            score="r_mean",
            reference=model.reference_gflops(config.max_text_tokens),
            loss_weights={"similarity": config.sim_weight, "similarity_momentum": config.sim_weight, **config.distill_weights},
            checkpoint=checkpoint,
            deployment=lambda model, batch, setting: costs(model, batch, setting)[1],
        )
    )  # fmt: skip


if __name__ == "__main__":
    run_main(main)
