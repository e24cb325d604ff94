"""CLIP's weights under the names of OpenAI, of the authors' compressed checkpoints, or of transformers: loading and translating.

This project's names are OpenAI's, which open_clip has as well. SigLIP's weights, which transformers has, get the same names; the
pooling of its image tower is `visual.pool`.
"""

import re
from pathlib import Path

import torch

from clip.model import ACTIVATIONS, OPENAIS, Clip
from models.weights.clip_config import Unseen, read_beside
from models.weights.reading import StateDict, first_names, load_pair_weights
from models.weights.safetensors import is_exported
from utils import UserError, logger

# Entries of OpenAI's archives beside the weights, and constants of others.
MAY_IGNORE = ("input_resolution", "context_length", "vocab_size", "position_ids", "attn_mask")
POSITIONS = ("visual.positional_embedding", "visual_m.positional_embedding")
SCALARS = ("logit_scale", "logit_bias")  # of one dimension in transformers' SigLIP
PRUNER = ("query_model.q_map.0.", "pruner.alignment.projection.")  # the published name of a block's map W, and ours

# transformers' name of a part -> OpenAI's. Those that end in a dot are followed by "weight" and "bias".
TOWERS = {"vision_model.encoder.layers.": "visual.transformer.resblocks.", "text_model.encoder.layers.": "transformer.resblocks."}
BLOCK = {
    "self_attn.out_proj.": "attn.out_proj.", "layer_norm1.": "ln_1.", "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.", "mlp.fc2.": "mlp.c_proj.",
}  # fmt: skip
PARTS = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.": "visual.conv1.",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.": "ln_final.",
    "text_model.head.": "text_projection.",
    "vision_model.head.attention.": "visual.pool.attn.",
    "vision_model.head.layernorm.": "visual.pool.ln.",
    "vision_model.head.": "visual.pool.",
}
TRANSPOSED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
# What a conversion may leave out: what only training uses, and constants.
TRAINING_ALONE = re.compile(r"(\w+_m(\..*)?|(image|text|idx|ptr)_queue|queue_ptr)$")
CONSTANTS = re.compile(r"(input_resolution|context_length|vocab_size|attn_mask|unseen|.*\.position_ids)$")
KNOWN = re.compile(  # every weight of a dense CLIP or SigLIP; P: weight or bias
    r"(logit_scale|logit_bias|text_projection(\.P)?|positional_embedding|token_embedding\.weight|ln_final\.P"
    r"|visual\.(class_embedding|positional_embedding|proj|conv1\.P|ln_(pre|post)\.P)"
    r"|visual\.pool\.(probe|ln\.P|attn\.(in_proj_P|out_proj\.P)|mlp\.c_(fc|proj)\.P)"
    r"|(visual\.)?transformer\.resblocks\.\d+\.(ln_[12]\.P|attn\.(in_proj_P|out_proj\.P)|mlp\.c_(fc|proj)\.P))$".replace(
        "P", "(weight|bias)"
    )
)

VOCABULARY = 49408  # of OpenAI, and of all who publish weights for its tokenizer
OPENAIS_HEAD = 64  # channels of a head in all of OpenAI's models


def load_clip_weights(model: Clip, weights: StateDict, source: str) -> list[str]:
    """Loads weights into a `ClipRetrieval`. Position embeddings are interpolated; missing momentum weights copy the online ones.

    The model takes over the activation and the heads that belong to the weights, and the width of their MLPs.

    Returns the names of weights that `weights` lacks.

    Raises:
        UserError: naming weights that do not fit, are missing, or are not known; when nothing tells their activation.
    """
    theirs = any(name.startswith("vision_model.") for name in weights)
    if theirs:
        weights = _translated(weights, source)
    weights = {name.replace(*PRUNER): value.float() if value.is_floating_point() else value for name, value in weights.items()}
    unseen = _unseen(model, weights, source, theirs)
    if unseen != _unseen_of(model):
        logger.info("%s: %s, %d heads in the image tower and %d in the text tower", source, *unseen)
    if unseen != _unseen_of(model) or "unseen" in weights:
        model.adopt(*unseen)
    weights |= {name: tensor for name, tensor in model.state_dict().items() if name == "unseen"}
    _fit_mlps(model, weights)
    return load_pair_weights(model, weights, source, POSITIONS, MAY_IGNORE, model.visual.prefix_tokens)


def _translated(weights: StateDict, source: str) -> StateDict:
    """
    Raises:
        UserError: when weights of transformers lack a part of a block's attention.
    """
    try:
        return from_transformers(weights)
    except KeyError as error:
        raise UserError(f"{source}: lacks {error.args[0]}; is it cut off? Fetch it again") from None


def unseen_of(model: Clip, weights: StateDict, source: str) -> Unseen:
    """Finds the activation and heads of weights, as loading does, for a model of their sizes.

    Raises:
        UserError: when nothing tells them.
    """
    return _unseen(model, weights, source, any(name.startswith("vision_model.") for name in weights))


def _unseen(model: Clip, weights: StateDict, source: str, theirs: bool) -> Unseen:
    """Finds the activation and heads of weights; those of the model where they have always been.

    OpenAI's archives, and the checkpoints of this project and of the authors, need no file beside them.

    Raises:
        UserError: when neither the weights, nor a file beside them, nor the config tells.
    """
    if "unseen" in weights:
        activation, *heads = weights["unseen"].tolist()
        return Unseen(list(ACTIVATIONS)[activation], *heads)
    if "input_resolution" in weights:
        ours, size = _unseen_of(model), model.size
        vision_heads, text_heads = size.vision_width // OPENAIS_HEAD, size.text_width // OPENAIS_HEAD
        return Unseen(OPENAIS, vision_heads or ours.vision_heads, text_heads or ours.text_heads)
    if _is_trained_here(weights) or is_exported(Path(source)):
        return _unseen_of(model)._replace(activation=OPENAIS)
    if found := read_beside(Path(source), theirs):
        for width, heads in ((model.size.vision_width, found.vision_heads), (model.size.text_width, found.text_heads)):
            if heads < 1 or width % heads:
                raise UserError(
                    f"{source}: the config beside it has {heads} heads, which do not divide {width} channels; is it another's?"
                )
        return found
    if model.size.activation is None and model.size.vocab_size == VOCABULARY:
        raise UserError(
            f"{source}: does not show its activation and heads; put its open_clip_config.json or config.json beside it, or set"
            " clip.activation (OpenAI: quick_gelu; LAION, DataComp: gelu), clip.vision_heads and clip.text_heads"
        )
    return _unseen_of(model)


def _is_trained_here(weights: StateDict) -> bool:
    """Tells whether weights come from a training run of this project or of the authors, which add to what they start from."""
    return any(name.split(".")[0].endswith("_m") or name in ("space_dict", "image_queue") for name in weights)


def _unseen_of(model: Clip) -> Unseen:
    blocks = model.visual.transformer.resblocks[0], model.transformer.resblocks[0]
    activation = next(name for name, kind in ACTIVATIONS.items() if type(blocks[0].mlp.gelu) is kind)
    return Unseen(activation, *(block.attn.num_heads for block in blocks))


def _fit_mlps(model: Clip, weights: StateDict) -> None:
    """Gives the model the MLPs of the weights, where only their inner width differs."""
    expected = model.state_dict()
    names = [f"{tower}transformer.resblocks.0.mlp.c_fc.weight" for tower in ("visual.", "")]
    if all(name in weights and weights[name].shape[1:] == expected[name].shape[1:] for name in names):
        hidden = [len(weights[name]) for name in names]
        if hidden != [len(expected[name]) for name in names]:
            model.fit_mlps(*hidden)


def from_transformers(weights: StateDict) -> StateDict:
    """Translates weights of transformers' CLIPModel or SiglipModel to our names, which keep q, k and v of a block in one matrix."""
    translated: StateDict = {}
    for name, tensor in weights.items():
        if name in TRANSPOSED:
            translated[TRANSPOSED[name]] = tensor.t()
        elif ".self_attn.q_proj." in name:
            parts = [weights[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            stem, kind = _translate(name).split("self_attn.q_proj.")
            translated[f"{stem}attn.in_proj_{kind}"] = torch.cat(parts)
        elif not re.search(r"\.self_attn\.[kv]_proj\.", name):
            translated[_translate(name)] = tensor.reshape(()) if name in SCALARS else tensor
    return translated


def _translate(name: str) -> str:
    for names in (TOWERS, BLOCK, PARTS):
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
    return name


def dense_weights(weights: StateDict, source: str) -> StateDict:
    """Returns weights of a dense CLIP under OpenAI's names, without constants.

    Raises:
        UserError: naming weights that no CLIP of this project has, or that are missing beside others of their block.
    """
    if any(name.startswith("vision_model.") for name in weights):
        weights = _translated({name: tensor for name, tensor in weights.items() if not CONSTANTS.match(name)}, source)
    weights = {name: tensor for name, tensor in weights.items() if not CONSTANTS.match(name)}
    if unknown := [name for name in weights if not KNOWN.match(name) and not TRAINING_ALONE.match(name)]:
        raise UserError(
            f"{source}: holds {first_names(unknown)}, which no CLIP of this project has; give a checkpoint of CLIP alone"
        )
    return weights


def to_transformers(weights: StateDict) -> StateDict:
    """Returns `dense_weights` under the names of transformers' CLIPModel or SiglipModel, without those that only training uses."""
    translated: StateDict = {}
    is_siglip = "logit_bias" in weights
    transposed = {ours: theirs for theirs, ours in TRANSPOSED.items()}
    for name, tensor in weights.items():
        if TRAINING_ALONE.match(name):
            continue
        if name in transposed:
            translated[transposed[name]] = tensor.t()
        elif name in SCALARS and is_siglip:
            translated[name] = tensor.reshape(1)
        elif "resblocks" in name and ".attn.in_proj_" in name:
            stem, kind = _untranslate(name).split("attn.in_proj_")
            for part, matrix in zip("qkv", tensor.chunk(3), strict=True):
                translated[f"{stem}self_attn.{part}_proj.{kind}"] = matrix
        else:
            translated[_untranslate(name)] = tensor
    return translated


def _untranslate(name: str) -> str:
    for names in (PARTS, TOWERS, BLOCK):
        for theirs, ours in names.items():
            if name.startswith(ours) if names is not BLOCK else f".{ours}" in name:
                name = name.replace(ours, theirs, 1)
                break
    return name
