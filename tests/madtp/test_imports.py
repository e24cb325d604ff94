"""The house: imports run downwards only, the method needs torch alone, and nothing grows too large."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OUTSIDE = {"tests", "build", "output", "datasets"}
FILES = [
    path.relative_to(ROOT)
    for path in sorted(ROOT.rglob("*.py"))
    if not OUTSIDE & set(path.relative_to(ROOT).parts) and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
]
ENTRY_SCRIPTS = {path.stem for path in FILES if path.stem.startswith("compress_")}
OURS = {path.parts[0].removesuffix(".py") for path in FILES}
MAX_FILE, MAX_FUNCTION = 400, 80

ABOVE = {  # what a layer must not know
    "madtp": OURS - {"madtp"},
    "metrics": OURS - {"metrics"},
    "transform": {"data", "models", "clip", "engine", "metrics", "madtp"},
    "data": {"models", "engine", "metrics", "madtp"},
    "clip": {"data", "transform", "engine", "metrics"},
    "models": {"data", "transform", "engine", "metrics"},
    "engine": {"transform", "metrics"},
    "sizes": OURS - {"sizes"},
    "config": OURS - {"config", "sizes", "utils"},
    "options": OURS - {"options", "config", "utils"},
    "utils": OURS - {"utils"},
}


def imported(path: Path) -> set[str]:
    """The top-level names that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(node.module.split(".")[0])
    return found


def test_the_files_are_found():
    assert {"madtp", "models", "engine", "data", "transform", "config", "utils", "tools", "compress_nlvr_dtp"} <= OURS


@pytest.mark.parametrize("layer", sorted(ABOVE))
def test_imports_run_downwards_only(layer):
    forbidden = ABOVE[layer] | ENTRY_SCRIPTS | {"tools", "tests"}
    wrong = {str(path): sorted(imported(path) & forbidden) for path in FILES if path.parts[0].removesuffix(".py") == layer}
    assert {path: names for path, names in wrong.items() if names} == {}


def test_the_method_needs_torch_alone():
    for path in FILES:
        if path.parts[0] == "madtp":
            allowed = {"torch", "madtp"} | sys.stdlib_module_names
            if path.name == "kernels.py":
                allowed |= {"triton"}  # PyTorch brings it along; nothing else needs it
            assert imported(path) <= allowed, path


def test_no_file_and_no_function_is_too_long():
    lines = {str(path): len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {path: n for path, n in lines.items() if n > MAX_FILE} == {}
    functions = {
        f"{path}:{node.name}": node.end_lineno - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: n for name, n in functions.items() if n > MAX_FUNCTION} == {}


def test_entry_scripts_are_an_experiment_top_to_bottom():
    assert {name: n for name in ENTRY_SCRIPTS if (n := len((ROOT / f"{name}.py").read_text().splitlines())) > 120} == {}
