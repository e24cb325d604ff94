"""Loading a config from YAML files and the command line, with one-line errors."""

import argparse
import difflib
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from configs.folder import with_folder_keys
from configs.schema import CommandLine, Config
from utils import UserError, user_path

ConfigT = TypeVar("ConfigT", bound=Config)

# Flags of the authors' scripts that change nothing here, with the reason.
WITHOUT_EFFECT = {
    "--world_size": "the launcher sets the number of processes",
    "--dist_url": "the launcher sets the address",
    "--distributed": "the launcher sets the number of processes",
    "--from-dense-checkpoint": "a checkpoint tells which of its weights are sparse",
    "--reset-info-resume": "a run starts anew unless --resume is given",
    "--w_sp_attn": "no loss of this method has that weight",
    "--w_sp_mlp": "no loss of this method has that weight",
}
SWITCHES = ("--reset-info-resume",)  # those without a value


def load_config(cls: type[ConfigT], path: str | Path, overrides: dict[str, Any] | None = None) -> ConfigT:
    """Reads the YAML file `path`, applies `overrides`, and checks the result. A dotted key overrides a key of a mapping.

    Where `pretrained` is a folder of transformers, keys that are left out are taken from it.

    Raises:
        UserError: when the file is missing or invalid, or a key contradicts the folder.
        ConfigError: when keys are unknown, or values have the wrong type or range.
    """
    values = read_yaml(Path(path))
    for key, value in (overrides or {}).items():
        _assign(values, key.split("."), value)
    values = with_folder_keys(cls.model_fields["task"].default, values)
    try:
        return cls(**values)
    except ValidationError as error:
        raise ConfigError(*_explain(cls, error, Path(path), overrides or {})) from None


def save_config(config: Config, path: str | Path) -> None:
    """Writes all keys with their final values as YAML that `load_config` reads. The first line is the command to run it."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"# python {config.script} --config {path}\n")
        yaml.dump(config.model_dump(mode="json"), file)


def parse_command_line(description: str, cls: type[ConfigT], argv: list[str] | None = None) -> ConfigT:
    """Builds the config from the command line. Flags override `--set`, and `--set` overrides the file.

    Raises:
        UserError: as in `load_config`, and when a `--set` is not key=value.
    """
    arguments = vars(_parser(description).parse_args(argv))
    path, settings = arguments.pop("config"), arguments.pop("settings")
    overrides = dict(_parse_setting(setting) for setting in settings)
    notes = [f"{flag} has no effect: {WITHOUT_EFFECT[flag]}" for flag in arguments.pop("without_effect")]
    sparse, pattern, tokens = (arguments.pop(key) for key in ("enable_sparse_api", "weight_sparse_pattern", "token_reduce"))
    if pattern and not sparse:
        raise UserError("--weight-sparse-pattern belongs to --enable-sparse-api; add it, or leave --weight-sparse-pattern out")
    if sparse or tokens:
        given = {**read_yaml(Path(path)), **overrides}
        if not tokens:
            overrides["method"] = "none"
        elif given.get("method") == "none":
            overrides["method"] = "dtp"
        if sparse:
            overrides["sparsity_type"] = pattern or given.get("sparsity_type") or "2:4"
    overrides.update({key: value for key, value in arguments.items() if value is not None})
    config = load_config(cls, path, overrides)
    if config.resume == "auto":
        config = config.model_copy(update={"resume": "last" if has_run(config.output_dir) else ""})
    if arguments["max_epoch"] is not None and "ramp_epochs" not in overrides:
        config, shortened = _with_shorter_ramp(config)
        notes += shortened
    if pattern and pattern != config.sparsity_type:
        notes.append(f"--weight-sparse-pattern {pattern} is sparsity_type {config.sparsity_type}")
    config._command_line = CommandLine(frozenset(overrides), tuple(notes))
    return config


class ConfigError(UserError):
    """One or several invalid keys. The message is on the first; `others` holds those on the rest."""

    def __init__(self, message: str, *others: str) -> None:
        super().__init__(message)
        self.others = others


class _WithoutEffect(argparse.Action):
    """Collects the flags given that change nothing."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.without_effect = [*namespace.without_effect, self.option_strings[0]]


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(without_effect=[])
    switch = {"action": argparse.BooleanOptionalAction, "default": None}
    parser.add_argument("--config", type=user_path, required=True, metavar="FILE", help="YAML file of the experiment")
    parser.add_argument("--output_dir", metavar="DIR", help="folder that the run writes to")
    parser.add_argument("--evaluate", help="evaluate the pretrained weights, do not train", **switch)
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda if available")
    parser.add_argument("--seed", help="random seed")
    parser.add_argument("--pretrained", metavar="FILE", help="weights to start from")
    parser.add_argument("--epoch", dest="max_epoch", metavar="N", help="number of epochs (the key max_epoch)")
    # torchrun takes --p before the script's options for the start of its own --print-completion.
    parser.add_argument("--reduce_ratio", "--p", dest="p", metavar="P", help="share of the GFLOPs to remove, 0 <= P < 1")
    parser.add_argument("--amp", help="mixed precision", **switch)
    parser.add_argument("--resume", nargs="?", const="last", metavar="FILE", help="continue from this checkpoint, or the last one")
    parser.add_argument("--overwrite", action="store_const", const=True, help="replace the results of another run in output_dir")
    parser.add_argument("--enable-sparse-api", action="store_true", help="sparse weights; prune no tokens without --token_reduce")
    parser.add_argument("--weight-sparse-pattern", metavar="PATTERN", help="of sparse weights, 2:4 or m4n2_1d; default: 2:4")
    parser.add_argument("--token_reduce", action="store_true", help="prune tokens, also with --enable-sparse-api")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="set any key of the YAML")
    for flag in WITHOUT_EFFECT:
        values = 0 if flag in SWITCHES else None
        parser.add_argument(flag, action=_WithoutEffect, nargs=values, dest="without_effect", help=argparse.SUPPRESS)
    return parser


def has_run(folder: Path) -> bool:
    """Tells whether a folder holds a checkpoint to resume from."""
    return any((folder / name).is_file() for name in ("checkpoint_last.pth", "checkpoint_previous.pth"))


def _with_shorter_ramp(config: ConfigT) -> tuple[ConfigT, list[str]]:
    """Shortens the ramp of a file's longer training to the epochs that the flag --epoch leaves for it. Returns a note of it too.

    Sparse weights need epochs besides the ramp; there the engine says how many.
    """
    left = config.max_epoch - config.align_epochs
    if config.pattern is not None or config.ramp_epochs is None or not 0 < left < config.ramp_epochs:
        return config, []
    note = f"--epoch {config.max_epoch}: the ramp is shortened from ramp_epochs: {config.ramp_epochs} to {left}"
    return config.model_copy(update={"ramp_epochs": left}), [note]


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads the top-level mapping of a YAML file.

    Raises:
        UserError: when the file is missing or invalid.
    """
    try:
        values = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; give the path of a YAML file with --config") from None
    except MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {_one_line(error.problem or error.context)}; correct that line") from None
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
        raise UserError(f"--set {_one_line(setting)}: write it as --set key=value")
    try:
        return key, YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        raise UserError(f"--set {_one_line(setting)}: the value is not valid YAML; quote it") from None


def _assign(values: dict[str, Any], keys: list[str], value: Any) -> None:
    """Sets one nested key. Creates missing mappings; their other keys then get their defaults."""
    for key in keys[:-1]:
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    values[keys[-1]] = value


# Expected values, by the start of pydantic's error types.
_EXPECTED = {
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
    "list": "a list",
    "tuple": "a list of numbers",
    "model": "a mapping of keys",
    "dict": "a mapping of keys",
}


def _key_of(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location if not str(part).startswith("<"))


def _explain(cls: type[Config], error: ValidationError, path: Path, overrides: dict[str, Any]) -> list[str]:
    """Describes each error in one line. Unknown keys come before others, because they often explain them."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    return [_one_line(_explain_one(cls, problem, path, overrides)) for problem in problems]  # a key may hold a line break


def _explain_one(cls: type[Config], problem: Any, path: Path, overrides: dict[str, Any]) -> str:
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
    """Describes a valid value, for one of pydantic's errors."""
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
        return "a list that is not empty"
    return _EXPECTED.get(kind.split("_")[0], problem["msg"].lower())


def _known_keys(cls: type[BaseModel]) -> list[str]:
    """Lists the keys of a config. Keys of nested mappings are written with a dot."""
    known = list(cls.model_fields)
    for name, field in cls.model_fields.items():
        known += [f"{name}.{key}" for section in _sections(field.annotation) for key in section.model_fields]
    return known


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """Finds the mappings (pydantic models) anywhere in a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]
