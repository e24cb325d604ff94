"""The start of a run: the model with its weights, and the teacher for distillation (MADTP++)."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from configs.schema import Config
from madtp.distillation import Distillation
from models.momentum import MomentumModel
from models.weights.reading import check_readable, is_pruned, read_checkpoint
from utils import UserError

ConfigT = TypeVar("ConfigT", bound=Config)
Build = Callable[[ConfigT], nn.Module]
Load = Callable[[nn.Module, Mapping[str, Tensor], str], list[str]]  # model, weights, their source -> names of missing weights
TRAINING = {"optimizer", "scaler", "sparse", "rng", "within"}  # entries of checkpoint_last.pth that only resuming needs
UNCOMPRESSED = {"p": 0.0, "drop_path": 0.0}


def start(config: ConfigT, device: torch.device, build: Build, load: Load) -> tuple[nn.Module, dict, Distillation | None]:
    """Builds the model on `device` and loads the weights of `pretrained`.

    Returns:
        the model, the other entries of the `pretrained` file, and the teacher with its losses (None unless `distill: true`).

    Raises:
        UserError: when weights are missing or do not fit.
    """
    model, checkpoint = build(config), {}
    if config.pretrained:
        checkpoint = read_checkpoint(config.pretrained)
        missing = load(model, checkpoint["model"], config.pretrained)
        if config.evaluate:
            check_readable(missing, config.pretrained)
    model.to(device)
    given = checkpoint.pop("model", None)  # otherwise every process would keep a second copy of the weights in memory
    for key in TRAINING & set(checkpoint):
        del checkpoint[key]
    if not config.distill or config.evaluate:
        return model, checkpoint, None
    path = config.teacher or config.pretrained
    if not path:
        raise UserError("distill: there is no model to learn from; set the key 'teacher' or 'pretrained'")
    saved = {**checkpoint, "model": given} if path == config.pretrained else read_checkpoint(path)
    if saved.get("masked") or is_pruned(saved["model"]):
        raise UserError(f"{path}: is compressed, and a teacher must not be; set the key 'teacher' to such a model's weights")
    teacher = build(config.model_copy(update=UNCOMPRESSED))
    check_readable(load(teacher, saved["model"], path), path)  # a head with random weights would teach noise
    if isinstance(teacher, MomentumModel):
        teacher.forget_momentum()
    return model, checkpoint, Distillation(teacher.to(device), model, config.distill_temperature)
