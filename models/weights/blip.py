"""BLIP's weights, as published or from transformers: translating their names to this project's models, and back.

This project's names are those of the checkpoints that BLIP's authors publish. transformers names the image encoder otherwise.
"""

import re

import torch
from torch import nn

from models.weights.reading import StateDict, first_names, interpolate_position_embedding, load_pair_weights, load_weights
from utils import UserError

# Added by this project to a published model, or heads that a model pretrained for another task lacks.
NLVR_MAY_MISS = ("space_dict", ".pruner.", "cls_head.", "crossattention.output.merge_layer.")
# Parts of BLIP's pretraining and retrieval checkpoints beside the encoders.
BLIP_MAY_IGNORE = (
    "text_decoder.", "vision_proj.", "text_proj.", "itm_head.", "visual_encoder_m.", "text_encoder_m.", "vision_proj_m.",
    "text_proj_m.", "temp", "image_queue", "text_queue", "queue_ptr", "ptr_queue", "idx_queue", "embeddings.position_ids",
)  # fmt: skip

# The decoder's position buffer, its output layer where tied to the embeddings, and the parts that this project adds.
DECODER_MAY_MISS = ("space_dict", ".pruner.", "decoder_alignment.", "position_ids", "cls.predictions.decoder.")
TRANSFORMERS_VISION = {  # transformers' names of a vision model's parts, and those of BLIP's checkpoints
    "vision_model.": "visual_encoder.", "encoder.layers.": "blocks.", "self_attn.projection.": "attn.proj.", "self_attn.": "attn.",
    "layer_norm1.": "norm1.", "layer_norm2.": "norm2.", "post_layernorm.": "norm.",
    "embeddings.patch_embedding.": "patch_embed.proj.", "embeddings.position_embedding": "pos_embed",
    "embeddings.class_embedding": "cls_token",
}  # fmt: skip
# What a conversion may leave out. Only training uses the momentum encoders, the queues and the contrastive temperature; position
# ids are constant, and the decoder's output layer is the word embeddings and a bias under second names.
TRAINING_ALONE = re.compile(r"(\w+_m\..*|temp|(image|text|idx|ptr)_queue|queue_ptr)$")
TIED = {
    "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
}
POSITION_IDS = "embeddings.position_ids"
VISION_NAMES = {  # of a part behind visual_encoder. -> transformers', behind vision_model.
    r"^cls_token": "embeddings.class_embedding", r"^pos_embed": "embeddings.position_embedding",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.", r"^norm\.": "post_layernorm.", r"^blocks\.": "encoder.layers.",
    r"\.norm([12])\.": r".layer_norm\1.", r"\.attn\.qkv\.": ".self_attn.qkv.", r"\.attn\.proj\.": ".self_attn.projection.",
}  # fmt: skip
LAYER = r"encoder\.layer\.\d+\."
KNOWN = re.compile(  # every weight of a dense BLIP; P: weight or bias
    r"(visual_encoder\.(cls_token|pos_embed|(patch_embed\.proj|norm|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12]))\.P)"
    r"|(text_encoder|text_decoder\.bert)\.(embeddings\.((word|position)_embeddings\.weight|LayerNorm\.P)"
    rf"|{LAYER}((cross)?attention\.(self[01]?\.(query|key|value)|output\.(dense[01]?|LayerNorm|merge_layer))"
    r"|intermediate\.dense|output\.(dense|LayerNorm))\.P)"
    r"|(vision_proj|text_proj|itm_head|cls_head\.\d)\.P"
    r"|text_decoder\.cls\.predictions\.(bias|transform\.(dense|LayerNorm)\.P))$".replace("P", "(weight|bias)")
)


def load_nlvr_weights(model: nn.Module, weights: StateDict, source: str) -> list[str]:
    """Loads BLIP weights into a `BlipNlvr`: one cross-attention becomes two, position embeddings are interpolated.

    Returns the names of weights that `weights` lacks, as the loaders below do.

    Raises:
        UserError: naming weights that do not fit, are missing, or are not known.
    """
    translated: StateDict = {}
    for name, tensor in weights.items():
        for new_name in _paired(name):
            translated[new_name] = tensor.float()
    expected = model.state_dict()
    position = "visual_encoder.pos_embed"
    if position in translated and position in expected:
        translated[position] = interpolate_position_embedding(translated[position], expected[position].shape[1])
    return load_weights(model, translated, source, NLVR_MAY_MISS, BLIP_MAY_IGNORE)


def load_retrieval_weights(model: nn.Module, weights: StateDict, source: str) -> list[str]:
    """Loads BLIP weights, as published or from transformers' BlipForImageTextRetrieval, into a `BlipRetrieval`.

    Missing momentum weights start as copies of the online weights.

    Raises:
        UserError: naming weights that do not fit, are missing, or are not known.
    """
    weights = {name: tensor if tensor.dtype == torch.long else tensor.float() for name, tensor in weights.items()}
    weights = {name: tensor for name, tensor in weights.items() if name not in ("queue_ptr", "ptr_queue") or tensor.dim()}
    weights = {_blip_name(name): tensor for name, tensor in weights.items()}
    return load_pair_weights(model, weights, source, ("visual_encoder.pos_embed", "visual_encoder_m.pos_embed"), BLIP_MAY_IGNORE)


def _blip_name(name: str) -> str:
    """Translates transformers' name of an image encoder weight to BLIP's."""
    if name.startswith("vision_model."):
        for theirs, ours in TRANSFORMERS_VISION.items():
            name = name.replace(theirs, ours)
    return name


def load_decoder_weights(model: nn.Module, weights: StateDict, source: str) -> list[str]:
    """Loads BLIP weights into a `BlipCaption` or a `BlipVqa`; position embeddings are interpolated.

    They are those that BLIP published, or of transformers' BlipForConditionalGeneration or BlipForQuestionAnswering.

    Raises:
        UserError: naming weights that do not fit, are missing, or are not known.
    """
    weights = {_blip_name(name): tensor.float() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    position = "visual_encoder.pos_embed"
    if position in weights:
        weights[position] = interpolate_position_embedding(weights[position], model.state_dict()[position].shape[1])
    may_ignore = tuple(name for name in BLIP_MAY_IGNORE if name != "text_decoder.")  # a deeper decoder must not lose layers
    return load_weights(model, weights, source, DECODER_MAY_MISS, may_ignore)


def _paired(name: str) -> list[str]:
    for single, first, second in (
        ("crossattention.self.", "crossattention.self0.", "crossattention.self1."),
        ("crossattention.output.dense.", "crossattention.output.dense0.", "crossattention.output.dense1."),
    ):
        if single in name:
            return [name.replace(single, first), name.replace(single, second)]
    return [name]


def dense_weights(weights: StateDict, source: str) -> StateDict:
    """Returns weights of a dense BLIP under this project's names, each tensor once.

    Raises:
        UserError: naming weights that no BLIP has, or an output layer that is not tied to the word embeddings.
    """
    translated = {_blip_name(name): tensor for name, tensor in weights.items() if POSITION_IDS not in name}
    for copy, original in TIED.items():
        tensor = translated.pop(copy, None)
        if tensor is not None and not torch.equal(tensor, translated.setdefault(original, tensor)):
            raise UserError(f"{source}: {copy} is not {original}, to which BLIP ties it; give a checkpoint of BLIP")
    if unknown := [name for name in translated if not KNOWN.match(name) and not TRAINING_ALONE.match(name)]:
        raise UserError(f"{source}: holds {first_names(unknown)}, which no BLIP has; give a checkpoint of BLIP alone")
    return translated


def as_published(weights: StateDict) -> StateDict:
    """Returns `dense_weights` as BLIP's authors publish them: with position ids, and the output layer under its second names."""
    published = dict(weights)
    for name, tensor in weights.items():
        if name.endswith("embeddings.position_embeddings.weight"):
            published[name.replace("position_embeddings.weight", "position_ids")] = torch.arange(len(tensor))[None]
    published |= {copy: weights[original] for copy, original in TIED.items() if original in weights}
    return published


def to_transformers(weights: StateDict) -> StateDict:
    """Returns `dense_weights` under transformers' names. Weights that only training uses have none and are left out."""
    return {_transformers_name(name): tensor for name, tensor in weights.items() if not TRAINING_ALONE.match(name)}


def _transformers_name(name: str) -> str:
    front, dot, rest = name.partition(".")
    if front != "visual_encoder":
        return name
    for ours, theirs in VISION_NAMES.items():
        rest = re.sub(ours, theirs, rest)
    return f"vision_model{dot}{rest}"
