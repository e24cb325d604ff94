"""The page on the method names keys that exist, and the defaults that its comparison with the paper relies on."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from configs.schema import Config, NlvrConfig, RetrievalConfig
from madtp.rule import PruningRule
from models.build import learnable_tokens

TITLE = "## Where `variant: paper` differs from the paper\n"


def rows() -> list[list[str]]:
    table = Path("docs/method.md").read_text(encoding="utf-8").split(TITLE)[1].split("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_every_difference_says_what_where_why_and_by_which_key(row):
    assert len(row) == 5 and all(row)
    known = {*Config.model_fields, *(field.name for field in fields(PruningRule))}
    keys = re.findall(r"`(?:PruningRule\()?(\w+)", row[4])
    assert (keys or row[4].startswith("none")) and set(keys) <= known


def test_the_defaults_are_those_that_the_comparison_gives():
    config = NlvrConfig()
    assert (config.variant, config.mag_projection, config.gradient, config.keep) == ("paper", "auto", "none", "max")
    assert learnable_tokens(config) == (100, 768, 0.02)
    assert (config.prune_from, config.prune_every, config.ramp_epochs, config.sim_weight) == (0, 1, None, 0.1)
    assert RetrievalConfig().sim_weight == 0.1 and NlvrConfig(variant="released").gradient == "merge"
