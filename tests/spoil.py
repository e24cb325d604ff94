"""Ways to break the files of a tiny run (tests/tiny_run.py), for the table of bad inputs."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from configs.load import load_config
from configs.schema import ClipRetrievalConfig
from tasks.registry import build_model
from tests.folders import siglip_folder
from tests.tiny_run import write_run

WEIGHTS = "checkpoint_best.pth"
PRUNERS = ("space_dict", ".pruner.", "decoder_alignment.")
Break = Callable[[Path], object]


def written(name: str, content: Any) -> Break:
    """The file `name` has this content: bytes, or what JSON is made of."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda folder: (folder / name).write_bytes(data)


def entry(name: str, **change: Any) -> Break:
    """The second entry of the annotation file `name` is changed; None removes a key."""

    def spoil(folder: Path) -> None:
        content = json.loads((folder / f"{name}.json").read_text())
        content[1] = {key: value for key, value in {**content[1], **change}.items() if value is not None}
        (folder / f"{name}.json").write_text(json.dumps(content))

    return spoil


def gone(name: str) -> Break:
    return lambda folder: (folder / name).unlink()


def cut(name: str, share: float) -> Break:
    return lambda folder: os.truncate(folder / name, int(share * (folder / name).stat().st_size))


def renamed(name: str, to: str) -> Break:
    return lambda folder: (folder / name).rename(folder / to)


def saved(content: Any) -> Break:
    """The checkpoint has this content."""
    return lambda folder: torch.save(content, folder / WEIGHTS)


def weights(change: Callable[[dict], object]) -> Break:
    """The weights of the checkpoint are changed in place."""

    def spoil(folder: Path) -> None:
        checkpoint = torch.load(folder / WEIGHTS)
        change(checkpoint["model"])
        torch.save(checkpoint, folder / WEIGHTS)

    return spoil


def dense(folder: Path) -> None:
    """The checkpoint prunes nothing."""
    weights(lambda model: [model.pop(name) for name in list(model) if any(part in name for part in PRUNERS)])(folder)


def of_another_task(folder: Path) -> None:
    (write_run(folder / "other", "caption") / WEIGHTS).replace(folder / WEIGHTS)


def run_code(folder: Path) -> None:
    torch.save({"model": {"a": torch.ones(1)}, "x": Code()}, folder / WEIGHTS)


class Code:
    def __reduce__(self) -> tuple:
        return os.system, ("false",)


def yaml(text: str) -> Break:
    """The config has this text at its end."""
    return lambda folder: (folder / "config.yaml").write_text(f"{(folder / 'config.yaml').read_text()}{text}\n")


def siglip(change: Break = lambda folder: None, **keys: Any) -> Break:
    """The weights are a folder of SigLIP, which `change` may break, and the config leaves to it all but these keys."""

    def spoil(folder: Path) -> None:
        siglip_folder(folder / "there")
        change(folder / "there")
        theirs = ("clip:", "image_size:", "tokenizer:", "max_text_tokens:", "pretrained:", "p:")
        lines = [line for line in (folder / "config.yaml").read_text().splitlines() if not line.startswith(theirs)]
        lines += [f"pretrained: {folder}/there", "p: 0", *(f"{key}: {json.dumps(value)}" for key, value in keys.items())]
        (folder / "config.yaml").write_text("\n".join(lines) + "\n")

    return spoil


def open_clips(folder: Path) -> None:
    """Weights of a CLIP with OpenAI's vocabulary that nothing is known about."""
    config = load_config(ClipRetrievalConfig, folder / "config.yaml", {"tokenizer": "clip", "p": 0})
    model = build_model(config)[0].state_dict()
    torch.save(
        {name: tensor for name, tensor in model.items() if "_m" not in name and "queue" not in name}, folder / "open_clip.pth"
    )
