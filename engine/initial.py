"""The learnable tokens at the start of a run: from the pretrained file, drawn at random, or made from the calibration subset."""

import torch
from torch import Tensor, nn

from engine.diagnostics import watch
from engine.experiment import Experiment
from engine.train import move
from madtp.blocks import AlignedModel, Guidance, PrunedBlock
from madtp.initial import tokens_from_data
from madtp.packing import Layout, Packed
from madtp.pruning import OFF
from utils import UserError, broadcast, logger

PER_BLOCK = 1024  # tokens of a batch that a block adds to the sample


class TokenSample:
    """A random sample of the tokens that enter the blocks, mapped to the width of the learnable tokens, by branch."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator
        self.found: dict[str, list[Tensor]] = {}

    def see(self, branch: str, block: PrunedBlock, x: Tensor, layout: Layout, guidance: Guidance) -> None:
        """Adds a block that is about to run on x (B, P + N, C), or packed (T, C)."""
        if block.pruner is None:
            return
        x = layout.pad(x) if isinstance(layout, Packed) else x
        whole = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if layout is None else layout
        prefix = block.pruner.rule.num_prefix_tokens
        tokens = x[:, prefix:][(whole.valid if isinstance(whole, Packed) else whole)[:, prefix:]]
        some = torch.randperm(len(tokens), generator=self.generator)[:PER_BLOCK].to(x.device)
        self.found.setdefault(branch, []).append(block.pruner.alignment.projection(tokens[some]).float())

    def end_batch(self) -> None:
        """Does nothing: tokens were added as they came."""

    def tokens(self) -> Tensor:
        """Returns the same number of tokens of each branch, (T, D)."""
        branches = [torch.cat(parts) for parts in self.found.values()]
        least = min(map(len, branches))
        chosen = [torch.randperm(len(tokens), generator=self.generator)[:least].to(tokens.device) for tokens in branches]
        return torch.cat([tokens[some] for tokens, some in zip(branches, chosen, strict=True)])


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
