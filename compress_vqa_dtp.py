"""Compress BLIP for visual question answering on VQAv2, with Visual Genome's questions as further training data.

    torchrun --nproc_per_node=8 compress_vqa_dtp.py --config configs/vqa.yaml --reduce_ratio 0.5
    python compress_vqa_dtp.py --config configs/shapes/vqa.yaml --p 0.5

Writes <output_dir>/{config.yaml, log.txt, checkpoint_{last,previous,best}.pth, predictions_{val,test}.json, result.json} and
vqa_result.json, the answers of the test split in the format of VQA's evaluation server.
"""

from configs.load import parse_command_line
from configs.schema import VqaConfig
from engine.compress import run_experiment
from engine.start import start
from tasks.vqa import VqaTask
from utils import init_run, run_main


def main() -> None:
    config = parse_command_line(__doc__, VqaConfig)
    run = init_run(config.device, config.seed)
    task = VqaTask(config, run)

    # Data: training, calibration, validation and test.
    loaders = task.loaders()

    # Model: pretrained weights and, to distil from, the uncompressed teacher.
    model, checkpoint, task.teacher = start(config, run.device, task.build, task.load)

    # Losses: cross-entropy of the answers, weighted by annotators; similarity of both modalities; distillation.
    # Evaluation: accuracy of the best-ranked answer.
    experiment = task.experiment(model, loaders, checkpoint, losses=task.losses, evaluate=task.evaluate)

    # Compress to the GFLOPs target epoch by epoch, select on validation, and test once.
    run_experiment(experiment)


if __name__ == "__main__":
    run_main(main)
