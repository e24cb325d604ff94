"""Restoring the pruning rule of a checkpoint."""

import pytest

from configs.schema import NlvrConfig
from engine.restore import other_rule, rule_of

KEYS_OF_LATER_VERSIONS = ("sparsity_type", "sparse_layers", "tis", "merge", "image_size")


def config(**keys) -> NlvrConfig:
    return NlvrConfig(p=0.5, **keys)


def test_a_config_has_the_rule_that_it_was_saved_with():
    assert other_rule(config(), rule_of(config())) is None
    assert other_rule(config(keep="mean"), rule_of(config())) == "keep"


@pytest.mark.parametrize(("key", "value"), [("merge", False), ("tis", ["self"]), ("sparse_layers", "mlp")])
def test_a_checkpoint_from_before_a_key_was_made_by_the_rule_of_its_time(key, value):
    older = {name: kept for name, kept in rule_of(config()).items() if name not in KEYS_OF_LATER_VERSIONS}
    assert other_rule(config(), older) is None
    assert other_rule(config(**{key: value}), older) == key
