"""Compress BLIP for visual question answering on VQAv2, with Visual Genome's questions to train on.

    torchrun --nproc_per_node=8 -- compress_vqa_dtp.py --config configs/vqa.yaml --p 0.5
    python compress_vqa_dtp.py --config configs/shapes/vqa.yaml --p 0.5

Writes <output_dir>/{config.yaml, log.txt, checkpoint_last.pth, checkpoint_best.pth, predictions_{val,test}.json, result.json} and
vqa_result.json, the answers of the test split in the format of VQA's evaluation server.
"""

from functools import partial

import torch

from configs.schema import VqaConfig
from data.text import dec_token_id, load_tokenizer
from data.vqa import build_loaders, encode_answers
from engine.compress import run_experiment
from engine.experiment import Evaluation, Experiment
from engine.train import move, progress
from tasks.writing import Answerer
from madtp.pruning import PruneSetting
from metrics.vqa import accuracy
from models.blip_vqa import one_sample, single_answers, weighted_loss
from models.build import vqa_from_config
from models.decoder import predicting
from models.weights.blip import load_decoder_weights
from engine.start import start
from configs.load import parse_command_line
from utils import gather_dicts, init_run, run_main


def main() -> None:
    config = parse_command_line(__doc__, VqaConfig)
    run = init_run(config.device, config.seed)
    tokenizer = load_tokenizer(config.tokenizer)
    loaders = build_loaders(config, run, tokenizer)
    answer = Answerer(config, tokenizer, run.device)
    words = {"start": dec_token_id(tokenizer), "end": tokenizer.sep_token_id, "padding": tokenizer.pad_token_id}
    build = partial(vqa_from_config, vocab_size=len(tokenizer), **words)
    model, checkpoint, teacher = start(config, run.device, build, load_decoder_weights)

    align = not config.uncompressed
    packed = config.packed
    packed_training = packed and run.device.type == "cpu"  # there it was measured to be faster

    def inputs(batch: dict) -> tuple[torch.Tensor, ...]:
        names = ("images", "question_ids", "question_mask", "answer_ids", "answer_mask", "answer_counts")
        return tuple(batch[name] for name in names)

    def losses(model: torch.nn.Module, batch: dict, setting: PruneSetting) -> dict[str, torch.Tensor]:
        output = model(*inputs(batch), setting, align, packed_training)
        task = weighted_loss(output.answer_losses, batch["answer_weights"], len(batch["images"]))
        named = {"task": task, **({"similarity": output.similarity} if align else {})}
        if teacher is not None:
            named |= teacher.losses(lambda teacher: teacher(*inputs(batch), packed=packed), predicting(batch["answer_mask"]))
        return named

    def gflops(model: torch.nn.Module, batch: dict, setting: PruneSetting) -> torch.Tensor:
        return sum(model.costs(*inputs(batch), setting=setting, packed=packed)[0].values())

    def forward(model: torch.nn.Module, batch: dict, setting: PruneSetting) -> None:
        for sample in single_answers(inputs(batch)):
            model(*sample, setting, packed=packed)

    def evaluate(model: torch.nn.Module, loader, setting: PruneSetting) -> Evaluation:
        rows, known = {}, {}
        for batch in progress(loader, "answers", run):
            batch = move(batch, run.device)
            question = answer.read(model, batch, setting)
            best = [answers[0] for answers in answer.answer(model, question)[0]]
            texts = [found["answer"] for found in best]
            tokens = encode_answers(tokenizer, texts)["attention_mask"].sum(dim=1).to(run.device)
            costs = sum(model.gflops_by_module(question, tokens, torch.ones_like(tokens), setting).values()).tolist()
            kept = (question.vision.leaving[-1] + question.language.leaving[-1]).tolist()
            for sample, found, left, cost, given in zip(batch["ids"], best, kept, costs, batch["answers"], strict=True):
                score = {name: value for name, value in found.items() if name == "score"}
                rows[sample] = {"prediction": found["answer"], **score, "tokens_kept": left, "gflops": cost}
                if given is not None:
                    known[sample] = given
        rows, known = gather_dicts(rows), gather_dicts(known)
        metrics = {"acc": accuracy({sample: rows[sample]["prediction"] for sample in known}, known)} if known else {}
        gflops = sum(row["gflops"] for row in rows.values()) / len(rows)
        submission = [{"question_id": sample, "answer": row["prediction"]} for sample, row in rows.items()]
        return Evaluation(metrics, gflops, rows, {"vqa_result.json": submission})

    run_experiment(
        Experiment(
            config, run, model, loaders, losses, evaluate, gflops,
            inputs=lambda batch: one_sample(inputs(batch)),
            score="acc",
            reference=model.reference_gflops(),
            loss_weights={"similarity": config.sim_weight, **config.distill_weights},
            checkpoint=checkpoint,
            deployment=lambda model, batch, setting: answer(model, batch, setting)[2],
            forward=forward,
        )
    )  # fmt: skip


if __name__ == "__main__":
    run_main(main)
