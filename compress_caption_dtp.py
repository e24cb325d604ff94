"""Compress BLIP for captioning on COCO.

    torchrun --nproc_per_node=8 -- compress_caption_dtp.py --config configs/caption_coco.yaml --p 0.4
    python compress_caption_dtp.py --config configs/shapes/caption.yaml --p 0.5

Writes <output_dir>/{config.yaml, log.txt, checkpoint_last.pth, checkpoint_best.pth, predictions_{val,test}.json, result.json} and
caption_result.json, the captions of the test split in COCO's format.
"""

from functools import partial

import torch

from configs.schema import CaptionConfig
from data.captions import Split, build_loaders, coco_results
from data.text import dec_token_id, load_tokenizer
from engine.compress import run_experiment
from engine.experiment import Evaluation, Experiment, mean_cost
from engine.train import progress
from tasks.writing import Captioner
from madtp.pruning import PruneSetting
from metrics.caption import caption_scores
from models.build import caption_from_config
from models.decoder import predicting
from models.weights.blip import load_decoder_weights
from engine.start import start
from configs.load import parse_command_line
from utils import gather_dicts, init_run, logger, on_main, run_main

SELECTS = "CIDEr"


def main() -> None:
    config = parse_command_line(__doc__, CaptionConfig)
    run = init_run(config.device, config.seed)
    tokenizer = load_tokenizer(config.tokenizer)
    loaders = build_loaders(config, run, tokenizer, config.prompt, dec_token_id(tokenizer))
    write = Captioner(config, tokenizer)
    words = {"vocab_size": len(tokenizer), "end": tokenizer.sep_token_id, "padding": tokenizer.pad_token_id}
    build = partial(caption_from_config, prompt=write.prompt, **words)
    model, checkpoint, teacher = start(config, run.device, build, load_decoder_weights)

    align = not config.uncompressed
    packed = config.packed
    packed_training = packed and run.device.type == "cpu"  # there it was measured to be faster

    def losses(model: torch.nn.Module, batch: dict, setting: PruneSetting) -> dict[str, torch.Tensor]:
        inputs = batch["image"], batch["input_ids"], batch["attention_mask"]
        named = model(*inputs, setting, align, packed_training).losses
        if teacher is not None:
            said = predicting(batch["attention_mask"], given=len(write.prompt))
            named |= teacher.losses(lambda teacher: teacher(*inputs, packed=packed), said)
        return named

    def gflops(model: torch.nn.Module, batch: dict, setting: PruneSetting) -> torch.Tensor:
        inputs = batch["image"], batch["input_ids"], batch["attention_mask"]
        return sum(model.costs(*inputs, setting=setting, packed=packed)[0].values())

    def forward(model: torch.nn.Module, batch: dict, setting: PruneSetting) -> None:
        for image, ids, mask in zip(batch["image"], batch["input_ids"], batch["attention_mask"].bool(), strict=True):
            model(image[None], ids[None, mask], mask[None, mask].long(), setting, packed=packed)

    def evaluate(model: torch.nn.Module, split: Split, setting: PruneSetting) -> Evaluation:
        rows = {}
        for batch in progress(split.images, "captions", run):
            texts, record, costs = write(model, batch["image"].to(run.device, non_blocking=True), setting)
            for name, text, kept, cost in zip(batch["ids"], texts, record.leaving[-1].tolist(), costs.tolist(), strict=True):
                rows[name] = {"prediction": text, "tokens_kept": kept, "gflops": cost}
        rows = gather_dicts(rows)
        captions = {name: rows[name]["prediction"] for name in split.names}
        cost = mean_cost(model, split.pairs, gflops, setting, run)
        found = on_main(lambda: caption_scores(captions, split.references, slow=split is loaders["test"]), run)
        for name, reason in found.not_computed.items():
            logger.info("%s is not computed: %s", name, reason)
        scoring = {"tokenizer": found.tokenizer, "not_computed": found.not_computed}
        return Evaluation(found.scores, cost, rows, {"caption_result.json": coco_results(captions)}, scoring)

    run_experiment(
        Experiment(
            config, run, model, loaders, losses, evaluate, gflops,
            inputs=lambda batch: (batch["image"][:1], batch["input_ids"][:1], batch["attention_mask"][:1]),
            score=SELECTS,
            reference=model.reference_gflops(),
            loss_weights={"similarity": config.sim_weight, **config.distill_weights},
            checkpoint=checkpoint,
            deployment=lambda model, batch, setting: write(model, batch["image"], setting)[2],
            forward=forward,
        )
    )  # fmt: skip


if __name__ == "__main__":
    run_main(main)
