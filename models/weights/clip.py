"""Loading CLIP's weights with the names of OpenAI, of the authors' compressed checkpoints, or of transformers' CLIPModel."""

import re

import torch
from torch import nn

from models.weights.reading import StateDict, load_pair_weights

# Entries of OpenAI's archives beside the weights.
MAY_IGNORE = ("input_resolution", "context_length", "vocab_size", "position_ids")
POSITIONS = ("visual.positional_embedding", "visual_m.positional_embedding")
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
}
TRANSPOSED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}


def load_clip_weights(model: nn.Module, weights: StateDict, source: str) -> list[str]:
    """Loads weights into a `ClipRetrieval`. Position embeddings are interpolated; missing momentum weights copy the online ones.

    Returns the names of weights that `weights` lacks.

    Raises:
        UserError: naming weights that do not fit, are missing, or are not known.
    """
    if any(name.startswith("vision_model.") for name in weights):
        weights = from_transformers(weights)
    weights = {name.replace(*PRUNER): value.float() if value.is_floating_point() else value for name, value in weights.items()}
    return load_pair_weights(model, weights, source, POSITIONS, MAY_IGNORE)


def from_transformers(weights: StateDict) -> StateDict:
    """Translates the weights of transformers' CLIPModel to OpenAI's names, which keep q, k and v of a block in one matrix."""
    translated: StateDict = {}
    for name, tensor in weights.items():
        if name in TRANSPOSED:
            translated[TRANSPOSED[name]] = tensor.t()
        elif ".self_attn.q_proj." in name:
            parts = [weights[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            stem, kind = _translate(name).split("self_attn.q_proj.")
            translated[f"{stem}attn.in_proj_{kind}"] = torch.cat(parts)
        elif not re.search(r"\.self_attn\.[kv]_proj\.", name):
            translated[_translate(name)] = tensor
    return translated


def _translate(name: str) -> str:
    for names in (TOWERS, BLOCK, PARTS):
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
    return name
