"""The rules by which models of other libraries are pruned: the default one, and one with learnable tokens."""

import pytest

import madtp
from madtp.patch import INSTANCE

LEARNABLE = madtp.PruningRule(keep="instance")


@pytest.fixture(params=[INSTANCE, LEARNABLE], ids=["scores", "learnable"])
def rule(request) -> madtp.PruningRule:
    return request.param
