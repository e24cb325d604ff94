"""Parts of models from a config: the pruners, the image encoder and the learnable tokens that its keys ask for."""

from collections.abc import Callable
from dataclasses import replace

from configs.schema import Config
from madtp.pruning import TokenPruner
from madtp.rule import PruningRule
from models.vit import VisionTransformer
from utils import UserError

SD_INIT_STD = {"paper": 0.02, "released": 1.0}  # of the learnable tokens, by default


def pruner_factory(config: Config) -> Callable[..., TokenPruner | None]:
    """Returns a function that builds a block's pruner from its channels, or None for `method: none` or p = 0.

    It also takes `num_prefix_tokens`, and options of `TokenPruner`.
    """
    if config.uncompressed:
        return lambda dim, **options: None
    try:
        rule = PruningRule(
            method=config.method,
            variant=config.variant,
            keep=config.keep_rule,
            terms=tuple(config.tis),
            mag=config.mag,
            merge=config.merge,
            gradient=config.gradient,
            causal_scores=config.causal_scores,
            every=config.prune_every,
        )
    except ValueError as error:
        raise _bad_rule(error) from None

    def make_pruner(dim: int, num_prefix_tokens: int = 1, **options: bool) -> TokenPruner:
        try:
            own = replace(rule, num_prefix_tokens=num_prefix_tokens)
            return TokenPruner(dim, config.sd_num, config.sd_dim, own, config.mag_projection, **options)
        except ValueError as error:
            raise _bad_rule(error) from None

    return make_pruner


def text_pruner_factory(config: Config) -> Callable[..., TokenPruner | None]:
    """Returns that of the text encoders, which `method: tome` leaves dense: it merges patches of images (Bolya et al., 2022)."""
    if config.method == "tome":
        return lambda dim, **options: None
    return pruner_factory(config)


def _bad_rule(error: ValueError) -> UserError:
    keys = "'method', 'variant', 'keep', 'tis', 'mag', 'merge', 'prune_every', 'token_gradient' or 'mag_projection'"
    return UserError(f"{error}; change the keys {keys}")


def vision_transformer(config: Config, make_pruner: Callable[[int], TokenPruner | None]) -> VisionTransformer:
    return VisionTransformer(
        config.image_size,
        **config.vit_sizes.model_dump(),
        norm_eps=config.vit_norm_eps,
        drop_path=config.drop_path,
        make_pruner=make_pruner,
        checkpoint_blocks=checkpoint_blocks(config),
    )


def checkpoint_blocks(config: Config) -> int:
    """Returns the number of image blocks that recompute their activations."""
    return config.vit_ckpt_layer if config.vit_grad_ckpt else 0


def learnable_tokens(config: Config) -> tuple[int, int, float] | None:
    """Returns number, channels and initial standard deviation; None for a model without alignment."""
    std = SD_INIT_STD[config.variant] if config.sd_init_std is None else config.sd_init_std
    return (config.sd_num, config.sd_dim, std) if config.aligns else None
