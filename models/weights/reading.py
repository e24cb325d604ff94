"""Reading weights safely and loading them strictly; nothing here knows the names of a particular model."""

import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.folder import is_folder
from configs.folder_files import read_json
from models.weights.pickles import load_plain, unwrapped
from models.weights.safetensors import read_safetensors
from utils import UserError, logger

StateDict = dict[str, Tensor]

# Parts that retrieval training adds: momentum encoders that follow the others, and queues that fill again.
RETRIEVAL_MAY_MISS = (
    "space_dict", ".pruner.", "_m.", "_m", "itm_head.", "vision_proj.", "text_proj.", "temp",
    "image_queue", "text_queue", "idx_queue", "ptr_queue",
)  # fmt: skip
FEATURES = ("image_queue", "text_queue")
QUEUES = (*FEATURES, "idx_queue", "ptr_queue")
# Used by training alone, constant, or another name of weights that are there.
NOT_READ = (*QUEUES, "temp", "decoder_alignment.", "position_ids", "cls.predictions.decoder.")
ALIGNMENT = ("space_dict", ".pruner.")  # added by the pruners: a published model has none

FOLDER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in a folder of transformers
LFS_POINTER = b"version https://git-lfs"
CHECKPOINT_HEADS = (b"PK", b"\x80")  # a zip archive; a bare pickle, as older versions of PyTorch wrote


def read_checkpoint(path: str | Path) -> dict:
    """Reads a checkpoint, .safetensors or .pth, without running code from it; returns a dict with at least "model", a state dict.

    A folder of transformers counts as the file of weights in it, or as its parts together.

    Raises:
        UserError: when the file is missing, not a checkpoint, a pickle that wants to run code, or has values that are not finite.
    """
    path = Path(path)
    if is_folder(path):
        parts = [read_checkpoint(file)["model"] for file in files_of_weights(path)]
        return {"model": {name: tensor for part in parts for name, tensor in part.items()}}
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; set the key 'pretrained' (or --pretrained) to the file")
    try:
        with open(path, "rb") as file:
            head = file.read(len(LFS_POINTER))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; make the file readable, or give another") from None
    if head == LFS_POINTER:
        raise UserError(f"{path}: a Git LFS pointer, not the weights themselves; fetch them with 'git lfs pull'")
    if path.suffix != ".safetensors" and not head.startswith(CHECKPOINT_HEADS):
        raise UserError(f"{path}: not a PyTorch checkpoint (it begins with {head[:12]!r}); fetch it again")
    try:
        if path.suffix == ".safetensors":
            content = read_safetensors(path)
        elif _is_torchscript(path):
            content = _read_torchscript(path)
        else:
            content = load_plain(path)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: not plain weights: it holds Python objects whose loading could run code; save its state dict alone"
        ) from None
    except Exception:  # broken bytes can lead the two readers anywhere, and their words speak of their own insides
        size = path.stat().st_size
        raise UserError(f"{path}: not a readable checkpoint ({size} bytes of it); is it cut off? Fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a state dict; save the model's state dict")
    checkpoint = unwrapped(content)
    if not checkpoint["model"] or not all(isinstance(value, Tensor) for value in checkpoint["model"].values()):
        raise UserError(f"{path}: its weights are not all tensors; save the model's state dict alone")
    for name, tensor in checkpoint["model"].items():
        is_checked = tensor.is_floating_point() and tensor.element_size() > 1 and not name.endswith("attn_mask")  # of -inf
        if is_checked and not tensor.isfinite().all():
            raise UserError(f"{path}: {name} has values that are not finite numbers (NaN, inf); give another checkpoint")
    return checkpoint


def files_of_weights(folder: Path) -> list[Path]:
    """Returns the files of weights in a folder of transformers.

    Raises:
        UserError: when there is none, or the list of them is broken.
    """
    for name in FOLDER_WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        listed = folder / f"{name}.index.json"
        if listed.is_file():
            parts = read_json(listed).get("weight_map")
            if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
                raise UserError(f"{listed}: has no 'weight_map' of weights and their files; fetch the folder again")
            return [folder / part for part in dict.fromkeys(parts.values())]
    raise UserError(f"{folder}: a folder of transformers without {' or '.join(FOLDER_WEIGHTS)}; fetch it again")


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _read_torchscript(path: Path) -> StateDict:
    """Reads the weights of one of OpenAI's archives. Loading calls `__setstate__` only, so the archive's code may not define it."""
    with zipfile.ZipFile(path) as archive:
        if any(b"__setstate__" in archive.read(entry) for entry in archive.infolist() if entry.filename.endswith(".py")):
            raise pickle.UnpicklingError
    return torch.jit.load(path, map_location="cpu").state_dict()


def load_pair_weights(
    model: nn.Module,
    weights: StateDict,
    source: str,
    positions: Iterable[str],
    may_ignore: Iterable[str],
    prefix_tokens: int = 1,
) -> list[str]:
    """Loads weights of a retrieval model, the part that BLIP and CLIP share.

    Position embeddings are interpolated, queues of another size start again, and missing momentum weights are copied
    from the encoders. Image ids in the queue are loaded; whether they number the training data is for the caller to judge.

    Args:
        positions: names of position embeddings (1, P + n * n, C) or (P + n * n, C).
        prefix_tokens: P of them belong to no patch.
    """
    expected = model.state_dict()
    for name in positions:
        if name in weights and weights[name].shape != expected[name].shape:
            embedding = weights[name].reshape(1, *weights[name].shape[-2:])
            embedding = interpolate_position_embedding(embedding, expected[name].shape[-2], prefix_tokens)
            weights[name] = embedding.reshape(*expected[name].shape[:-2], *embedding.shape[-2:])
    if not all(name in weights for name in FEATURES):
        weights.pop("idx_queue", None)
    if any(name in weights and weights[name].shape != expected[name].shape for name in QUEUES):
        logger.info("%s: its queues have another size and start anew", source)
        weights = {name: tensor for name, tensor in weights.items() if name not in QUEUES}
    for name in expected:
        part, dot, rest = name.partition(".")
        online = part.removesuffix("_m") + dot + rest
        if name not in weights and online in weights:
            weights[name] = weights[online]
    return load_weights(model, weights, source, RETRIEVAL_MAY_MISS, may_ignore)


def interpolate_position_embedding(embedding: Tensor, tokens: int, prefix_tokens: int = 1) -> Tensor:
    """Interpolates position embeddings (1, P + n * n, C) to (1, P + m * m, C), bicubic; the rows of P prefix tokens stay.

    Returns `embedding` unchanged when the numbers agree, or when either is not P tokens and a square of patches.
    """
    patches, wanted = embedding.shape[1] - prefix_tokens, tokens - prefix_tokens
    old, new = round(patches**0.5), round(wanted**0.5)
    if old == new or old * old != patches or new * new != wanted:
        return embedding
    grid = embedding[:, prefix_tokens:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    logger.info("position embeddings interpolated from %d x %d to %d x %d patches", old, old, new, new)
    return torch.cat([embedding[:, :prefix_tokens], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def load_weights(
    model: nn.Module, weights: StateDict, source: str, may_miss: Iterable[str] = (), may_ignore: Iterable[str] = ()
) -> list[str]:
    """Loads a state dict and returns the names that it lacks.

    Only names that contain one of `may_miss` may be missing, and only those that contain one of `may_ignore` may be superfluous.

    Raises:
        UserError: with the first names that break this, or whose shapes do not fit.
    """
    expected = model.state_dict()
    shapes = [
        f"{name} is {_shape(weights[name])}, the model's {_shape(tensor)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if shapes:
        keys = "'vit' and 'bert' (for CLIP 'clip'), 'image_size', 'sd_num' and 'tokenizer'"
        raise UserError(f"{source}: shapes do not fit: {first_names(shapes)}; check {keys}")
    missing = [name for name in expected if name not in weights]
    refused = [name for name in missing if not any(part in name for part in may_miss)]
    if refused:
        raise UserError(f"{source}: lacks {first_names(refused)}; is it a checkpoint of this kind of model?")
    unknown = [name for name in weights if name not in expected]
    refused = [name for name in unknown if not any(part in name for part in may_ignore)]
    if refused:
        hint = (
            "it prunes tokens, and here p is 0 or method none"
            if is_pruned(weights) and not is_pruned(expected)
            else "is 'vit' another?"
        )
        raise UserError(f"{source}: holds {first_names(refused)}, which this model does not have; {hint}")
    if new := [name for name in missing if is_read(name)]:
        logger.info("%s lacks %s: new weights there", source, first_names(new))
    model.load_state_dict({name: tensor for name, tensor in weights.items() if name in expected}, strict=False)
    return missing


def is_pruned(weights: StateDict) -> bool:
    """Tells whether weights belong to a model that prunes tokens: such a model has learnable tokens."""
    return "space_dict" in weights


def is_read(name: str) -> bool:
    """Tells whether a prediction needs the weight of this name; momentum encoders, named with `_m`, only serve training."""
    return not name.split(".")[0].endswith("_m") and not any(part in name for part in NOT_READ)


def check_readable(missing: Iterable[str], source: str) -> None:
    """Checks the names that `source` lacks for a model that is evaluated untrained; the pruners' alignment may be missing.

    Raises:
        UserError: when its answers would be random.
    """
    random = [name for name in missing if is_read(name) and not any(part in name for part in ALIGNMENT)]
    if random:
        raise UserError(
            f"{source}: lacks {first_names(random)}, so its answers would be random; give a model trained for this task"
        )


def first_names(names: list[str], shown: int = 3) -> str:
    """Lists the first names, and says how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
