"""The house: imports run downwards only, the method needs torch alone, and nothing grows too large."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OUTSIDE = {"tests", "build", "output", "datasets"}
FILES = [
    path.relative_to(ROOT)
    for path in sorted(ROOT.rglob("*.py"))
    if not OUTSIDE & set(path.relative_to(ROOT).parts) and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
]
ENTRY_SCRIPTS = {path.stem for path in FILES if path.stem.startswith("compress_")}
MODULES = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
OURS = {path.parts[0].removesuffix(".py") for path in FILES}
MAX_FILE, MAX_FUNCTION, MAX_SCRIPT = 400, 60, 45

ABOVE = {  # the layers that a layer must not know
    "madtp": OURS - {"madtp"},
    "utils": OURS - {"utils"},
    "metrics": OURS - {"metrics"},
    "configs": OURS - {"configs", "utils"},
    "transform": OURS - {"transform"},
    "data": OURS - {"data", "transform", "configs", "utils"},
    "clip": OURS - {"clip", "madtp", "utils"},
    "models": OURS - {"models", "clip", "madtp", "configs", "utils"},
    "engine": OURS - {"engine", "models", "madtp", "configs", "utils"},
    "tasks": OURS - {"tasks", "engine", "models", "clip", "madtp", "metrics", "data", "transform", "configs", "utils"},
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
    assert {"madtp", "models", "engine", "data", "tasks", "transform", "configs", "utils", "tools", "compress_nlvr_dtp"} <= OURS


@pytest.mark.parametrize("layer", sorted(ABOVE))
def test_imports_run_downwards_only(layer):
    forbidden = ABOVE[layer] | ENTRY_SCRIPTS | {"tools", "tests"}
    wrong = {str(path): sorted(imported(path) & forbidden) for path in FILES if path.parts[0].removesuffix(".py") == layer}
    assert {path: names for path, names in wrong.items() if names} == {}


def test_the_method_needs_torch_alone():
    for path in FILES:
        if path.parts[0] == "madtp":
            allowed = {"torch", "madtp"} | sys.stdlib_module_names
            if path == Path("madtp/attention/triton.py"):
                allowed |= {"triton"}  # installed with PyTorch; nothing else needs it
            if path.parts[1] == "patch":
                allowed |= {"timm", "transformers", "open_clip"}  # adapters to these libraries' models
            assert imported(path) <= allowed, path


def test_no_imports_form_a_circle():
    waiting = {name: imported_modules(path) & MODULES.keys() for name, path in MODULES.items()}
    while ready := [name for name, needed in waiting.items() if not needed & set(waiting) - {name}]:
        for name in ready:
            del waiting[name]
    assert waiting == {}


def imported_modules(path: Path) -> set[str]:
    """The modules that a file imports when it is imported itself; of `from package import module` the module alone."""
    found = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= inner if len(inner) == len(node.names) else {node.module, *inner}
    return found


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
    assert {name: n for name in ENTRY_SCRIPTS if (n := len((ROOT / f"{name}.py").read_text().splitlines())) > MAX_SCRIPT} == {}
