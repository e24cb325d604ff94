"""What is shown of a run: the trace of its tokens, the drawings, the report and the demo around them."""

import html
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from config import NlvrConfig
from data.text import load_tokenizer
from engine.report import Picture, ReportedRun, table, text_table, write_report
from madtp.pruning import PruneSetting, PruningRule, gather_and_merge
from models.build import nlvr_from_config
from models.tower import TowerRecord
from models.trace import surviving, tokens_by_block
from options import load_config
from tests import tiny
from tools import demo, visualize
from tools.visualize import Sample, draw, fade, spread

# Which tokens survive


def record_of(*blocks: tuple[list[list[int]] | None, list[int]]) -> TowerRecord:
    """A record from (kept, tokens leaving with the class token) of each block."""
    record = TowerRecord()
    for kept, leaving in blocks:
        before = record.leaving[-1] if record.leaving else torch.tensor(leaving)
        record.add(before, torch.tensor(leaving), None if kept is None else torch.tensor(kept).bool(), None)
    return record


def test_two_samples_by_hand() -> None:
    """Five tokens; the second sample has three and padding. M is a merged token, _ padding."""
    record = record_of(
        (None, [6, 4]),  # 0 1 2 3 4   0 1 2 _ _   not pruned here
        ([[1, 0, 1, 0, 1], [1, 1, 1, 0, 0]], [5, 4]),  # 0 2 4 M     0 1 2 _
        ([[0, 1, 0, 1], [1, 0, 0, 0]], [4, 3]),  # 2 M N       0 M _   the merged token is kept, another follows it
        ([[1, 0, 0], [0, 1, 0]], [3, 3]),  # 2 M         M N     the second sample has no original left
    )
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    expected = [
        [[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [0, 0, 1, 0, 0], [0, 0, 1, 0, 0]],
        [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
    ]
    assert surviving(record, valid).long().tolist() == expected


@pytest.mark.parametrize("merge", [True, False])
def test_the_trace_follows_the_tokens_themselves(merge: bool) -> None:
    """Tokens that carry their place as a one-hot vector: what is a single one-hot afterwards has survived."""
    generator = torch.Generator().manual_seed(0)
    samples, places = 16, 12
    valid = torch.arange(places) < torch.randint(4, places + 1, (samples, 1), generator=generator)
    x, inside = torch.eye(places).expand(samples, -1, -1) * valid.unsqueeze(-1), valid
    record, expected = TowerRecord(), []
    for _ in range(4):
        # As pruning does, none or at least two of a sample's tokens go, so a merged token is never a one-hot.
        goes = (torch.rand(inside.shape, generator=generator) < 0.35) & inside
        kept = torch.where(goes.sum(dim=1, keepdim=True) < 2, inside, inside & ~goes)
        before = 1 + inside.sum(dim=1)
        x, inside = gather_and_merge(x, inside, torch.ones(kept.shape), kept, merge)
        record.add(before, 1 + inside.sum(dim=1), kept, None)
        alone = ((x > 0.999).sum(dim=-1) == 1) & inside
        expected.append((x * alone.unsqueeze(-1)).amax(dim=1) > 0.999)
    assert torch.equal(surviving(record, valid), torch.stack(expected, dim=1))


@pytest.mark.parametrize("keep", ["instance", "max"])
@torch.no_grad()
def test_survivors_and_merged_tokens_are_what_a_model_hands_on(keep: str) -> None:
    model = tiny.nlvr(PruningRule(keep=keep))
    ids, mask = tiny.text([5, 9, 12])
    output = model(tiny.images(3), ids, mask, PruneSetting(3.0, prune_from=1))
    for record, valid in (
        (output.vision, torch.ones(6, (tiny.IMAGE // tiny.PATCH) ** 2).bool()),
        (output.language, mask[:, 1:].bool()),
    ):
        alive = surviving(record, valid)
        tokens = tokens_by_block(record)
        assert torch.equal(alive[:, 0], valid)  # the first block is left alone
        assert (alive[:, 1:] <= alive[:, :-1]).all()  # nothing comes back
        assert torch.equal(tokens[:, 0], 1 + valid.sum(dim=1))
        merged = tokens[:, 1:] - 1 - alive.sum(dim=-1)
        assert ((0 <= merged) & (merged <= torch.arange(alive.shape[1]))).all()  # at most one a pruning block
        assert merged.any()


# Drawings


def test_a_pruned_patch_fades_and_the_others_stay() -> None:
    picture = np.full((4, 6, 3), 0.5)
    alive = np.array([[True, False, True], [True, True, True]])
    faded = fade(picture, alive)
    changed = (faded != picture).any(axis=-1)
    assert changed[:2, 2:4].all() and changed.sum() == 4


def test_samples_are_evenly_spaced() -> None:
    ids = [str(i) for i in range(10)]
    assert spread(ids, 2) == ["2", "7"]
    assert spread(ids, 99) == ids


def test_samples_of_any_number_of_pictures_and_texts_fit_on_a_sheet() -> None:
    picture = ("image", np.zeros((8, 8, 3)), np.ones((2, 2, 2), dtype=bool))
    text = (["a", "red", "star", "[SEP]"], np.array([[True, False, True, False]]))
    sheets = [
        draw([Sample("a", "p", [picture], [])]),
        draw([Sample("b", "q", [], [text]), Sample("c", "r", [picture] * 2, [text])]),
    ]
    heights = []
    for sheet in sheets:
        buffer = io.BytesIO()
        sheet.savefig(buffer, format="png", dpi=30)
        heights.append(Image.open(buffer).size[1])
    assert heights[0] < heights[1]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A config, a checkpoint and four test samples: pictures of 16 patches, sentences of different lengths."""
    generator = torch.Generator().manual_seed(0)
    for index in range(4):
        for side in "ab":
            noise = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8).numpy()
            Image.fromarray(noise).save(tmp_path / f"{index}{side}.png")
    entries = [
        {
            "sentence": "a red star" + " and a red star" * (index % 3),
            "label": "True",
            "images": [f"{index}a.png", f"{index}b.png"],
        }
        for index in range(4)
    ]
    for split in ("train", "dev", "test"):
        (tmp_path / f"nlvr_{split}.json").write_text(json.dumps(entries))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nred\nstar\nand\n")
    (tmp_path / "c.yaml").write_text(
        f"""
image_root: {tmp_path}
ann_root: {tmp_path}
tokenizer: {tmp_path}/vocab.txt
image_size: 32
vit: {{patch_size: 8, embed_dim: 20, depth: 3, num_heads: 2}}
bert: {{hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 32, max_position_embeddings: 24}}
keep: instance
sd_num: 5
sd_dim: 24
batch_size_test: 3
"""
    )
    config = load_config(NlvrConfig, tmp_path / "c.yaml")
    model = tiny.with_lively_weights(nlvr_from_config(config, len(load_tokenizer(config.tokenizer))))
    rule = {"method": "dtp", "variant": "paper", "keep": "instance", "p": 0.4, "batch_size": 3}
    torch.save({"model": model.state_dict(), "temperature": 3.0, "prune_from": 1, **rule}, tmp_path / "checkpoint.pth")
    return tmp_path


def arguments(world: Path, *more: object) -> list[str]:
    return [
        "--config",
        str(world / "c.yaml"),
        "--checkpoint",
        str(world / "checkpoint.pth"),
        "--device",
        "cpu",
        *map(str, more),
    ]


def visualised(monkeypatch, argv: list[str]) -> None:
    monkeypatch.setattr("sys.argv", ["visualize.py", *argv])
    visualize.main()


def test_a_picture_a_sample(world: Path, monkeypatch, capsys) -> None:
    visualised(monkeypatch, arguments(world, "--samples", 2, "--out", world / "out"))
    written = sorted((world / "out").iterdir())
    assert [path.name for path in written] == ["nlvr_test-1.png", "nlvr_test-3.png"]
    assert capsys.readouterr().out.splitlines() == [str(path) for path in written]


def test_one_sheet_for_named_samples(world: Path, monkeypatch) -> None:
    visualised(monkeypatch, arguments(world, "--ids", "nlvr_test-2", "nlvr_test-0", "--out", world / "docs" / "kept.png"))
    assert Image.open(world / "docs" / "kept.png").size[1] > 300


def test_the_words_shown_are_the_sentence_without_padding(world: Path) -> None:
    config = load_config(NlvrConfig, world / "c.yaml")
    view = visualize.open_view(visualize.NlvrView, config, world / "checkpoint.pth", "cpu")
    samples = [sample for batch in view.batches(view.ids) for sample in view.samples(batch)]
    assert [sample.id for sample in samples] == view.ids
    for sample, tail in zip(samples, (0, 1, 2, 0), strict=True):
        ((words, alive),) = sample.texts
        assert words == ["a", "red", "star", *["and", "a", "red", "star"] * tail, "[SEP]"]
        assert alive.shape == (2, len(words)) and alive[0].all()
    for _, picture, alive in samples[0].pictures:
        assert picture.shape == (32, 32, 3) and alive.shape == (3, 4, 4) and alive[0].all() and not alive[-1].all()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--ids", "nlvr_test-9"), "nlvr_test-9: no such test sample; the ids run from nlvr_test-0 to nlvr_test-3"),
        (("--samples", 0), "--samples must be at least 1"),
    ],
)
def test_what_the_user_can_mend(world: Path, monkeypatch, more: tuple, expected: str) -> None:
    with pytest.raises(visualize.UserError, match=expected):
        visualised(monkeypatch, arguments(world, *more))


def test_weights_without_a_temperature_need_one(world: Path, monkeypatch) -> None:
    weights = torch.load(world / "checkpoint.pth", weights_only=True)["model"]
    torch.save(weights, world / "checkpoint.pth")
    with pytest.raises(visualize.UserError, match="give one with --temperature"):
        visualised(monkeypatch, arguments(world))
    visualised(monkeypatch, arguments(world, "--temperature", 2, "--samples", 1, "--out", world / "out"))
    assert len(list((world / "out").iterdir())) == 1


# The report


def fake_run(p: float, epochs: int = 0) -> ReportedRun:
    budget = {"uncompressed": 2.0, "target": 2 - 2 * p, "measured": 2 - 2 * p, "val": 2 - 2 * p, "test": 2 - 2 * p}
    result = {
        "task": "nlvr", "method": "dtp" if p else "none", "variant": "paper", "keep": "instance", "reduce_ratio": p,
        "temperature": 6.37 if p else None, "prune_from": 1 if p else 0, "epoch": 3, "seed": 42, "gflops": budget,
        "params": {"total": 1_500_000, "nonzero": 1_500_000}, "metrics": {"val": {"acc": 80.0}, "test": {"acc": 81.25}},
    }  # fmt: skip
    log = [{"epoch": epoch, "temperature": 6.0 + epoch, "gflops": budget} for epoch in range(epochs)]
    tokens = {"image": np.full((4, 3), 17), "text": np.full((2, 2), 9)}
    return ReportedRun(result, log, 100 * (1 + p), tokens)


def test_the_table_compares_with_the_first_run() -> None:
    header, dense, half = table([fake_run(0), fake_run(0.5, 2)])
    named = dict(zip(header, half, strict=True))
    assert named["model"] == "p = 0.5" and named["accuracy, % (test)"] == "81.25" and named["fewer"] == "50.0 %"
    assert named["images/s"] == "150" and named["speed-up"] == "1.50x" and named["temperature"] == "6.37 from block 2"
    assert dense[0] == "uncompressed" and dense[header.index("temperature")] == "-"
    lines = text_table([header, dense, half]).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_the_report_needs_nothing_beside_it(tmp_path: Path) -> None:
    runs = [fake_run(0), fake_run(0.5, 3), fake_run(0.8, 1)]
    path = tmp_path / "report.html"
    write_report(path, "Title & more", runs, ["a note"], 2, [Picture("a < b", b"png")], ["python x.py --p 0.5"])
    page = path.read_text()
    assert "://" not in page and "<script" not in page and "<link" not in page
    assert page.count("<img ") == page.count('src="data:image/') == 3
    for text in ("Title & more", "p = 0.8", "81.25", "a note", "a < b", "python x.py --p 0.5"):
        assert html.escape(text) in page


# The demo


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch) -> list[str]:
    """The commands that making the data ran, with its folder in `tmp_path`."""
    commands: list[str] = []
    monkeypatch.setattr(demo, "SHAPES", tmp_path / "shapes")
    monkeypatch.setattr(demo, "execute", lambda command: commands.append(command[0]) or " ".join(command))
    return commands


def test_data_are_made_once(recorded: list[str], monkeypatch) -> None:
    for _ in range(2):
        demo.make_data(demo.TASKS["nlvr"])
    assert recorded == ["tools/make_shapes.py"]
    monkeypatch.setattr(demo, "SIZE", 11)
    demo.make_data(demo.TASKS["nlvr"])
    assert len(recorded) == 2


def test_data_that_were_cut_short_are_made_again(recorded: list[str], monkeypatch) -> None:
    def interrupted(command):
        raise SystemExit(130)

    whole = demo.execute
    monkeypatch.setattr(demo, "execute", interrupted)
    with pytest.raises(SystemExit):
        demo.make_data(demo.TASKS["nlvr"])
    monkeypatch.setattr(demo, "execute", whole)
    demo.make_data(demo.TASKS["nlvr"])
    assert len(recorded) == 1


def test_data_of_others_are_not_overwritten(recorded: list[str], tmp_path: Path) -> None:
    (tmp_path / "shapes" / "annotations").mkdir(parents=True)
    (tmp_path / "shapes" / "annotations" / "nlvr_train.json").write_text("[]")
    with pytest.raises(visualize.UserError, match="did not make"):
        demo.make_data(demo.TASKS["nlvr"])
    assert recorded == []


def test_the_demo_ends_with_the_exit_code_of_what_failed(capfd) -> None:
    with pytest.raises(SystemExit) as stopped:
        demo.execute(["-c", "import sys; print('working'); sys.exit(3)"])
    assert stopped.value.code == 3
    printed = capfd.readouterr()
    assert "working" in printed.out and printed.out.startswith("$ ") and "exit code 3" in printed.err
