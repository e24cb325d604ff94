"""From YAML files and command lines to a config, and what to say when they do not give one."""

import argparse
import difflib
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from configs.schema import Config
from utils import UserError

ConfigT = TypeVar("ConfigT", bound=Config)


def load_config(cls: type[ConfigT], path: str | Path, overrides: dict[str, Any] | None = None) -> ConfigT:
    """Read the YAML file `path`, let `overrides` (a dotted key reaches into a mapping) go before it, and check the whole.

    Raises:
        UserError: for a missing or invalid file, an unknown key, or a value of the wrong type or range.
    """
    values = read_yaml(Path(path))
    for key, value in (overrides or {}).items():
        _assign(values, key.split("."), value)
    try:
        return cls(**values)
    except ValidationError as error:
        raise UserError(_explain(cls, error, Path(path), overrides or {})) from None


def save_config(config: Config, path: str | Path) -> None:
    """Write every key, resolved, as YAML that `load_config` reads back; the first line says how to run it."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"# python {config.script} --config {path}\n")
        yaml.dump(config.model_dump(mode="json"), file)


def parse_command_line(description: str, cls: type[ConfigT], argv: list[str] | None = None) -> ConfigT:
    """The config that the command line names; flags go before `--set`, and `--set` before the file.

    Raises:
        UserError: as `load_config`, and for a `--set` that is not key=value.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    switch = {"action": argparse.BooleanOptionalAction, "default": None}
    parser.add_argument("--config", required=True, metavar="FILE", help="the YAML file of the experiment")
    parser.add_argument("--output_dir", metavar="DIR", help="the folder that the run writes to")
    parser.add_argument("--evaluate", help="evaluate the pretrained weights, do not train", **switch)
    parser.add_argument("--device", help="cpu or cuda; cuda when there is one")
    parser.add_argument("--seed")
    parser.add_argument("--pretrained", metavar="FILE", help="the weights to start from")
    parser.add_argument("--epoch", dest="max_epoch", metavar="N", help="epochs (the key max_epoch)")
    parser.add_argument("--p", help="share of the GFLOPs to remove, 0 <= p < 1")
    parser.add_argument("--amp", help="mixed precision", **switch)
    parser.add_argument("--resume", nargs="?", const="last", metavar="FILE", help="go on from this checkpoint, or the last one")
    parser.add_argument("--enable-sparse-api", action="store_true", help="sparse weights; tokens stay whole without --token_reduce")
    parser.add_argument("--weight-sparse-pattern", metavar="PATTERN", help="of the sparse weights; m4n2_1d is 2:4, the default")
    parser.add_argument("--token_reduce", action="store_true", help="prune tokens, beside sparse weights too")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="any key of the YAML")
    arguments = vars(parser.parse_args(argv))
    path, settings = arguments.pop("config"), arguments.pop("settings")
    overrides = dict(_parse_setting(setting) for setting in settings)
    sparse, pattern, tokens = (arguments.pop(key) for key in ("enable_sparse_api", "weight_sparse_pattern", "token_reduce"))
    if pattern and not sparse:
        raise UserError("--weight-sparse-pattern belongs to --enable-sparse-api; add it, or leave this one out")
    if sparse or tokens:
        given = {**read_yaml(Path(path)), **overrides}
        if not tokens:
            overrides["method"] = "none"
        elif given.get("method") == "none":
            overrides["method"] = "dtp"
        if sparse:
            overrides["sparsity_type"] = pattern or given.get("sparsity_type") or "2:4"
    overrides.update({key: value for key, value in arguments.items() if value is not None})
    return load_config(cls, path, overrides)


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the top-level mapping of a YAML file.

    Raises:
        UserError: for a missing or invalid file.
    """
    try:
        values = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; give the path of a YAML file with --config") from None
    except MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {_one_line(error.problem or error.context)}; mend that line") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {_one_line(error)}") from None
    if not isinstance(values, dict | None):
        raise UserError(f"{path}: must hold `key: value` lines, got {type(values).__name__}")
    return {str(key): value for key, value in (values or {}).items()}


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _parse_setting(setting: str) -> tuple[str, Any]:
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise UserError(f"--set {setting}: write it as --set key=value")
    try:
        return key, YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        raise UserError(f"--set {setting}: the value is not valid YAML; quote it") from None


def _assign(values: dict[str, Any], keys: list[str], value: Any) -> None:
    """Set one nested key. Where the file has no mapping yet, one is made, so that defaults stay for its other keys."""
    for key in keys[:-1]:
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    values[keys[-1]] = value


# pydantic's error types, by what the user should have written
_EXPECTED = {
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
    "list": "a list",
    "tuple": "a list of two numbers",
    "model": "a mapping of keys",
    "dict": "a mapping of keys",
}


def _key_of(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location if not str(part).startswith("<"))


def _explain(cls: type[Config], error: ValidationError, path: Path, overrides: dict[str, Any]) -> str:
    """The first problem in one line, an unknown key before any other, because it often explains the rest."""
    problem = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    key, kind = _key_of(problem["loc"]), problem["type"]
    where = "command line" if any(key == name or name.startswith(f"{key}.") for name in overrides) else str(path)
    if kind == "extra_forbidden":
        known = _known_keys(cls)
        nearest = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"the keys are: {', '.join(k for k in known if '.' not in k)}"
        return f"{where}: unknown key '{key}'; {hint}"
    if kind == "missing":
        return f"{where}: key '{key}' is missing; add it"
    if kind == "value_error":
        return f"{where}: {key}: {problem['ctx']['error']}" if key else f"{where}: {problem['ctx']['error']}; change one of them"
    return f"{where}: key '{key}' must be {_expectation(problem)}, got {problem['input']!r}"


def _expectation(problem: Any) -> str:
    """What a valid value looks like, for one of pydantic's errors."""
    kind, context = problem["type"], problem.get("ctx", {})
    limits = {
        "greater_than_equal": ("at least", "ge"),
        "greater_than": ("above", "gt"),
        "less_than_equal": ("at most", "le"),
        "less_than": ("below", "lt"),
    }
    if kind in limits:
        words, name = limits[kind]
        return f"{words} {context[name]:g}"
    if kind == "literal_error":
        return f"one of {context['expected'].replace(' or ', ', ')}"
    if kind == "string_pattern_mismatch":
        return "cpu, cuda or cuda:N"
    if kind == "too_short" and context.get("field_type") == "List":
        return "a list with something in it"
    return _EXPECTED.get(kind.split("_")[0], problem["msg"].lower())


def _known_keys(cls: type[BaseModel]) -> list[str]:
    """The keys of a config, and those of the mappings in it with a dot."""
    known = list(cls.model_fields)
    for name, field in cls.model_fields.items():
        known += [f"{name}.{key}" for section in _sections(field.annotation) for key in section.model_fields]
    return known


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The mappings that a type names, wherever in it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]
