"""Compress BLIP on NLVR2.

    torchrun --nproc_per_node=8 -- compress_nlvr_dtp.py --config configs/nlvr.yaml --p 0.5
    python compress_nlvr_dtp.py --config configs/shapes/nlvr.yaml --p 0.5

Writes <output_dir>/{config.yaml, log.txt, checkpoint_last.pth, checkpoint_best.pth, predictions_{val,test}.json, result.json}.
"""

from functools import partial

import torch
import torch.nn.functional as F

from configs.schema import NlvrConfig
from data.loading import build_loader
from data.nlvr import NlvrCollate, build_datasets
from data.text import load_tokenizer
from engine.compress import run_experiment
from engine.experiment import Evaluation, Experiment
from engine.train import move, progress
from madtp.pruning import PruneSetting
from models.blip_nlvr import reference_gflops
from models.build import nlvr_from_config
from models.weights.blip import load_nlvr_weights
from engine.start import start
from configs.load import parse_command_line
from utils import gather_dicts, init_run, run_main


def main() -> None:
    config = parse_command_line(__doc__, NlvrConfig)
    run = init_run(config.device, config.seed)
    tokenizer = load_tokenizer(config.tokenizer)
    collate = NlvrCollate(tokenizer, config.bert_sizes.max_position_embeddings)
    loaders = {
        split: build_loader(
            dataset,
            config.batch_size_train if split == "train" else config.batch_size_test,
            train=split == "train",
            run=run,
            num_workers=config.num_workers,
            seed=config.seed,
            collate=collate,
            epoch_steps=config.epoch_steps if split == "train" else None,
        )
        for split, dataset in build_datasets(config).items()
        if not (config.evaluate and split == "train")
    }
    build = partial(nlvr_from_config, vocab_size=len(tokenizer))
    model, checkpoint, teacher = start(config, run.device, build, load_nlvr_weights)

    align = not config.uncompressed
    packed = config.packed
    packed_training = packed and run.device.type == "cpu"  # there it was measured to be faster

    def losses(model: torch.nn.Module, batch: dict, setting: PruneSetting) -> dict[str, torch.Tensor]:
        output = model(batch["images"], batch["input_ids"], batch["attention_mask"], setting, align, packed_training)
        task = F.cross_entropy(output.logits.float(), batch["targets"], label_smoothing=config.label_smoothing)
        named = {"task": task}
        if align:
            named["similarity"] = output.similarity
        if teacher is not None:
            inputs = batch["images"], batch["input_ids"], batch["attention_mask"]
            named |= teacher.losses(lambda teacher: teacher(*inputs, packed=packed))
        return named

    def forward(model: torch.nn.Module, batch: dict, setting: PruneSetting):
        output = model(batch["images"], batch["input_ids"], batch["attention_mask"], setting, packed=packed)
        return output, model.gflops(output, setting)

    def evaluate(model: torch.nn.Module, loader, setting: PruneSetting) -> Evaluation:
        rows, right = {}, {}
        for batch in progress(loader, "evaluate", run):
            output, gflops = forward(model, move(batch, run.device), setting)
            scores = output.logits.float().softmax(dim=-1)[:, 1].tolist()
            kept = [model.tokens_kept(output).tolist(), gflops.tolist()]
            for sample, target, score, tokens, cost in zip(batch["ids"], batch["targets"].tolist(), scores, *kept, strict=True):
                rows[sample] = {"prediction": score > 0.5, "score": score, "tokens_kept": tokens, "gflops": cost}
                right[sample] = rows[sample]["prediction"] == bool(target)
        rows, right = gather_dicts(rows), gather_dicts(right)
        gflops = sum(row["gflops"] for row in rows.values()) / len(rows)
        accuracy = 100 * sum(right.values()) / len(right)
        return Evaluation({"acc": accuracy}, gflops, rows)

    run_experiment(
        Experiment(
            config, run, model, loaders, losses, evaluate,
            gflops=lambda model, batch, setting: forward(model, batch, setting)[1],
            inputs=lambda batch: (batch["images"][:1], batch["input_ids"][:1], batch["attention_mask"][:1]),
            score="acc",
            reference=reference_gflops(model),
            loss_weights={"similarity": config.sim_weight, **config.distill_weights},
            checkpoint=checkpoint,
        )
    )  # fmt: skip


if __name__ == "__main__":
    run_main(main)
