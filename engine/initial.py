"""The learnable tokens at the start of a run: from the pretrained file, drawn at random, or made from the calibration subset."""

import torch
from torch import Tensor, nn

from engine.diagnostics import watch
from engine.experiment import Experiment
from engine.train import move
from madtp.blocks import AlignedModel
from madtp.initial import TokenSample, tokens_from_data
from madtp.rule import OFF
from utils import UserError, broadcast, logger


@torch.no_grad()
def initialise_tokens(experiment: Experiment) -> None:
    """Makes the learnable tokens by the key `sd_init`, with the standard deviation of those that the model has.

    Those of a compressed checkpoint stay, unless `sd_redraw` asks for new ones.
    """
    config, model = experiment.config, experiment.model
    given = config.resume or "temperature" in experiment.checkpoint
    learnable = model.learnable_tokens if isinstance(model, AlignedModel) else None
    if learnable is None or not (config.sd_redraw or (config.sd_init != "random" and not given)):
        return
    generator = torch.Generator().manual_seed(config.seed)
    std, (number, dim) = float(learnable.float().std()), learnable.shape
    if config.sd_init == "random":
        made = torch.randn(number, dim, generator=generator) * std
    else:
        made = _from_calibration(experiment, model, config.sd_init, number, std, generator)
    learnable.copy_(made.to(learnable))
    broadcast(learnable.data)
    logger.info("learnable tokens: %s", "drawn at random" if config.sd_init == "random" else f"made by {config.sd_init}")


def _from_calibration(
    experiment: Experiment, model: nn.Module, method: str, number: int, std: float, generator: torch.Generator
) -> Tensor:
    sample = TokenSample(generator)
    batches = (move(batch, experiment.run.device) for batch in experiment.calibration_batches)
    watch(model.eval(), batches, experiment.gflops, OFF, [sample])
    try:
        return tokens_from_data(method, sample.tokens().cpu(), number, std, generator)
    except ValueError as error:
        raise UserError(f"sd_init: {method}: {error}; lower sd_num, raise calibration_size, or use sd_init: random") from None
