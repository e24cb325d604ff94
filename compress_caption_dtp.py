"""Compress BLIP for captioning on COCO.

    torchrun --nproc_per_node=8 compress_caption_dtp.py --config configs/caption_coco.yaml --reduce_ratio 0.4
    python compress_caption_dtp.py --config configs/shapes/caption.yaml --p 0.5

Writes <output_dir>/{config.yaml, log.txt, checkpoint_{last,previous,best}.pth, predictions_{val,test}.json, result.json} and
caption_result.json, the captions of the test split in COCO's format.
"""

from configs.load import parse_command_line
from configs.schema import CaptionConfig
from engine.compress import run_experiment
from engine.start import start
from tasks.caption import CaptionTask
from utils import init_run, run_main


def main() -> None:
    config = parse_command_line(__doc__, CaptionConfig)
    run = init_run(config.device, config.seed)
    task = CaptionTask(config, run)

    # Data: training, calibration, validation and test.
    loaders = task.loaders()

    # Model: pretrained weights and, to distil from, the uncompressed teacher.
    model, checkpoint, task.teacher = start(config, run.device, task.build, task.load)

    # Losses: cross-entropy of the next word; similarity of both modalities; distillation.
    # Evaluation: CIDEr and others of the captions that beam search writes.
    experiment = task.experiment(model, loaders, checkpoint, losses=task.losses, evaluate=task.evaluate)

    # Compress to the GFLOPs target epoch by epoch, select on validation, and test once.
    run_experiment(experiment)


if __name__ == "__main__":
    run_main(main)
