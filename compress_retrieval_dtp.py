"""Compress BLIP for image-text retrieval on COCO or Flickr30k.

    torchrun --nproc_per_node=8 compress_retrieval_dtp.py --config configs/retrieval_coco.yaml --reduce_ratio 0.45
    python compress_retrieval_dtp.py --config configs/shapes/retrieval.yaml --p 0.5

Writes <output_dir>/{config.yaml, log.txt, checkpoint_{last,previous,best}.pth, predictions_{val,test}.json, result.json}.
"""

from configs.load import parse_command_line
from configs.schema import RetrievalConfig
from engine.compress import run_experiment
from engine.start import start
from tasks.retrieval import RetrievalTask
from utils import init_run, run_main


def main() -> None:
    config = parse_command_line(__doc__, RetrievalConfig)
    run = init_run(config.device, config.seed)
    task = RetrievalTask(config, run)

    # Data: training, calibration, validation and test.
    loaders = task.loaders()

    # Model: pretrained weights and, to distil from, the uncompressed teacher.
    model, checkpoint, task.teacher = start(config, run.device, task.build, task.load)

    # Losses: contrastive and matching losses; similarity of both modalities; distillation.
    # Evaluation: recalls in both directions.
    experiment = task.experiment(model, loaders, checkpoint, losses=task.losses, evaluate=task.evaluate)

    # Compress to the GFLOPs target epoch by epoch, select on validation, and test once.
    run_experiment(experiment)


if __name__ == "__main__":
    run_main(main)
