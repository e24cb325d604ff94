"""One list of packages, however the project is installed."""

from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]


def test_conda_installs_the_list_of_pyproject() -> None:
    packages = YAML(typ="safe", pure=True).load(ROOT / "environment.yml")["dependencies"]
    assert [entry for entry in packages if isinstance(entry, dict)] == [{"pip": ["-e .[all,dev]"]}]
    assert {entry.partition("=")[0] for entry in packages if isinstance(entry, str)} == {"python", "pip"}
