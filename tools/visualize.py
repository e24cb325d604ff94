"""Pictures of what a compressed model still sees, block by block (as the paper's Fig. 4).

    python tools/visualize.py --config output/demo/nlvr_p0.5/config.yaml --checkpoint output/demo/nlvr_p0.5/checkpoint_best.pth

A row per image, a column per block: pruned patches fade. Below, the sentence after each text layer: pruned words are grey and
struck out. Each sample becomes <out>/<id>.png; an --out that ends in .png takes all samples on one sheet.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor
from torch.utils.data import Subset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import Config, NlvrConfig  # noqa: E402
from data.loading import Loader, build_loader  # noqa: E402
from data.nlvr import NlvrCollate, build_datasets  # noqa: E402
from data.text import load_tokenizer  # noqa: E402
from engine.train import Precision, move  # noqa: E402
from madtp.pruning import OFF, PruneSetting  # noqa: E402
from models.blip_nlvr import NlvrOutput  # noqa: E402
from models.build import nlvr_from_config  # noqa: E402
from models.pretrained import load_nlvr_weights, read_checkpoint  # noqa: E402
from models.trace import surviving, tokens_by_block  # noqa: E402
from options import load_config  # noqa: E402
from transform.images import MEAN, STD  # noqa: E402
from utils import Run, UserError, init_run, run_main  # noqa: E402

# Inches, points and shades of a drawing.
CELL, COUNT, MARGIN, LABEL, LINE, HEAD = 1.1, 0.13, 0.08, 0.75, 0.17, 0.28
FONT, SMALL, GLYPH = 9, 7, 0.602  # GLYPH: the width of a monospaced letter over its size
DPI = 110
VEIL, FADE = (0.91, 0.92, 0.97), 0.85  # what covers a pruned patch, and how much of it: no picture has much of this pale blue
BLACK, GREY = "#1a1a1a", "#b4b4b4"


@dataclass(frozen=True)
class Sample:
    """What is drawn of one sample, whatever the task.

    pictures: label, picture (H, W, 3) in 0 ... 1, patches alive after each block (blocks, rows, columns) bool
    texts: words, words alive after each layer (layers, words) bool
    """

    id: str
    heading: str
    pictures: list[tuple[str, np.ndarray, np.ndarray]]
    texts: list[tuple[list[str], np.ndarray]]


class View(Protocol):
    """A task's model at one prune setting, with its test samples. The demo asks for no more than this."""

    config: Config
    run: Run
    setting: PruneSetting
    pictures_per_sample: int
    ids: list[str]

    def batches(self, ids: Sequence[str]) -> Loader: ...

    def forward(self, batch: dict) -> object: ...

    def tokens(self, output: object) -> dict[str, Tensor]: ...

    def samples(self, batch: dict) -> list[Sample]: ...


class NlvrView:
    """NLVR2: two images and a sentence."""

    config_class = NlvrConfig
    pictures_per_sample = 2

    def __init__(self, config: NlvrConfig, run: Run, weights: dict[str, Tensor], source: str, setting: PruneSetting):
        """weights: of the model, read from the file `source`."""
        self.config, self.run, self.setting = config, run, setting
        self.tokenizer = load_tokenizer(config.tokenizer)
        self.dataset = build_datasets(config)["test"]
        self.ids = [entry["id"] for entry in self.dataset.entries]
        model = nlvr_from_config(config, len(self.tokenizer))
        load_nlvr_weights(model, weights, source)
        self.model = model.to(run.device).eval()
        self.precision = Precision(run.device, config.amp)

    def batches(self, ids: Sequence[str]) -> Loader:
        """The samples with these ids, in batches of the evaluation's size."""
        place = {sample: index for index, sample in enumerate(self.ids)}
        unknown = [sample for sample in ids if sample not in place]
        if unknown:
            raise UserError(f"{unknown[0]}: no such test sample; the ids run from {self.ids[0]} to {self.ids[-1]}")
        return build_loader(
            Subset(self.dataset, [place[sample] for sample in ids]),
            self.config.batch_size_test,
            train=False,
            run=Run(self.run.device),
            num_workers=0,
            seed=self.config.seed,
            collate=NlvrCollate(self.tokenizer, self.config.bert_sizes.max_position_embeddings),
        )

    @torch.no_grad()
    def forward(self, batch: dict) -> NlvrOutput:
        batch = move(batch, self.run.device)
        with self.precision.autocast():
            packed = self.config.variant == "paper"
            return self.model(batch["images"], batch["input_ids"], batch["attention_mask"], self.setting, packed=packed)

    def tokens(self, output: NlvrOutput) -> dict[str, Tensor]:
        """Tokens by block, one row an image or a sentence, by the name of the tower."""
        return {"image": tokens_by_block(output.vision), "text": tokens_by_block(output.language)}

    def samples(self, batch: dict) -> list[Sample]:
        if self.config.variant == "released":
            raise UserError("variant 'released' hands its tokens on out of order; tokens can be traced in variant 'paper' only")
        output = self.forward(batch)
        scores = output.logits.float().softmax(dim=-1)[:, 1].tolist()
        remaining = self.model.tokens_kept(output).tolist()
        gflops = self.model.gflops(output, self.setting).tolist()
        patches = self.model.visual_encoder.patch_embed.grid_size
        whole = torch.ones(2 * len(batch["ids"]), patches[0] * patches[1], dtype=torch.bool, device=self.run.device)
        left, right = surviving(output.vision, whole).unflatten(-1, patches).cpu().numpy().reshape(2, len(scores), -1, *patches)
        words_alive = surviving(output.language, batch["attention_mask"][:, 1:].bool().to(self.run.device)).cpu().numpy()
        strength = "uncompressed" if self.setting == OFF else f"p = {self.config.p:g} (T = {self.setting.temperature:.4g})"
        samples = []
        for i, sample in enumerate(batch["ids"]):
            words = self.tokenizer.convert_ids_to_tokens(batch["input_ids"][i][batch["attention_mask"][i].bool()])[1:]
            shown = [displayable(picture) for picture in batch["images"][i]]
            samples.append(
                Sample(
                    sample,
                    f"{sample}, {strength}: predicted {scores[i] > 0.5} ({scores[i]:.2f}), truth {bool(batch['targets'][i])};"
                    f" {remaining[i]} tokens left, {gflops[i]:.4g} GFLOPs",
                    [("left", shown[0], left[i]), ("right", shown[1], right[i])],
                    [(words, words_alive[i][:, : len(words)])],
                )
            )
        return samples


def displayable(picture: Tensor) -> np.ndarray:
    """A normalised picture (3, H, W) as the eye wants it: (H, W, 3) in 0 ... 1."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (picture.float().cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()


VIEWS = {"nlvr": NlvrView}


def open_view(
    view: type, config: Config, checkpoint: Path | str, device: str | None = None, temperature: float | None = None
) -> View:
    """The view of a model at the temperature that its checkpoint was saved with, or at `temperature`.

    Raises:
        UserError: when the model prunes and there is no temperature.
    """
    run = init_run(device, config.seed)
    saved = read_checkpoint(checkpoint)
    setting = OFF
    if not config.uncompressed:
        strength = saved.get("temperature") if temperature is None else temperature
        if strength is None:
            raise UserError(f"{checkpoint}: holds no temperature; give one with --temperature, or a run's checkpoint")
        setting = PruneSetting(strength, saved.get("prune_from", config.prune_from))
    return view(config, run, saved["model"], str(checkpoint), setting)


def spread(ids: Sequence[str], number: int) -> list[str]:
    """`number` of `ids` (all, when there are fewer), evenly spaced."""
    number = min(number, len(ids))
    return [ids[(2 * i + 1) * len(ids) // (2 * number)] for i in range(number)]


def draw(samples: Sequence[Sample]) -> Figure:
    """One sheet with all samples, one below the other."""
    columns = 1 + max((alive.shape[0] for sample in samples for _, _, alive in sample.pictures), default=0)
    width = LABEL + columns * CELL + MARGIN
    heights = [_height(sample) for sample in samples]
    figure = Figure(figsize=(width, sum(heights)), facecolor="white")
    top = sum(heights)
    for sample, height in zip(samples, heights, strict=True):
        _draw_sample(figure, sample, width, top)
        top -= height
    return figure


def _height(sample: Sample) -> float:
    lines = sum(1.5 + len(alive) for _, alive in sample.texts)
    return HEAD + LINE + len(sample.pictures) * (CELL + COUNT) + lines * LINE + 2 * MARGIN


def _draw_sample(figure: Figure, sample: Sample, width: float, top: float) -> None:
    """In inches from the lower left corner of the sheet, downwards from `top`."""
    page = figure.get_size_inches()

    def axes(x: float, y: float, w: float, h: float):
        area = figure.add_axes((x / page[0], y / page[1], w / page[0], h / page[1]))
        area.axis("off")
        return area

    def write(x: float, y: float, text: str, **style) -> None:
        style = {"fontsize": FONT, "color": BLACK, "va": "center", **style}
        figure.text(x / page[0], y / page[1], text, **style)

    write(MARGIN, top - HEAD / 2, sample.heading, fontweight="bold")
    y = top - HEAD - LINE
    for number, (label, picture, alive) in enumerate(sample.pictures):
        y -= CELL + COUNT
        write(MARGIN, y + COUNT + CELL / 2, label)
        for column in range(1 + len(alive)):
            shown = picture if column == 0 else fade(picture, alive[column - 1])
            area = axes(LABEL + column * CELL, y + COUNT, CELL - MARGIN, CELL - MARGIN)
            area.imshow(shown, interpolation="nearest" if min(picture.shape[:2]) < DPI else "antialiased")
            middle = LABEL + (column + 0.5) * CELL - MARGIN / 2
            count = alive[0].size if column == 0 else int(alive[column - 1].sum())
            write(middle, y + COUNT / 2, str(count), ha="center", fontsize=SMALL)
            if number == 0:
                write(middle, y + CELL + COUNT + 0.02, f"block {column}" if column else "input", ha="center")
    for words, alive in sample.texts:
        y -= LINE / 2
        letters = sum(len(word) + 1 for word in words)
        size = min(FONT, (width - LABEL - MARGIN) * 72 / (letters * GLYPH))
        for layer in range(1 + len(alive)):
            y -= LINE
            write(MARGIN, y, f"layer {layer}" if layer else "text")
            x = LABEL
            for place, word in enumerate(words):
                pruned = layer > 0 and not alive[layer - 1][place]
                length = len(word) * GLYPH * size / 72
                write(x, y, word, family="monospace", fontsize=size, color=GREY if pruned else BLACK)
                if pruned:
                    ends = ((x / page[0], (x + length) / page[0]), (y / page[1], y / page[1]))
                    figure.add_artist(Line2D(*ends, color=GREY, linewidth=0.8))
                x += length + GLYPH * size / 72


def fade(picture: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """The picture with a veil over its pruned patches. (H, W, 3), (rows, columns) bool -> (H, W, 3)."""
    rows, columns = (side // patches for side, patches in zip(picture.shape[:2], alive.shape, strict=True))
    pruned = ~np.kron(alive, np.ones((rows, columns), dtype=bool)).astype(bool)
    return np.where(pruned[..., None], FADE * np.array(VEIL) + (1 - FADE) * picture, picture)


def write_drawings(samples: Sequence[Sample], out: Path) -> list[Path]:
    """One PNG a sample in the folder `out`, or all on one sheet when `out` ends in .png."""
    sheets = [(out, list(samples))] if out.suffix == ".png" else [(out / f"{sample.id}.png", [sample]) for sample in samples]
    for path, shown in sheets:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(shown).savefig(path, dpi=DPI)
    return [path for path, _ in sheets]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="the config.yaml of the run")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="the weights that it made")
    parser.add_argument("--task", default="nlvr", choices=VIEWS, help="what the model does")
    parser.add_argument("--temperature", type=float, help="prune at this temperature instead of the checkpoint's")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--samples", type=int, default=6, metavar="N", help="that many test samples, evenly spaced")
    chosen.add_argument("--ids", nargs="+", metavar="ID", help="these test samples, by the ids of predictions_test.json")
    parser.add_argument("--out", type=Path, default=Path("output/visualize"), help="a folder, or a .png for one sheet")
    parser.add_argument("--device", help="cpu or cuda; cuda when there is one")
    args = parser.parse_args()
    if args.samples < 1:
        raise UserError(f"--samples must be at least 1, got {args.samples}")
    saved = read_checkpoint(args.checkpoint)
    rule = {key: saved[key] for key in ("method", "variant", "keep", "p") if key in saved}
    config = load_config(VIEWS[args.task].config_class, args.config, rule)
    view = open_view(VIEWS[args.task], config, args.checkpoint, args.device, args.temperature)
    ids = args.ids or spread(view.ids, args.samples)
    samples = [sample for batch in view.batches(ids) for sample in view.samples(batch)]
    for path in write_drawings(samples, args.out):
        print(path)


if __name__ == "__main__":
    run_main(main)
