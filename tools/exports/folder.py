"""The folder of an exported model: its files, what deployment.json says of them, and models that run the files for a task."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madtp.blocks import UNPRUNED, Encoded, Guidance, TowerRecord
from madtp.deploy import fixed_record
from madtp.flops import GIGA
from madtp.pruning import WHOLE
from madtp.rule import OFF, PruneSetting
from models.blip_nlvr import NlvrOutput, per_sentence
from tasks.opened import Opened
from tasks.registry import TASKS, load_any_config
from tools.exports.engines import ENGINES, Engine, opened_engine
from tools.exports.parts import IMAGE_ENCODER, MODEL, TEXT_ENCODER, padded_to
from utils import UserError, init_run

DESCRIPTION = "deployment.json"
WHOLE_MODELS = {"nlvr": (MODEL,), "retrieval_clip": (IMAGE_ENCODER, TEXT_ENCODER)}  # parts that answer a task


@dataclass
class Description:
    """The content of deployment.json.

    engine: "onnx" or "openvino"; precision: "fp32" or "int8"
    counts: tokens that each block keeps of a sample, without prefix and merged tokens, by branch; null where a block keeps all
    prune_from, p: of the checkpoint
    text_tokens: length that texts are padded to; 0 where there are none
    calibration_samples: from which the counts come
    parts: by name: file, inputs and outputs with their shapes, GFLOPs, and the deviation from PyTorch
    """

    task: str
    engine: str
    precision: str
    p: float
    counts: dict[str, list[int | None]]
    prune_from: int
    text_tokens: int
    calibration_samples: int
    versions: dict[str, str]
    parts: dict[str, dict]

    def save(self, folder: Path) -> None:
        (folder / DESCRIPTION).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @property
    def setting(self) -> PruneSetting:
        return PruneSetting(0.0, self.prune_from) if self.counts else OFF

    def kept(self, branch: str) -> list[int] | None:
        """Returns the tokens that the blocks of a branch keep; None for a dense model."""
        return [WHOLE if n is None else n for n in self.counts[branch]] if self.counts else None


def is_exported_model(path: Path) -> bool:
    """Tells whether a path is an exported file, or a folder of them."""
    return path.suffix in ENGINES or (path.is_dir() and (path / DESCRIPTION).is_file())


def read_description(path: Path) -> tuple[Path, Description]:
    """Reads the description of an exported file or folder, and returns it with the folder.

    Raises:
        UserError: when there is none, or it is not one.
    """
    folder = path if path.is_dir() else path.parent
    try:
        values = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        return folder, Description(**values)
    except OSError:
        raise UserError(f"{folder / DESCRIPTION}: not there; keep the files of tools/export.py together") from None
    except (ValueError, TypeError):
        raise UserError(f"{folder / DESCRIPTION}: not readable; export the model again") from None


def open_exported(path: Path, precision: str = "fp32", device: str | None = None) -> Opened:
    """Opens an exported model for prediction and evaluation of its task, on the CPU.

    Args:
        precision: fp32, or bf16 where the engine has it; a quantised file stays int8.
    Raises:
        UserError: when a file is missing, or the parts do not answer the task.
    """
    folder, described = read_description(path)
    if device not in (None, "cpu"):
        raise UserError(f"--device {device}: exported files run on the CPU; leave it out")
    wanted = WHOLE_MODELS.get(described.task, ())
    if not wanted or any(name not in described.parts for name in wanted):
        raise UserError(
            f"{folder}: holds {', '.join(described.parts)} of task {described.task!r}, which gives no answer alone; predictions and"
            f" evaluations need whole models: {' or '.join(WHOLE_MODELS)}"
        )
    config = load_any_config(folder / "config.yaml")
    task = TASKS[config.task](config, init_run("cpu", config.seed))
    with torch.device("meta"):
        model = task.build(config)  # for counting GFLOPs alone, which needs no values
    precision = "int8" if described.precision == "int8" else precision
    engines = {name: opened_engine(existing(folder / described.parts[name]["file"]), precision) for name in wanted}
    stand_in = {"nlvr": ExportedNlvr, "retrieval_clip": ExportedClip}[config.task](model, described, engines)
    return Opened(task, stand_in, described.setting, None)


def existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: not there; export the model again")
    return path


class Exported:
    """A model that runs exported files in place of its layers. Its outputs and records are those of the model that it stands for.

    counted: that model, without values, for its costs
    """

    def __init__(self, counted: nn.Module, described: Description, engines: dict[str, Engine]):
        self.counted, self.described, self.engines = counted, described, engines

    @property
    def branches(self) -> Mapping[str, nn.ModuleList]:
        return self.counted.branches

    def record(self, branch: str, tokens: Tensor) -> TowerRecord:
        """Returns the record of samples that enter a branch with `tokens` (B,) tokens."""
        blocks = self.counted.branches[branch]
        rule = None if blocks[0].pruner is None else blocks[0].pruner.rule
        return fixed_record(self.described.kept(branch), tokens, rule, self.described.setting, len(blocks))

    def image_record(self, number: int) -> TowerRecord:
        return self.record("vision", torch.full((number,), self.image_tokens))

    @property
    def image_tokens(self) -> int:
        raise NotImplementedError


class ExportedNlvr(Exported):
    """BLIP-NLVR by exported files."""

    @property
    def image_tokens(self) -> int:
        return self.counted.visual_encoder.pos_embed.shape[1]

    def __call__(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, guidance: Guidance = UNPRUNED) -> NlvrOutput:
        """Judges sentences (S, L) about pairs of images (B, 2, 3, H, W)."""
        text = [padded_to(part, self.described.text_tokens) for part in (input_ids, attention_mask)]
        (logits,) = self.engines[MODEL](per_sentence(images, len(input_ids)), *text)
        vision = self.image_record(2 * len(images))
        return NlvrOutput(logits, vision, self.record("language", attention_mask.sum(dim=1)))

    def tokens_kept(self, output: NlvrOutput) -> Tensor:
        return self.counted.tokens_kept(output)

    def gflops(self, output: NlvrOutput) -> Tensor:
        return self.counted.gflops(output)


class ExportedClip(Exported):
    """CLIP's two towers by exported files."""

    @property
    def image_tokens(self) -> int:
        return len(self.counted.visual.positional_embedding)

    def encode_image(self, images: Tensor, guidance: Guidance = UNPRUNED) -> Encoded:
        """Encodes images (B, 3, H, W) into normalised features (B, E); there are no tokens."""
        (feature,) = self.engines[IMAGE_ENCODER](images)
        return Encoded(feature[:, None], None, F.normalize(feature, dim=-1), self.image_record(len(images)))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None, guidance: Guidance = UNPRUNED) -> Encoded:
        """Encodes texts (B, L) into normalised features (B, E)."""
        (feature,) = self.engines[TEXT_ENCODER](padded_to(input_ids, self.described.text_tokens))
        lengths = input_ids.argmax(dim=1) + 1
        return Encoded(feature[:, None], None, F.normalize(feature, dim=-1), self.record("language", lengths))

    def encode_pairs(
        self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, guidance: Guidance = UNPRUNED
    ) -> tuple[Encoded, Encoded]:
        return self.encode_image(images), self.encode_text(input_ids)

    def tower_flops(self, image: Encoded, text: Encoded) -> tuple[Tensor, Tensor]:
        return self.counted.tower_flops(image, text)

    def costs(self, *inputs: Tensor, guidance: Guidance = UNPRUNED) -> tuple[dict[str, Tensor], Tensor]:
        """Returns the GFLOPs of both towers, by name and their sum. They are those of deployment: this model takes no step."""
        image, text = (tower.double() / GIGA for tower in self.tower_flops(*self.encode_pairs(*inputs)))
        return {"image": image, "text": text}, image + text
