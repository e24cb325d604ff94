"""The training stages of the uncompressed Shapes model for retrieval with CLIP."""

from pathlib import Path

from torch import Tensor

from configs.schema import ClipRetrievalConfig
from tasks.registry import build_model
from tools.stages.common import RETRIEVAL_DATA, VISION, Plan, Recipe, train_vision, word_directions
from tools.stages.retrieval import train_pairs

PAIRS = Plan(steps=3_000, batch=0, rate=5e-4)


def recipe(config: ClipRetrievalConfig) -> Recipe:
    model, tokenizer = build_model(config)

    def tokens_of(images: Tensor) -> Tensor:
        return model.encode_image(images).tokens

    def vision(seed: int, log: Path) -> None:
        directions = word_directions(model.token_embedding.weight, lambda names: [tokenizer.words(name)[0] for name in names])
        train_vision(model.visual, tokens_of, directions, config.image_size, VISION, seed, log)

    stages = {"vision": vision, "pairs": lambda seed, log: train_pairs(model, config, tokenizer, PAIRS, seed, log)}
    return Recipe(model, stages, RETRIEVAL_DATA)
