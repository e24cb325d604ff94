"""The keys of own data: a table of pictures and texts in place of annotation files."""

from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, model_validator

from configs.sizes import Section, require
from utils import home_expanded

SPLITS = ("train", "val", "test")
NAMES: dict[str, Any] = {"train_files": ["train"], "val_file": "val", "test_file": "test", "answer_list": "train"}
ALLOWED: dict[str, tuple] = {"train_files": ("train", ["train"]), "val_file": ("val", "test"), "test_file": ("val", "test")}


class TablePart(NamedTuple):
    """The rows of one split of a table, in the place of an annotation file.

    task: whose columns the table has
    shares, seed: of the splits of a table that does not name them
    """

    table: Path
    split: str
    task: str
    shares: tuple[float, float, float]
    seed: int

    @property
    def stem(self) -> str:
        return self.split

    def __str__(self) -> str:
        return f"{self.table} ({self.split})"


class TableKeys(Section):
    """The keys of a table."""

    table: Path | None = Field(
        None, description="CSV or JSONL file of own data, in place of annotation files; pictures lie beside it, or in image_root"
    )
    split_shares: tuple[float, float, float] = Field(
        (0.8, 0.1, 0.1), description="table without a column split: shares of the pictures to train, validate and test on"
    )
    split_seed: int = Field(0, ge=0, description="table without a column split: seed of the shares")

    @model_validator(mode="before")
    @classmethod
    def _splits_of_the_table(cls, values: Any) -> Any:
        """Names the splits of a table where annotation files would be named, and the folder of its pictures."""
        if not isinstance(values, dict) or values.get("table") in (None, ""):
            return values
        keys = {key: name for key, name in NAMES.items() if key in cls.model_fields}
        for key, allowed in ALLOWED.items():
            if key in keys and values.get(key) not in (None, "", [], *allowed):
                raise ValueError(f"table: its splits are train, val and test, but {key} is {values[key]!r}")
        folder = Path(home_expanded(str(values["table"]))).parent
        keys |= dict.fromkeys(getattr(cls, "image_keys", ()), folder)
        return {**values, **{key: value for key, value in keys.items() if values.get(key) in (None, "", [])}}

    @model_validator(mode="after")
    def _shares_are_of_a_whole(self) -> "TableKeys":
        shares = self.split_shares
        holds = min(shares) >= 0 and shares[0] > 0 and abs(sum(shares) - 1) < 1e-6
        return require(self, holds, "split_shares must be three numbers from 0 that sum to 1, the first above 0")
