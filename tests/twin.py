"""A BLIP model of transformers with the weights of ours: the oracle of dense captioning and VQA."""

from torch import nn
from transformers import BlipConfig, PreTrainedModel


def transformers_twin(
    cls: type[PreTrainedModel], model: nn.Module, size: dict, names: dict[str, str], **words: int
) -> PreTrainedModel:
    """Returns the dense model as transformers' `cls`, with the weights of ours.

    Args:
        size: of the image encoder ("vit") and the text decoder ("bert").
        names: parts of our weights' names -> theirs.
        words: vocabulary size, and the ids of the first, last and padding token.
    """
    image_size, patch, vit_width, depth, heads = size["vit"]
    width, layers, text_heads, inner = size["bert"]
    config = BlipConfig(
        vision_config={
            "hidden_size": vit_width, "intermediate_size": 4 * vit_width, "num_hidden_layers": depth, "num_attention_heads": heads,
            "image_size": image_size, "patch_size": patch, "layer_norm_eps": 1e-6,
        },
        text_config={
            "hidden_size": width, "encoder_hidden_size": vit_width, "intermediate_size": inner,
            "num_hidden_layers": layers, "num_attention_heads": text_heads, "max_position_embeddings": 32, "label_smoothing": 0.0,
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "is_decoder": True,
            "tie_word_embeddings": True, **words,
        },
    )  # fmt: skip
    other = cls(config).eval()
    weights = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        weights[name] = tensor
    weights["text_decoder.cls.predictions.decoder.bias"] = weights["text_decoder.cls.predictions.bias"]
    loaded = other.load_state_dict(weights, strict=False)
    assert not loaded.unexpected_keys and not [name for name in loaded.missing_keys if "position_ids" not in name]
    return other
