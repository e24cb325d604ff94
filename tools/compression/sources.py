"""Models of other libraries as they lie in folders, with their own preparation of pictures and texts."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from configs.folder import CONFIG, read_json
from madtp.patch import HUGGING_FACE
from madtp.patch.base import Batch
from madtp.patch.folders import build
from models.weights.reading import read_checkpoint
from utils import UserError

OPEN_CLIP_CONFIG, CARD = "open_clip_config.json", "README.md"
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
WEIGHTS = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
HEAVY = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".h5", ".msgpack", ".gguf")  # weights in any format
UNKNOWN_LICENCE = "not stated"
KNOWN = "a folder of transformers (CLIP, SigLIP, SigLIP 2, DINOv2, BLIP), of open_clip, or of timm"


@dataclass
class Source:
    """A model to compress.

    prepare: pictures -> a batch of the model's inputs
    tokenize: texts -> the inputs that go beside the pictures; None for a model that reads none
    licence: of the weights, as their card states it
    """

    folder: Path
    library: str
    architecture: str
    model: nn.Module
    prepare: Callable[[Sequence[Image.Image]], Batch]
    tokenize: Callable[[Sequence[str]], Any] | None
    licence: str

    def batch(self, pictures: Sequence[Image.Image], texts: Sequence[str] | None) -> Batch:
        """Returns the inputs of the model for pictures, with a text each if there are any."""
        images = self.prepare(pictures)
        if texts is None or self.tokenize is None:
            return images
        words = self.tokenize(texts)
        return {**images, **words} if isinstance(images, Mapping) else (images, words)


def open_source(folder: Path) -> Source:
    """Recognises and loads the model in a folder.

    Raises:
        UserError: when it is no folder of a model that can be compressed.
    """
    if folder.is_file():
        raise UserError(f"--model {folder}: is a file; give {KNOWN}, which tools/convert_checkpoint.py makes of a file of weights")
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return _open_clip(folder)
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if "model_type" in config:
        return _transformers(folder, config)
    if "architecture" in config:
        return _timm(folder, config)
    raise UserError(f"--model {folder}: holds no {CONFIG} or {OPEN_CLIP_CONFIG} that is known; give {KNOWN}")


def licence_of(folder: Path) -> str:
    """Returns the licence that the card of a model names in its header."""
    card = folder / CARD
    header = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8"), re.DOTALL) if card.is_file() else None
    found = re.search(r"^license:\s*(\S+)", header[1], re.MULTILINE) if header else None
    return found[1] if found else UNKNOWN_LICENCE


def _load(model: nn.Module, folder: Path) -> nn.Module:
    """Loads the weights of a folder strictly."""
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"--model {folder}: holds none of the weights {', '.join(WEIGHTS)}; fetch them too")
    try:
        model.load_state_dict(read_checkpoint(file)["model"])
    except RuntimeError as error:
        raise UserError(f"{file}: its weights are not those of the configuration ({_one_line(error)}); fetch both again") from None
    return model


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _transformers(folder: Path, config: Mapping[str, Any]) -> Source:
    import transformers

    families = {name: family for family, names in HUGGING_FACE.items() for name in names}
    named = (config.get("architectures") or HUGGING_FACE.get(config["model_type"]) or [None])[0]
    if named not in families:
        kind = named or config["model_type"]
        raise UserError(f"--model {folder}: is a {kind} of transformers; supported are {', '.join(families)}")
    architecture, family = named, families[named]
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    here = {"local_files_only": True}
    try:
        model, report = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True, **here)
        processor = transformers.AutoImageProcessor.from_pretrained(folder, **here)
        reads = hasattr(model, "get_text_features") or hasattr(model, "text_encoder")
        reads = reads and any((folder / name).is_file() for name in VOCABULARIES)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **here) if reads else None
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise UserError(f"--model {folder}: transformers cannot load it ({_one_line(error)}); fetch the folder again") from None
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise UserError(f"--model {folder}: lacks the weights {missing}; fetch the folder again")
    padding = "max_length" if family.startswith("siglip") else True  # SigLIP reads the last place
    length = getattr(getattr(model.config, "text_config", model.config), "max_position_embeddings", None)

    def tokenize(texts: Sequence[str]) -> dict[str, Tensor]:
        words = tokenizer(list(texts), padding=padding, truncation=True, max_length=length, return_tensors="pt")
        names = ("input_ids",) if family.startswith("siglip") else ("input_ids", "attention_mask")
        return {name: words[name] for name in names}

    def prepare(pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        return dict(processor(images=list(pictures), return_tensors="pt"))

    words = None if tokenizer is None else tokenize
    return Source(folder, "transformers", architecture, model.eval(), prepare, words, licence_of(folder))


def _open_clip(folder: Path) -> Source:
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = read_json(folder / OPEN_CLIP_CONFIG)
    settings = config.get("model_cfg")
    if not isinstance(settings, dict) or "vision_cfg" not in settings or "multimodal_cfg" in settings:
        raise UserError(f"{folder / OPEN_CLIP_CONFIG}: describes no CLIP; give a folder that open_clip has written")
    if "hf_model_name" in settings.get("text_cfg", {}):
        raise UserError(f"{folder / OPEN_CLIP_CONFIG}: its text encoder is of the Hub, which is not supported; give another model")
    custom = settings.get("custom_text") or "timm_model_name" in settings["vision_cfg"]
    architecture = "CustomTextCLIP" if custom else "CLIP"
    model = _load(build(folder, "open_clip", architecture), folder)
    known = {key: value for key, value in config.get("preprocess_cfg", {}).items() if key in PreprocessCfg.__annotations__}
    size = settings["vision_cfg"].get("image_size", 224)
    transform = image_transform_v2(PreprocessCfg(**{"size": size, **known}), is_train=False)
    tokenizer = open_clip.tokenize

    def prepare(pictures: Sequence[Image.Image]) -> Tensor:
        return torch.stack([transform(picture) for picture in pictures])

    def tokenize(texts: Sequence[str]) -> Tensor:
        return tokenizer(list(texts), context_length=settings["text_cfg"].get("context_length", 77))

    return Source(folder, "open_clip", architecture, model, prepare, tokenize, licence_of(folder))


def _timm(folder: Path, config: Mapping[str, Any]) -> Source:
    import timm

    try:
        model = _load(build(folder, "timm", config["architecture"]), folder)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"--model {folder}: timm cannot build it ({_one_line(error)}); fetch the folder again") from None
    settings = timm.data.resolve_data_config({}, pretrained_cfg=config.get("pretrained_cfg", {}), model=model)
    transform = timm.data.create_transform(**settings)

    def prepare(pictures: Sequence[Image.Image]) -> Tensor:
        return torch.stack([transform(picture) for picture in pictures])

    return Source(folder, "timm", config["architecture"], model, prepare, None, licence_of(folder))


def features(source: Source, batch: Batch) -> dict[str, Tensor]:
    """Returns what a reader of the model compares: the feature of each picture, and of each text, (B, E) by encoder."""
    model = source.model
    if source.library == "timm":
        return {"vision": model(batch)}
    if source.library == "open_clip":
        images, texts = (batch, None) if isinstance(batch, Tensor) else batch
        found = {"vision": model.encode_image(images)}
        return found if texts is None else found | {"language": model.encode_text(texts)}
    return _transformers_features(model, batch)


def _transformers_features(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    texts = {name: values for name, values in batch.items() if name in ("input_ids", "attention_mask")}
    images = {name: values for name, values in batch.items() if name not in texts}
    if hasattr(model, "get_image_features"):
        found = {"vision": _pooled(model.get_image_features(**images))}
        return found | ({"language": _pooled(model.get_text_features(**texts))} if texts else {})
    if not hasattr(model, "vision_model") or not hasattr(model, "text_encoder"):
        encoder = getattr(model, "vision_model", model) if hasattr(model, "text_decoder") else model
        return {"vision": _pooled(encoder(**images))}
    seen = model.vision_model(**images).last_hidden_state
    found = {"vision": seen[:, 0]}
    return found | ({"language": model.text_encoder(**texts, encoder_hidden_states=seen)[0][:, 0]} if texts else {})


def _pooled(output: Any) -> Tensor:
    """Returns the feature (B, E) of an encoder's output, which is a tensor in some versions of transformers."""
    if isinstance(output, Tensor):
        return output
    return output["image_embeds"] if "image_embeds" in output else output.pooler_output
