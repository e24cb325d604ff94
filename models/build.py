"""Models from a config: the sizes, the pruners and the learnable tokens that its keys ask for."""

from collections.abc import Callable
from dataclasses import replace

from clip.model import ClipSize
from configs.schema import CaptionConfig, ClipRetrievalConfig, Config, NlvrConfig, RetrievalConfig, VqaConfig
from madtp.pruning import PruningRule, TokenPruner
from models.bert import FIRST_MERGE_LAYER, BertSize, CrossAttention, PairedCrossAttention, TextEncoder
from models.blip_caption import BlipCaption
from models.blip_nlvr import BlipNlvr
from models.blip_retrieval import BlipRetrieval
from models.blip_vqa import BlipVqa
from models.clip_retrieval import ClipRetrieval
from models.vit import VisionTransformer
from utils import UserError

SD_INIT_STD = {"paper": 0.02, "released": 1.0}  # of the learnable tokens, where the config says nothing


def pruner_factory(config: Config) -> Callable[..., TokenPruner | None]:
    """Builds a block's pruner from the block's width, or None where the config says `method: none` or p = 0."""
    if config.uncompressed:
        return lambda dim, **options: None
    try:
        rule = PruningRule(config.method, config.variant, config.keep, tuple(config.tis), config.merge)
    except ValueError as error:
        raise _bad_rule(error) from None

    def make_pruner(dim: int, **options: bool) -> TokenPruner:
        try:
            return TokenPruner(dim, config.sd_num, config.sd_dim, rule, config.mag_projection, **options)
        except ValueError as error:
            raise _bad_rule(error) from None

    return make_pruner


def _bad_rule(error: ValueError) -> UserError:
    return UserError(f"{error}; change the keys 'method', 'variant', 'keep', 'tis', 'merge' or 'mag_projection'")


def vision_transformer(config: Config, make_pruner: Callable[[int], TokenPruner | None]) -> VisionTransformer:
    return VisionTransformer(
        config.image_size,
        **config.vit_sizes.model_dump(),
        drop_path=config.drop_path,
        make_pruner=make_pruner,
        checkpoint_blocks=checkpoint_blocks(config),
    )


def checkpoint_blocks(config: Config) -> int:
    """Image blocks that recompute their activations."""
    return config.vit_ckpt_layer if config.vit_grad_ckpt else 0


def nlvr_from_config(config: NlvrConfig, vocab_size: int) -> BlipNlvr:
    make_pruner = pruner_factory(config)
    vision = vision_transformer(config, make_pruner)
    size = BertSize(vocab_size=vocab_size, **config.bert_sizes.model_dump())
    text = TextEncoder(size, lambda i: PairedCrossAttention(size, vision.embed_dim, i >= FIRST_MERGE_LAYER), make_pruner)
    return BlipNlvr(vision, text, learnable_tokens(config))


def learnable_tokens(config: Config) -> tuple[int, int, float] | None:
    """Number, width and initial std; None for a dense model."""
    std = SD_INIT_STD[config.variant] if config.sd_init_std is None else config.sd_init_std
    return None if config.uncompressed else (config.sd_num, config.sd_dim, std)


def retrieval_from_config(config: RetrievalConfig, vocab_size: int, enc_token: int) -> BlipRetrieval:
    make_pruner = pruner_factory(config)
    vision = vision_transformer(config, make_pruner)
    size = BertSize(vocab_size=vocab_size, **config.bert_sizes.model_dump())
    text = TextEncoder(size, lambda i: CrossAttention(size, vision.embed_dim), lambda dim: make_pruner(dim, mask_follows=True))
    return BlipRetrieval(
        vision,
        text,
        enc_token,
        config.embed_dim,
        config.queue_size,
        config.momentum,
        config.negative_all_rank,
        learnable_tokens(config),
    )


def clip_from_config(config: ClipRetrievalConfig, vocab_size: int) -> ClipRetrieval:
    size = ClipSize(image_size=config.image_size, vocab_size=vocab_size, **config.clip.model_dump())
    return ClipRetrieval(
        size,
        config.queue_size,
        config.momentum,
        pruner_factory(config),
        learnable_tokens(config),
        checkpoint_blocks=checkpoint_blocks(config),
    )


def caption_from_config(config: CaptionConfig, vocab_size: int, prompt: list[int], end: int, padding: int) -> BlipCaption:
    """prompt: ids that every caption begins with, [DEC] first; end, padding: ids of [SEP] and [PAD]."""
    size = BertSize(vocab_size=vocab_size, **config.bert_sizes.model_dump())
    vision = vision_transformer(config, pruner_factory(config))
    learnable = learnable_tokens(config)
    return BlipCaption(vision, size, prompt, end, padding, config.label_smoothing, learnable, config.mag_projection)


def vqa_from_config(config: VqaConfig, vocab_size: int, start: int, end: int, padding: int) -> BlipVqa:
    """start, end, padding: ids of [DEC], [SEP] and [PAD]."""
    make_pruner = pruner_factory(config)
    vision = vision_transformer(config, make_pruner)
    size = BertSize(vocab_size=vocab_size, **config.bert_sizes.model_dump())
    text = TextEncoder(size, lambda i: CrossAttention(size, vision.embed_dim), lambda dim: make_pruner(dim, mask_follows=True))
    learnable, released = learnable_tokens(config), config.variant == "released"
    size = replace(size, num_hidden_layers=config.decoder_layers or size.num_hidden_layers)
    return BlipVqa(vision, text, size, start, end, padding, config.label_smoothing, learnable, reads_padding=released)
