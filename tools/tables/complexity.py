"""The number of things in the pictures of Shapes samples, from the scenes that their seed draws again."""

import json
from pathlib import Path

from configs.schema import Config, NlvrConfig
from data.nlvr import read_statements
from data.shapes.search import PAIRS_PER_CHUNK, Level, make_chunk
from data.shapes.write import CONTENT, PAIRS, Chunk, chunks
from utils import UserError


def things_by_sample(config: Config) -> dict[str, int]:
    """Returns the number of things in both pictures of each NLVR2 test sample of Shapes.

    The annotations do not hold it. The scenes are drawn again from the seed that tools/make_shapes.py left beside them, and their
    statements are compared with the annotations: other code or another version of NumPy might draw others.

    Raises:
        UserError: when the samples are of another task or were not made by tools/make_shapes.py, or the scenes do not fit.
    """
    if not isinstance(config, NlvrConfig):
        raise UserError(f"task {config.task}: the number of things is known for NLVR2 on Shapes alone")
    annotations = config.annotation_file(config.test_file)
    entries = read_statements(annotations)
    scenes = [pair for chunk in _chunks(annotations) for pair in make_chunk(_rng(chunk), chunk.number, 1, chunk.level)]
    drawn = [(statement.text(), str(label)) for _, _, told in scenes for statement, label in told]
    if drawn != [(entry["sentence"], entry["label"]) for entry in entries]:
        raise UserError(f"{annotations}: its seed draws other statements now; make the data again with tools/make_shapes.py")
    return {entry["id"]: len(left) + len(right) for entry, (left, right, _) in zip(entries, scenes, strict=True)}


def _chunks(annotations: Path) -> list[Chunk]:
    """Returns the chunks of the test split."""
    made = sorted(annotations.parent.parent.glob("made_*nlvr*.json"))
    if not made:
        raise UserError(f"{annotations}: tools/make_shapes.py did not make it, so nobody counted the things in its pictures")
    said = json.loads(made[0].read_text(encoding="utf-8"))["command"]
    level = Level(said["most_things"], tuple(said["templates"].split(",")))
    template = Chunk(annotations.parent.parent, said["seed"], "test", 0, 0, ("nlvr",), 1, level)
    return chunks(template, {"test": said["eval_size"]}, PAIRS_PER_CHUNK)


def _rng(chunk: Chunk):
    return chunk.rng(PAIRS, CONTENT, chunk.start)
