"""One list of packages, however the project is installed."""

import re
import sys
from pathlib import Path

from ruamel.yaml import YAML

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it along

ROOT = Path(__file__).parents[1]


def test_conda_installs_the_list_of_pyproject() -> None:
    packages = YAML(typ="safe", pure=True).load(ROOT / "environment.yml")["dependencies"]
    assert [entry for entry in packages if isinstance(entry, dict)] == [{"pip": ["-e .[all,onnx,dev]"]}]
    assert {entry.partition("=")[0] for entry in packages if isinstance(entry, str)} == {"python", "pip"}


def test_the_oldest_versions_are_those_that_pyproject_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    floors = [re.fullmatch(r"([\w.-]+)>=([\w.]+)(,<\d+)?", package) for package in packages]
    assert all(floors), "every package has an oldest version, and only the next major version may be excluded"
    pins = [line for line in (ROOT / "constraints" / "oldest.txt").read_text().splitlines() if not line.startswith("#")]
    assert pins == [f"{floor[1]}=={floor[2]}" for floor in floors if floor]
