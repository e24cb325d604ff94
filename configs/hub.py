"""Models that are given by their name on the Hugging Face Hub: found in its local cache, or fetched."""

import re
from pathlib import Path

from utils import UserError

NAME = re.compile(r"[\w.-]+/[\w.-]+")
FILES = (".pth", ".pt", ".bin", ".safetensors", ".ckpt")
UNUSED = ["*.msgpack", "*.h5", "*.onnx", "*.tflite", "*.ot"]  # weights of other frameworks


def is_name(given: str) -> bool:
    """Tells whether a text can only be a model's name, such as openai/clip-vit-base-patch16, and not a path on this machine."""
    path = Path(given)
    local = path.exists() or path.parent.exists() or path.suffix in FILES
    return NAME.fullmatch(given) is not None and not local


def from_hub(name: str, key: str) -> Path:
    """Returns the folder of a model of the Hub.

    Args:
        key: where the name was given, for the error message.
    Raises:
        UserError: when it is not in the cache and cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):  # not in the cache
        pass
    try:
        return Path(snapshot_download(name, ignore_patterns=UNUSED))
    except (OSError, ValueError) as error:  # also its own errors, of a model that is not there or a network that is not
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{key}: {name} is no file or folder here, and the Hub did not give a model of this name ({reason}); correct it, or"
            " fetch the model's folder and give its path"
        ) from None
