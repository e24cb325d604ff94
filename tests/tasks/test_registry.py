"""A sixth task takes one file, one config class and one entry of the registry; then scripts, engine and tools take it."""

import json
import sys
from typing import Any, ClassVar, Literal

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset

from configs.load import parse_command_line
from configs.schema import TASK, Config
from data.loading import build_loader
from engine.compress import run_experiment
from engine.experiment import Evaluation
from engine.start import start
from madtp.blocks import UNPRUNED, AlignedModel, Guidance, TowerRecord
from madtp.flops import GIGA
from madtp.rule import PruneSetting
from models.build import learnable_tokens, pruner_factory, vision_transformer
from models.weights.reading import load_weights
from tasks import registry
from tasks.prediction import Prediction, Predictor
from tasks.task import Inputs, Task
from tasks.view import Samples, View
from tools import flops, predict
from utils import init_run


class ToyConfig(Config):
    """Brightness: which of two halves of an image is brighter?"""

    script: ClassVar[str] = "compress_toy_dtp.py"
    task: Literal["toy"] = Field("toy", description=TASK)


class Brighter(AlignedModel):
    """An image encoder and a linear head."""

    def __init__(self, config: ToyConfig):
        super().__init__()
        self.visual_encoder = vision_transformer(config, pruner_factory(config))
        self.cls_head = nn.Linear(self.visual_encoder.embed_dim, 2)
        self.init_learnable_tokens(learnable_tokens(config))

    @property
    def branches(self) -> dict[str, nn.ModuleList]:
        return {"vision": self.visual_encoder.blocks}

    @property
    def answer_head(self) -> nn.Module:
        return self.cls_head

    def forward(self, images: Tensor, guidance: Guidance = UNPRUNED) -> tuple[Tensor, TowerRecord]:
        tokens, layout, record = self.visual_encoder(images, self.guided(guidance))
        first = tokens[layout.offsets[:-1]] if guidance.packed else tokens[:, 0]
        return self.cls_head(first), record

    def traced(self, images: Tensor, guidance: Guidance = UNPRUNED) -> Tensor:
        return self(images, guidance)[0]

    def costs(self, images: Tensor, guidance: Guidance = UNPRUNED) -> tuple[dict[str, Tensor], Tensor]:
        _, record = self(images, guidance)
        parts = {"visual_encoder": self.visual_encoder.flops(record).double() / GIGA}
        parts["cls_head"] = torch.full_like(parts["visual_encoder"], self.cls_head.weight.numel() / GIGA)
        return parts, sum(parts.values())

    def reference_gflops(self) -> float:
        size = self.visual_encoder.patch_embed.img_size
        return float(self.costs(torch.zeros(1, 3, *size))[1])


class Halves(Dataset):
    def __init__(self, number: int, size: int):
        self.number, self.size = number, size

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        image, label = torch.rand(3, self.size, self.size, generator=generator), index % 2
        image[:, :, self.size // 2 * label : self.size // 2 * (label + 1)] += 1
        return {"image": image, "label": label, "id": f"half-{index}"}


def collate(items: list[dict]) -> dict[str, Any]:
    images, labels = torch.stack([item["image"] for item in items]), torch.tensor([item["label"] for item in items])
    return {"image": images, "label": labels, "ids": [item["id"] for item in items]}


class ToyView(View):
    @staticmethod
    def test_samples(config: ToyConfig, tokenizer: None) -> Samples:
        return Samples(Halves(6, config.image_size), [f"half-{i}" for i in range(6)], collate)

    def inputs(self, batch: dict) -> Inputs:
        return (batch["image"],)

    def compute(self, batch: dict) -> tuple[Tensor, TowerRecord]:
        return self.model(batch["image"], self.guidance)

    def records(self, output: tuple[Tensor, TowerRecord]) -> dict[str, TowerRecord]:
        return {"image": output[1]}

    def names(self, batch: dict) -> list[str]:
        return batch["ids"]


class ToyPredictor(Predictor):
    wants = "no files"

    def fits(self) -> bool:
        return True

    def predict(self) -> Prediction:
        logits, record = self.model(Halves(1, self.config.image_size)[0]["image"][None], self.guidance)
        side = int(logits.argmax())
        costs = self.costs(lambda found: self.model.visual_encoder.flops(found).double() / GIGA, record, record.unpruned())
        return Prediction([f"half {side}"], {"prediction": side}, *costs, {"image": record})


class ToyTask(Task[ToyConfig]):
    config_class = ToyConfig
    columns = {"accuracy, %": ("acc",)}
    view, predictor = ToyView, ToyPredictor

    @staticmethod
    def load_tokenizer(config: ToyConfig) -> None:
        return None

    def build(self, config: ToyConfig) -> Brighter:
        return Brighter(config)

    @staticmethod
    def load(model: nn.Module, weights: dict[str, Tensor], source: str) -> list[str]:
        return load_weights(model, weights, source, ("space_dict", ".pruner."))

    def loaders(self) -> dict[str, Any]:
        shared = {"run": self.run, "num_workers": 0, "seed": self.config.seed, "collate": collate}
        data = {"train": 32, "calibration": 16, "val": 12, "test": 12}
        return {
            split: build_loader(Halves(number, self.config.image_size), 4, train=split == "train", **shared)
            for split, number in data.items()
        }

    def inputs(self, batch: dict) -> Inputs:
        return (batch["image"],)

    def losses(self, model: nn.Module, batch: dict, setting: PruneSetting) -> dict[str, Tensor]:
        logits, record = model(batch["image"], self.training_guidance(setting))
        named = {"task": nn.functional.cross_entropy(logits, batch["label"])}
        return named if record.features is None else {**named, "similarity": record.features.square().mean()}

    def evaluate(self, model: nn.Module, loader: Any, setting: PruneSetting) -> Evaluation:
        rows, right, total = {}, [], []
        for batch in loader:
            logits, _ = model(batch["image"], self.guidance(setting))
            total += self.gflops(model, batch, setting).tolist()
            right += (logits.argmax(dim=1) == batch["label"]).tolist()
            rows |= {name: {"prediction": int(row.argmax())} for name, row in zip(batch["ids"], logits, strict=True)}
        return Evaluation({"acc": 100 * sum(right) / len(right)}, sum(total) / len(total), rows)

    @classmethod
    def reference_case(cls, config: ToyConfig) -> tuple[Brighter, Inputs]:
        return Brighter(config), (torch.rand(1, 3, config.image_size, config.image_size),)


def main() -> None:
    """The entry script of the toy task."""
    config = parse_command_line("Compress the toy model.", ToyConfig)
    run = init_run(config.device, config.seed)
    task = ToyTask(config, run)
    loaders = task.loaders()
    model, checkpoint, task.teacher = start(config, run.device, task.build, task.load)
    run_experiment(task.experiment(model, loaders, checkpoint, losses=task.losses, evaluate=task.evaluate))


@pytest.fixture
def command(monkeypatch, tmp_path):
    monkeypatch.setitem(registry.TASKS, ToyTask.name(), ToyTask)
    (tmp_path / "toy.yaml").write_text(
        "task: toy\nimage_size: 32\nvit: {patch_size: 8, embed_dim: 16, depth: 3, num_heads: 2}\nkeep: instance\nsd_num: 4\n"
        "sd_dim: 16\nsd_init_std: 1\nmax_epoch: 2\nramp_epochs: 1\ndevice: cpu\n"
    )

    def run(program, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
        program()

    return run


def test_a_sixth_task_runs_end_to_end(command, tmp_path, capsys):
    config, out = tmp_path / "toy.yaml", tmp_path / "run"
    command(main, "--config", config, "--p", "0.3", "--output_dir", out)
    result = json.loads((out / "result.json").read_text())
    assert result["task"] == "toy" and result["gflops"]["measured"] == pytest.approx(result["gflops"]["target"], rel=0.01)
    assert set(result["metrics"]["test"]) == {"acc"} and len((out / "log.txt").read_text().splitlines()) == 2

    opened = registry.open_checkpoint(out / "checkpoint_best.pth", device="cpu")
    assert isinstance(opened.task, ToyTask) and opened.setting.temperature == result["temperature"]
    view = registry.open_view(opened.task.config, out / "checkpoint_best.pth", "cpu")
    (sample,) = [sample for batch in view.batches(view.ids[:1]) for sample in view.samples(batch)]
    assert sample.pictures[0][2].shape == (3, 4, 4)

    capsys.readouterr()
    command(predict.main, "--checkpoint", out / "checkpoint_best.pth", "--device", "cpu", "--json")
    said = json.loads(capsys.readouterr().out)
    assert said["prediction"] in (0, 1) and said["gflops"] < said["gflops_uncompressed"]
    command(flops.main, "--config", config, "--json")
    counted = json.loads(capsys.readouterr().out)["gflops"]
    assert counted["closed_form"] == pytest.approx(counted["fvcore"], rel=1e-9)


def test_sparse_weights_and_distillation_need_nothing_more(command, tmp_path):
    arguments = ("--config", tmp_path / "toy.yaml", "--enable-sparse-api", "--token_reduce")
    command(main, "--config", tmp_path / "toy.yaml", "--p", "0.3", "--output_dir", tmp_path / "first")
    torch.save({"model": Brighter(ToyConfig(**_sizes())).state_dict()}, tmp_path / "dense.pth")
    both = ("--p", "0.53", "--set", "distill=true", "--pretrained", tmp_path / "dense.pth", "--output_dir", tmp_path / "run")
    command(main, *arguments, *both)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["sparsity_type"] == "2:4" and result["params"]["sparse_nonzero"] <= result["params"]["sparse_total"] / 2


def _sizes() -> dict:
    return {"p": 0.0, "image_size": 32, "vit": {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}}


def test_the_registry_is_the_only_table_of_tasks():
    assert set(registry.TASKS) >= {"nlvr", "retrieval", "retrieval_clip", "caption", "vqa"}
    assert all(task.name() == name and task.view and task.predictor and task.columns for name, task in registry.TASKS.items())
