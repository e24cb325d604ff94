"""Every key of the YAML files: its type, default, constraint and meaning; and the command line that overrides them.

One flat namespace with the published key names. `Config` holds what all tasks share; each task adds a subclass.
An empty value (`key:`) means none and is refused where a value is needed; `pretrained:` may be empty.
"""

import argparse
import difflib
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from utils import UserError


class Section(BaseModel):
    """A mapping of keys: unknown ones are refused, and a built config does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class VitSizes(Section):
    """The sizes of a vision transformer."""

    patch_size: int = Field(ge=1, description="pixels along one side of a patch")
    embed_dim: int = Field(ge=1, description="channels of a token")
    depth: int = Field(ge=1, description="blocks")
    num_heads: int = Field(ge=1, description="attention heads; they divide embed_dim")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden channels of the MLP over embed_dim")

    @model_validator(mode="after")
    def _heads_divide(self) -> "VitSizes":
        return _require(self, self.embed_dim % self.num_heads == 0, "embed_dim must be a multiple of num_heads")


class BertSizes(Section):
    """The sizes of a BERT encoder; its vocabulary is the tokenizer's."""

    hidden_size: int = Field(ge=1, description="channels of a token")
    num_hidden_layers: int = Field(ge=1, description="layers")
    num_attention_heads: int = Field(ge=1, description="attention heads; they divide hidden_size")
    intermediate_size: int = Field(ge=1, description="hidden channels of the MLP")
    max_position_embeddings: int = Field(512, ge=2, description="the longest text, in tokens with [ENC] and [SEP]")
    dropout: float = Field(0.1, ge=0, lt=1, description="share of activations dropped in training")

    @model_validator(mode="after")
    def _heads_divide(self) -> "BertSizes":
        return _require(
            self, self.hidden_size % self.num_attention_heads == 0, "hidden_size must be a multiple of num_attention_heads"
        )


class Augment(Section):
    """What training does to a picture."""

    crop_scale: tuple[float, float] = Field((0.5, 1.0), description="share of the area that a random crop keeps; [1, 1] is off")
    flip: bool = Field(True, description="mirror half of the pictures, where no sentence names left or right")
    randaugment: bool = Field(True, description="two random operations of strength 5")
    swap: bool = Field(True, description="NLVR2: exchange the two pictures half the time, and left and right in the sentence")

    @model_validator(mode="after")
    def _ordered(self) -> "Augment":
        low, high = self.crop_scale
        return _require(self, 0 < low <= high <= 1, "crop_scale must be two numbers with 0 < first <= second <= 1")


def _require(section: Any, holds: bool, rule: str) -> Any:
    if not holds:
        raise ValueError(rule)
    return section


VIT_SIZES = {
    "base": VitSizes(patch_size=16, embed_dim=768, depth=12, num_heads=12),
    "large": VitSizes(patch_size=16, embed_dim=1024, depth=24, num_heads=16),
}
BERT_SIZES = {"base": BertSizes(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)}


def _name_or_sizes(value: Any) -> str:
    return "<name>" if isinstance(value, str) else "<sizes>"


# The tags stand in pydantic's error locations; `_key_of` drops what is in angle brackets.
Vit = Annotated[
    Annotated[Literal["base", "large"], Tag("<name>")] | Annotated[VitSizes, Tag("<sizes>")], Discriminator(_name_or_sizes)
]
Bert = Annotated[Annotated[Literal["base"], Tag("<name>")] | Annotated[BertSizes, Tag("<sizes>")], Discriminator(_name_or_sizes)]


class Config(Section):
    """The keys that all tasks share."""

    task: ClassVar[str] = ""
    script: ClassVar[str] = ""

    # data
    image_root: Path = Field(Path("datasets/images"), description="the folder that the annotations' image paths start from")
    ann_root: Path = Field(Path("datasets/annotations"), description="the folder of the annotation files")
    train_files: list[str] = Field([], description="names of the annotation files to train on, without .json")
    val_file: str = Field("", description="name of the annotation file that selects the checkpoint")
    test_file: str = Field("", description="name of the annotation file that is evaluated once, at the end")
    tokenizer: Path = Field(Path("pretrained/bert-base-uncased"), description="a vocab.txt, or a folder that holds one")
    image_size: int = Field(384, ge=1, description="pixels along one side; more costs GFLOPs by the square and helps details")
    augment: Augment = Field(Augment(), description="what training does to a picture")
    num_workers: int = Field(4, ge=0, description="processes that read pictures; results do not depend on it")

    # model
    pretrained: str = Field("", description="path of the weights to start from; empty: random weights")
    vit: Vit = Field("base", description="base, large, or a mapping of sizes")
    bert: Bert = Field("base", description="base, or a mapping of sizes")
    vit_grad_ckpt: bool = Field(False, description="recompute activations in the backward pass: less memory, slower")
    vit_ckpt_layer: int = Field(0, ge=0, description="with vit_grad_ckpt, how many of the last blocks recompute")
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth of the last block, rising from 0: more regularises")

    # the method
    method: Literal["dtp", "random", "none"] = Field("dtp", description="what prunes; random: a baseline; none: dense")
    p: float = Field(0.5, ge=0, lt=1, description="share of the GFLOPs to remove; 0 trains or evaluates uncompressed")
    variant: Literal["paper", "released"] = Field("paper", description="released: the formulas of the authors' checkpoints")
    keep: Literal["max", "mean", "instance"] = Field("max", description="what the counts of a batch become")
    prune_from: int = Field(0, ge=0, description="the first block that prunes; a later one keeps more")
    tis: list[Literal["cls", "self", "token"]] = Field(
        ["cls", "self", "token"], min_length=1, description="the terms of the token importance score"
    )
    merge: bool = Field(True, description="merge the pruned tokens into one, instead of dropping them")
    mag_projection: Literal["auto", "on", "off"] = Field(
        "auto", description="map tokens to sd_dim before alignment; auto: where their widths differ"
    )
    sd_num: int = Field(100, ge=1, description="learnable tokens shared by both modalities")
    sd_dim: int = Field(768, ge=1, description="channels of a learnable token")
    sd_init_std: float = Field(0.02, gt=0, description="initial standard deviation of the learnable tokens")
    sim_weight: float = Field(0.1, ge=0, description="weight of the similarity loss; higher aligns the modalities more")
    ramp_epochs: int | None = Field(None, ge=0, description="epochs over which p is reached; none: a third of the epochs")
    calibration_size: int = Field(256, ge=1, description="training samples on which p is measured; more is steadier and slower")

    # optimisation
    batch_size_train: int = Field(16, ge=1, description="samples per process and step")
    batch_size_test: int = Field(32, ge=1, description="samples per process at evaluation")
    init_lr: float = Field(1e-5, gt=0, description="learning rate of the first epoch; higher learns faster, until it diverges")
    min_lr: float = Field(0.0, ge=0, description="where the cosine schedule ends")
    weight_decay: float = Field(0.05, ge=0, description="higher keeps weights smaller")
    max_epoch: int = Field(5, ge=1, description="epochs")
    epoch_steps: int | None = Field(
        None, ge=1, description="end an epoch after so many steps: calibrate, validate and save more often; none: all samples"
    )
    lr_schedule: Literal["epoch", "step"] = Field("epoch", description="whether the cosine moves once an epoch or at every step")
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises to init_lr")
    clip_grad: float = Field(0.0, ge=0, description="largest norm of the gradient; 0: no limit; steadies training from scratch")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over the wrong answers")
    amp: bool = Field(False, description="mixed precision: faster on a GPU, less exact")

    # the run
    seed: int = Field(42, ge=0, description="of weights, order and augmentation")
    device: str | None = Field(None, pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu or cuda; none: cuda when there is one")
    output_dir: Path = Field(Path("output"), description="the folder that the run writes to")
    evaluate: bool = Field(False, description="evaluate the pretrained weights, do not train")
    resume: str = Field("", description="a checkpoint of a run to go on with; 'last': output_dir/checkpoint_last.pth")

    @field_validator("pretrained", "resume", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return "" if value is None else value

    @field_validator("mag_projection", mode="before")
    @classmethod
    def _yaml_switch(cls, value: Any) -> Any:
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value

    @field_validator("train_files", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _patches_tile_the_image(self) -> "Config":
        patch = self.vit_sizes.patch_size
        return _require(self, self.image_size % patch == 0, f"image_size must be a multiple of the patch size, {patch}")

    @property
    def vit_sizes(self) -> VitSizes:
        return VIT_SIZES[self.vit] if isinstance(self.vit, str) else self.vit

    @property
    def bert_sizes(self) -> BertSizes:
        return BERT_SIZES[self.bert] if isinstance(self.bert, str) else self.bert

    @property
    def uncompressed(self) -> bool:
        """Whether the model is dense: no pruner, no learnable tokens."""
        return self.p == 0 or self.method == "none"

    @property
    def resume_path(self) -> Path | None:
        """The checkpoint to go on with, or None to start afresh."""
        if self.resume == "last":
            return self.output_dir / "checkpoint_last.pth"
        return Path(self.resume) if self.resume else None

    def annotation_file(self, name: str) -> Path:
        """The path of the annotation file `name`, which may or may not end in .json."""
        return self.ann_root / f"{name.removesuffix('.json')}.json"


class NlvrConfig(Config):
    """NLVR2: is the sentence true of the two pictures?"""

    task: ClassVar[str] = "nlvr"
    script: ClassVar[str] = "compress_nlvr_dtp.py"

    train_files: list[str] = Field(["nlvr_train"], min_length=1, description="annotation files to train on, without .json")
    val_file: str = Field("nlvr_dev", description="annotation file that selects the checkpoint")
    test_file: str = Field("nlvr_test", description="annotation file that is evaluated once, at the end")
    output_dir: Path = Field(Path("output/nlvr"), description="the folder that the run writes to")
    statements_per_pair: int = Field(
        1, ge=1, description="training statements that share one encoding of their pictures; more is faster and less random"
    )
    images: Literal["both", "left"] = Field("both", description="left: an ablation that shows the left picture twice")
    text_only: bool = Field(False, description="an ablation that blanks both pictures")


ConfigT = TypeVar("ConfigT", bound=Config)


def load_config(cls: type[ConfigT], path: str | Path, overrides: dict[str, Any] | None = None) -> ConfigT:
    """Read the YAML file `path`, let `overrides` (a dotted key reaches into a mapping) go before it, and check the whole.

    Raises:
        UserError: for a missing or invalid file, an unknown key, or a value of the wrong type or range.
    """
    values = _read_yaml(Path(path))
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
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="any key of the YAML")
    arguments = vars(parser.parse_args(argv))
    path, settings = arguments.pop("config"), arguments.pop("settings")
    overrides = dict(_parse_setting(setting) for setting in settings)
    overrides.update({key: value for key, value in arguments.items() if value is not None})
    return load_config(cls, path, overrides)


def _read_yaml(path: Path) -> dict[str, Any]:
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
        return f"{where}: {f'{key}: ' if key else ''}{problem['ctx']['error']}; change one of them"
    return f"{where}: key '{key}' must be {_expectation(problem)}, got {problem['input']!r}"


def _expectation(problem: Any) -> str:
    """What a valid value looks like, for one of pydantic's errors."""
    kind, context = problem["type"], problem.get("ctx", {})
    limits = {"greater_than_equal": ("at least", "ge"), "greater_than": ("above", "gt"), "less_than": ("below", "lt")}
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
    sections = {"vit": VitSizes, "bert": BertSizes, "augment": Augment}
    nested = [f"{name}.{key}" for name, section in sections.items() for key in section.model_fields]
    return [*cls.model_fields, *nested]
