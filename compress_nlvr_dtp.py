"""Compress BLIP on NLVR2.

    torchrun --nproc_per_node=8 -- compress_nlvr_dtp.py --config configs/nlvr.yaml --p 0.5
    python compress_nlvr_dtp.py --config configs/shapes/nlvr.yaml --p 0.5

Writes <output_dir>/{config.yaml, log.txt, checkpoint_last.pth, checkpoint_best.pth, predictions_{val,test}.json, result.json}.
"""

import torch
import torch.nn.functional as F

from config import NlvrConfig, parse_command_line
from data.loading import build_loader
from data.nlvr import NlvrCollate, build_datasets
from data.text import load_tokenizer, mask_words
from engine.compress import Evaluation, Experiment, run_experiment
from engine.train import move, progress
from madtp.pruning import PruneSetting
from models.blip_nlvr import reference_gflops
from models.build import nlvr_from_config
from models.pretrained import load_nlvr_weights, read_checkpoint
from utils import gather_objects, init_run, run_main


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
        )
        for split, dataset in build_datasets(config).items()
    }
    model = nlvr_from_config(config, len(tokenizer))
    checkpoint = {}
    if config.pretrained:
        checkpoint = read_checkpoint(config.pretrained)
        load_nlvr_weights(model, checkpoint["model"], config.pretrained)
    model.to(run.device)
    model.visual_encoder.requires_grad_(not config.freeze_vit)

    def losses(model: torch.nn.Module, batch: dict, setting: PruneSetting) -> dict[str, torch.Tensor]:
        align = not config.uncompressed
        rate = config.word_rate if config.word_weight else 0.0
        input_ids, masked = mask_words(batch["input_ids"], tokenizer, rate, config.word_list)
        output = model(batch["images"], input_ids, batch["attention_mask"], setting, align)
        whole, true = ~masked.any(dim=1), batch["targets"] == 1
        logits, targets = output.logits[whole].float(), batch["targets"][whole]
        named = {"task": mean_cross_entropy(logits, targets, config.label_smoothing)}
        if config.word_weight:
            named_words = masked & true.unsqueeze(1)  # a false statement's words cannot be told from the pictures
            words = bare(model).word_logits(output.text[named_words]).float()
            named["words"] = mean_cross_entropy(words, batch["input_ids"][named_words])
        if align:
            named["similarity"] = bare(model).similarity(output)
        return named

    def forward(model: torch.nn.Module, batch: dict, setting: PruneSetting):
        output = model(batch["images"], batch["input_ids"], batch["attention_mask"], setting)
        return output, model.gflops(output, setting)

    def evaluate(model: torch.nn.Module, loader, setting: PruneSetting) -> Evaluation:
        rows = {}
        for batch in progress(loader, "evaluate", run):
            output, gflops = forward(model, move(batch, run.device), setting)
            scores = output.logits.float().softmax(dim=-1)[:, 1].tolist()
            kept = [model.tokens_kept(output).tolist(), gflops.tolist()]
            for sample, target, score, tokens, cost in zip(batch["ids"], batch["targets"].tolist(), scores, *kept, strict=True):
                rows[sample] = {"prediction": score > 0.5, "score": score, "tokens_kept": tokens, "gflops": cost, "target": target}
        rows = {sample: row for part in gather_objects(rows) for sample, row in part.items()}
        correct = [row["prediction"] == bool(row["target"]) for row in rows.values()]
        gflops = sum(row["gflops"] for row in rows.values()) / len(rows)
        return Evaluation({"acc": 100 * sum(correct) / len(correct)}, gflops, rows)

    run_experiment(
        Experiment(
            config, run, model, loaders, losses, evaluate,
            gflops=lambda model, batch, setting: forward(model, batch, setting)[1],
            score="acc",
            reference=reference_gflops(model),
            loss_weights={"similarity": config.sim_weight, "words": config.word_weight},
            checkpoint=checkpoint,
        )
    )  # fmt: skip


def mean_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """The mean over the samples, 0 when there are none (masking may leave a small batch without)."""
    return F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="sum") / max(1, len(targets))


def bare(model: torch.nn.Module) -> torch.nn.Module:
    """The model itself, out of its DistributedDataParallel wrapper."""
    return getattr(model, "module", model)


if __name__ == "__main__":
    run_main(main)
