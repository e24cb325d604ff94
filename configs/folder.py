"""Keys that a folder of transformers determines: sizes, image size and tokenizer of the weights that `pretrained` names.

The folder is one that `save_pretrained` wrote, or that is published: config.json, model.safetensors, the tokenizer's files and
preprocessor_config.json. Keys that a YAML file leaves out are taken from it; keys that contradict it are refused.
"""

import math
from pathlib import Path
from typing import Any

from configs.folder_files import CONFIG, one_side, other_model, picture_settings, read_json
from configs.hub import from_hub, is_name
from configs.siglip_folder import NAFLEX, NAFLEX_REFUSED, SIGLIP, same_tokenizer, siglip_keys
from configs.sizes import BERT_SIZES, VIT_SIZES, BertSizes, Pictures
from configs.vocabulary import lowers_case, read_vocabulary, vocabulary_file
from utils import UserError, home_expanded

CLASSES = {  # of transformers, by task
    "retrieval": "BlipForImageTextRetrieval",
    "vqa": "BlipForQuestionAnswering",
    "caption": "BlipForConditionalGeneration",
    "retrieval_clip": "CLIPModel",
}
BLIP, CLIP = "blip", "clip"  # model types
MEAN, STD = Pictures().mean, Pictures().std  # the normalisation of pictures of OpenAI's CLIP and of BLIP
BERT_NORM_EPS = 1e-12
DEC, ENC = "[DEC]", "[ENC]"  # which the tokenizer adds where the word list lacks them
CLIP_WORDS, CLIP_ENDS = 49408, ("<|startoftext|>", "<|endoftext|>")  # of OpenAI's tokenizer
ANY_END = 2  # end of text in configs of older versions of transformers, which look for the highest id instead


def is_folder(path: str | Path) -> bool:
    """Tells whether a path is a folder of transformers."""
    return Path(path).is_dir() and (Path(path) / CONFIG).is_file()


def with_folder_keys(task: str, values: dict[str, Any]) -> dict[str, Any]:
    """Returns the keys of an experiment with those that a folder, `pretrained` or `teacher`, determines; as they are without one.

    Raises:
        UserError: when a folder is broken or of another model, or when a key contradicts it.
    """
    for key in ("pretrained", "teacher"):
        given = values.get(key)
        if not isinstance(given, str) or not given:
            continue
        if is_name(given):
            values = {**values, key: str(from_hub(given, key))}
        if is_folder(home_expanded(values[key])):
            values = {**values, **_agreed(Path(home_expanded(values[key])), task, values)}
    return values


def _agreed(path: Path, task: str, values: dict[str, Any]) -> dict[str, Any]:
    """Returns the keys that a folder determines, those that are given as they are."""
    keys = folder_keys(path, task)
    for key, theirs in keys.items():
        ours = values.get(key)
        if ours in (None, ""):
            continue
        if key == "tokenizer":
            _check_words(path, str(ours), keys)
            keys[key] = ours
        elif found := _difference(key, ours, theirs):
            name, mine, other = found
            way = (
                ", or make a file of it by tools/convert_checkpoint.py, whose positions are interpolated"
                if key == "image_size"
                else ""
            )
            raise UserError(f"{name}: {mine} contradicts {path}, which has {other}; leave the key out{way}")
        elif not isinstance(theirs, dict):
            keys[key] = ours
        else:
            keys[key] = {**theirs, **ours} if isinstance(ours, dict) else ours
    return keys


def folder_keys(path: Path, task: str) -> dict[str, Any]:
    """Returns the config keys of a task's model whose weights lie in a folder of transformers.

    Raises:
        UserError: when the folder is broken, or describes a model that the task does not have.
    """
    content = read_json(path / CONFIG)
    kind, classes = content.get("model_type"), content.get("architectures") or []
    if task == "nlvr":
        raise UserError(f"{path}: a folder of transformers, which has no BLIP for NLVR2; give BLIP's .pth or one of this project")
    if task not in CLASSES:
        return {}
    kinds = {CLIP: CLASSES[task], SIGLIP: "SiglipModel"} if task == "retrieval_clip" else {BLIP: CLASSES[task]}
    if kind == NAFLEX and SIGLIP in kinds:
        raise UserError(f"{path}: {NAFLEX_REFUSED}")
    if kind not in kinds or classes and kinds[kind] not in classes:
        held = ", ".join(map(str, classes)) or f"a model of type {kind!r}"
        wanted = " or ".join(kinds.values())
        raise UserError(f"{path}: holds {held}, and task '{task}' takes {wanted}; give a folder with its weights")
    if kind == SIGLIP:
        return siglip_keys(path, content)
    try:
        keys = _clip_keys(path, content) if kind == CLIP else _blip_keys(path, content, task)
        return {"pictures": Pictures().model_dump(mode="json"), **keys}  # the folder's, or reading it has said no
    except UserError:
        raise
    except Exception:  # transformers checks what it is given in ways of its own
        raise UserError(f"{path / CONFIG}: not a config of {kind.upper()}; fetch the folder again") from None


def _blip_keys(path: Path, content: dict[str, Any], task: str) -> dict[str, Any]:
    from transformers import BlipConfig  # slow to import, and few configs name a folder

    config = BlipConfig.from_dict(content)
    vision, text = config.vision_config, config.text_config
    for name, value, ours in (
        ("vision_config.hidden_act", vision.hidden_act, "gelu"),
        ("text_config.hidden_act", text.hidden_act, "gelu"),
        ("text_config.layer_norm_eps", text.layer_norm_eps, BERT_NORM_EPS),
        ("text_config.tie_word_embeddings", getattr(text, "tie_word_embeddings", True), True),
        ("text_config.encoder_hidden_size", text.encoder_hidden_size, vision.hidden_size),
    ):
        if value != ours:
            raise other_model(path / CONFIG, f"{name}: {value!r}")
    size = one_side(vision.image_size)
    _check_pictures(path, size)
    _check_text(path, text)
    keys = {
        "image_size": size,
        "vit": {
            "patch_size": one_side(vision.patch_size),
            "embed_dim": vision.hidden_size,
            "depth": vision.num_hidden_layers,
            "num_heads": vision.num_attention_heads,
            "mlp_ratio": mlp_ratio(vision.hidden_size, vision.intermediate_size),
        },
        "vit_norm_eps": vision.layer_norm_eps,
        "bert": {name: getattr(text, name) for name in BertSizes.model_fields if name != "dropout"},
    }
    if task == "vqa":
        keys["decoder_layers"] = text.num_hidden_layers
    if task == "retrieval":
        keys["embed_dim"] = config.image_text_hidden_size
    if vocabulary_file(path).is_file():
        keys["tokenizer"] = str(path)
    return keys


def _clip_keys(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    from transformers import CLIPConfig

    config = CLIPConfig.from_dict(content)
    vision, text = config.vision_config, config.text_config
    _check_pictures(path)
    sizes = {
        "patch_size": one_side(vision.patch_size),
        "vision_width": vision.hidden_size,
        "vision_layers": vision.num_hidden_layers,
        "vision_heads": vision.num_attention_heads,
        "text_width": text.hidden_size,
        "text_layers": text.num_hidden_layers,
        "text_heads": text.num_attention_heads,
        "context_length": text.max_position_embeddings,
        "embed_dim": config.projection_dim,
    }
    if vision.hidden_act == text.hidden_act and vision.hidden_act in ("quick_gelu", "gelu"):  # or reading the weights says no
        sizes["activation"] = vision.hidden_act
    keys: dict[str, Any] = {"image_size": one_side(vision.image_size), "clip": sizes}
    if text.eos_token_id not in (ANY_END, text.vocab_size - 1):
        raise other_model(path / CONFIG, f"text_config.eos_token_id: {text.eos_token_id}, which is not the highest,")
    if vocabulary_file(path).is_file():
        words = _words(path)
        _check_count(path, len(words) + 2 * (vocabulary_file(path).suffix == ".txt"), text.vocab_size)
        is_openais = len(words) == CLIP_WORDS and tuple(words[-2:]) == CLIP_ENDS
        keys["tokenizer"] = "clip" if is_openais else str(path)
    return keys


def mlp_ratio(width: int, hidden: int) -> float:
    """Returns the ratio r for which int(width * r) is `hidden`, in spite of rounding."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def other_normalisation(mean: list[float] | None, std: list[float] | None) -> str | None:
    """Returns the setting by which pictures are normalised otherwise than in this project; None if there is none."""
    for name, given, ours in (("mean", mean, MEAN), ("std", std, STD)):
        if given is not None and max(abs(a - b) for a, b in zip(given, ours, strict=True)) > 1e-3:
            return f"{name}: {given}"
    return None


def _check_pictures(path: Path, size: int | None = None) -> None:
    """Checks how the folder prepares pictures; `size`: to which they have to be resized, None for any."""
    file, content = picture_settings(path)
    if file is None:
        return
    if other := other_normalisation(content.get("image_mean"), content.get("image_std")):
        raise other_model(file, other)
    given = content.get("size")
    sides = {int(side) for side in given.values()} if isinstance(given, dict) else {given or size}
    if size is not None and sides != {size}:
        raise UserError(f"{file}: resizes to {given}, but {CONFIG} says {size} pixels; fetch the folder again")


def _check_text(path: Path, text: Any) -> None:
    """Checks that the tokenizer of BLIP's folder gives the ids that its config names."""
    if not vocabulary_file(path).is_file():
        return
    words = _words(path)
    words += [word for word in (DEC, ENC) if word not in words]
    _check_count(path, len(words), text.vocab_size)
    for key, word in (("bos_token_id", DEC), ("sep_token_id", "[SEP]"), ("pad_token_id", "[PAD]")):
        if word in words and getattr(text, key) != words.index(word):
            raise UserError(
                f"{path / CONFIG}: text_config.{key} is {getattr(text, key)}, but {word} is word {words.index(word)} of"
                f" {vocabulary_file(path).name}; give the weights' own tokenizer"
            )
    if not lowers_case(path):
        raise other_model(vocabulary_file(path), "a tokenizer that keeps upper case")


def _check_count(path: Path, words: int, wanted: int) -> None:
    if words != wanted:
        raise UserError(f"{vocabulary_file(path)}: has {words} words, but {CONFIG} says {wanted}; give the weights' own tokenizer")


def _check_words(path: Path, given: str, keys: dict[str, Any]) -> None:
    """Checks that the key `tokenizer` names the same words as the folder's tokenizer, which is among its `keys`."""
    theirs = keys["tokenizer"]
    if keys.get("clip", {}).get("family") == SIGLIP:
        same = same_tokenizer(Path(home_expanded(given)), path)
    elif "clip" in (given, theirs):
        same = given == theirs
    else:
        try:
            words = [word for word in read_vocabulary(vocabulary_file(home_expanded(given))) if word not in (DEC, ENC)]
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not a word list"
            raise UserError(f"tokenizer: {given}: {reason}; leave the key out: {path} has its own") from None
        same = words == [word for word in _words(path) if word not in (DEC, ENC)]
    if not same:
        raise UserError(f"tokenizer: {given} has other words than {path}; leave the key out")


def _words(path: Path) -> list[str]:
    file = vocabulary_file(path)
    try:
        return read_vocabulary(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a word list ({getattr(error, 'strerror', None) or error}); fetch the folder again") from None


def _difference(key: str, ours: Any, theirs: Any) -> tuple[str, Any, Any] | None:
    """Returns the name of a key, or of a key in it, whose two values differ, with the values; None if there is none.

    Keys that do not exist are left to the config's own check.
    """
    if not isinstance(theirs, dict):
        return None if ours == theirs else (key, ours, theirs)
    named = {"vit": VIT_SIZES, "bert": BERT_SIZES}.get(key, {})
    ours = named[ours].model_dump() if isinstance(ours, str) and ours in named else ours
    if not isinstance(ours, dict):
        return None
    differing = (name for name, value in ours.items() if name in theirs and value not in (None, theirs[name]))
    return next(((f"{key}.{name}", ours[name], theirs[name]) for name in differing), None)
