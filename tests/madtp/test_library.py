"""The library by itself: the lines of docs/library.md run as they stand, and torch is all that they need."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

ROOT = Path(__file__).parents[2]
PRUNE_TIMM, PRUNE_STEP, OWN_MODEL = re.findall(r"```python\n(.*?)```", (ROOT / "docs/library.md").read_text(), re.DOTALL)

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
