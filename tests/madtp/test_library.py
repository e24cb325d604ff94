"""The library by itself: the lines of docs/library.md run as they stand, and torch is all that they need."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image

import madtp
from madtp.patch.folders import save
from tests.madtp.patch import test_blip, test_open_clip, test_transformers
from tests.tools import test_compress

ROOT = Path(__file__).parents[2]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/library.md").read_text(), re.DOTALL)
PRUNE_TIMM, *OF_OTHERS, LOAD, PRUNE_STEP, OWN_MODEL = SNIPPETS

TORCH_ALONE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is not installed", name=name)

sys.meta_path.insert(0, Blocked())
sys.path[:] = [path for path in sys.path if path != {root!r}] + [{package!r}]
"""


def test_a_timm_model_is_pruned_by_the_lines_of_the_documentation(monkeypatch, capsys):
    """A small model without pretrained weights stands in, because a test cannot download any."""
    small = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 4, "num_classes": 5}
    asked = []

    def create_model(name: str, pretrained: bool):
        asked.append((name, pretrained))
        model = timm.models.VisionTransformer(**small)
        for parameter in model.blocks.parameters():
            parameter.data *= 3  # as in a trained model, attention differs between tokens
        return model

    monkeypatch.setattr(timm, "create_model", create_model)
    torch.manual_seed(0)
    names = {"preprocess": lambda image: image, "calibration_images": torch.randn(6, 3, 64, 64)}
    exec(PRUNE_TIMM, names)
    assert len(PRUNE_TIMM.strip().splitlines()) <= 15
    assert asked == [("vit_base_patch16_384", True)] and names["logits"].shape == (6, 5)
    assert f"{names['pruning'].setting}" in capsys.readouterr().out
    assert not hasattr(names["model"], "madtp")


def saved(model, processor, folder: Path, tokenizer=None) -> Path:
    for part in (model, processor, tokenizer):
        if part is not None:
            part.save_pretrained(folder)
    return folder


def folder_of(name: str, folder: Path) -> Path:
    """A small model with the files that the documentation's lines read."""
    size = {"height": 32, "width": 32}
    if name == "CLIPModel":
        return test_compress.clip_folder(folder)
    if name == "Dinov2Model":
        return test_compress.dino_folder(folder)
    if name == "SiglipModel":
        return saved(test_transformers.model_of("siglip"), transformers.SiglipImageProcessor(size=size), folder)
    (folder / "words").mkdir(parents=True)
    (folder / "words" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "dog", "cat"]))
    tokenizer = transformers.BertTokenizer.from_pretrained(folder / "words")
    processor = transformers.BlipImageProcessor(size=size)
    saved(test_blip.model_of("matching"), processor, folder)
    transformers.BlipProcessor(processor, tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("lines", OF_OTHERS, ids=[re.search(r"Clip|\w+Model|Blip\w+|open_clip", lines)[0] for lines in OF_OTHERS])
def test_models_of_other_libraries_are_pruned_by_the_lines_of_the_documentation(monkeypatch, tmp_path, lines):
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(6)]
    names = {"images": images, "texts": ["a dog", "a cat", "a dog a dog"] * 2, "madtp": madtp, "torch": torch}
    names |= {"name": "x", "weights": "x"}
    if "open_clip" in lines:
        model = test_open_clip.model_of("clip")
        as_tensor = lambda image: torch.tensor(np.asarray(image)).permute(2, 0, 1) / 128 - 1  # noqa: E731
        monkeypatch.setattr("open_clip.create_model_and_transforms", lambda name, pretrained: (model, None, as_tensor))
        monkeypatch.setattr("open_clip.get_tokenizer", lambda name: lambda texts: test_transformers.texts(len(texts)))
    else:
        names["folder"] = folder_of(re.search(r"(\w+)\.from_pretrained\(folder\)\.eval", lines)[1], tmp_path / "model")
    with torch.no_grad():
        exec(lines, names)
    assert len(lines.strip().splitlines()) <= 7 and names["model"].madtp.setting.temperature is not None
    assert names["model"].madtp.record.leaving[-1].max() < 17
    assert any(len(names.get(name, ())) == 6 for name in ("logits", "features", "matches", "image_features"))


def test_the_folder_of_the_documentation_loads_with_its_line(tmp_path, monkeypatch):
    model = test_transformers.model_of("dinov2")
    madtp.prune(model, test_transformers.pictures(6), p=0.3)
    monkeypatch.chdir(tmp_path)
    folder = test_compress.dino_folder(Path("clip-p0.5"))
    save(model, folder, "transformers", "Dinov2Model", {})
    names = {"madtp": madtp}
    exec(LOAD, names)
    assert names["model"].madtp.setting == model.madtp.setting


def test_one_step_of_pruning_is_a_few_functions():
    torch.manual_seed(0)
    shapes = {"x": (2, 9, 6), "inputs": (2, 9, 6), "learnable_tokens": (4, 8)}
    names = {name: torch.randn(shape) for name, shape in shapes.items()} | {"C": 6, "D": 8, "temperature": 3.0, "torch": torch}
    names |= {name: torch.rand(2, 9) for name in ("class_attention", "columns")}
    exec(PRUNE_STEP, names)
    assert names["x"].shape[:2] == names["valid"].shape and names["valid"].shape[1] < 9


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """The folder `pip install . --no-deps` would fill: the package alone, without the rest of the project."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "madtp").symlink_to(ROOT / "madtp")
    return folder


def test_a_model_of_ones_own_is_pruned_with_torch_alone(package):
    """The interpreter refuses every other package of the project's, and the project's own other folders."""
    blocked = "timm transformers torchvision numpy fairscale pydantic ruamel fvcore safetensors open_clip utils models".split()
    start = TORCH_ALONE.format(blocked=blocked, root=str(ROOT), package=str(package))
    done = subprocess.run([sys.executable, "-c", start + OWN_MODEL], capture_output=True, text=True, cwd=package)
    assert done.returncode == 0, done.stderr
    kept, cost = done.stdout.strip().splitlines()
    *_, last = [[int(n) for n in found.split(",")] for found in re.findall(r"tensor\(\[(.*?)\]\)", kept)]
    costs = [int(n) for n in re.findall(r"\d+", cost)]
    # Block 1 projects all 50 tokens; with fewer tokens left in the others, less than four dense blocks of 12 C^2 N + 2 C N^2.
    dense = 4 * (12 * 32**2 * 50 + 2 * 32 * 50**2 + 2 * 5 * 32 * 50)
    assert len(last) == len(costs) == 8 and max(last) < 50
    assert all(4 * 32**2 * 50 < each < dense for each in costs)
    lines = OWN_MODEL.split("class Block")[1].split("blocks = ")[0].strip().splitlines()
    assert len(lines) <= 20
