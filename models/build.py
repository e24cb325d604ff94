"""Models from a config: the sizes, the pruners and the learnable tokens that its keys ask for."""

from collections.abc import Callable

from config import Config, NlvrConfig
from madtp.pruning import PruningRule, TokenPruner
from models.bert import FIRST_MERGE_LAYER, BertSize, PairedCrossAttention, TextEncoder
from models.blip_nlvr import BlipNlvr
from models.vit import VisionTransformer
from utils import UserError


def pruner_factory(config: Config) -> Callable[[int], TokenPruner | None]:
    """Builds a block's pruner from the block's width, or None where the config says `method: none` or p = 0."""
    if config.uncompressed:
        return lambda dim: None
    try:
        rule = PruningRule(config.method, config.variant, config.keep, tuple(config.tis), config.merge)
        TokenPruner(config.vit_sizes.embed_dim, config.sd_num, config.sd_dim, rule, config.mag_projection)
    except ValueError as error:
        raise UserError(f"{error}; change the keys 'method', 'variant', 'keep', 'tis', 'merge' or 'mag_projection'") from None
    return lambda dim: TokenPruner(dim, config.sd_num, config.sd_dim, rule, config.mag_projection)


def vision_transformer(config: Config, make_pruner: Callable[[int], TokenPruner | None]) -> VisionTransformer:
    return VisionTransformer(
        config.image_size,
        **config.vit_sizes.model_dump(),
        drop_path=config.drop_path,
        make_pruner=make_pruner,
        checkpoint_blocks=config.vit_ckpt_layer if config.vit_grad_ckpt else 0,
    )


def nlvr_from_config(config: NlvrConfig, vocab_size: int) -> BlipNlvr:
    make_pruner = pruner_factory(config)
    vision = vision_transformer(config, make_pruner)
    size = BertSize(vocab_size=vocab_size, **config.bert_sizes.model_dump())
    text = TextEncoder(size, lambda i: PairedCrossAttention(size, vision.embed_dim, i >= FIRST_MERGE_LAYER), make_pruner)
    learnable = None if config.uncompressed else (config.sd_num, config.sd_dim, config.sd_init_std)
    return BlipNlvr(vision, text, learnable)
