"""The weights that become sparse in every model, and their cost."""

import re

import pytest
import torch

from madtp.sparsity.layers import groups, sparse_weights
from tests import tiny
from tests.models import test_blip_caption, test_blip_vqa
from tests.models.test_blip_caption import SMALL

MODELS = {
    "nlvr": tiny.nlvr,
    "retrieval": tiny.retrieval,
    "clip": tiny.clip,
    "siglip": tiny.siglip,
    "caption": lambda: test_blip_caption.model_of(SMALL),
    "vqa": lambda: test_blip_vqa.model_of(SMALL),
}


@pytest.mark.parametrize("kind", MODELS)
def test_all_linear_layers_of_all_blocks_and_nothing_else(kind):
    model = MODELS[kind]()
    names = set(sparse_weights(model, (2, 4), "all").weights)
    in_blocks = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and any(part in name for part in (".blocks.", ".layer.", ".resblocks."))
    }
    in_blocks |= {name for name, _ in model.named_parameters() if name.endswith("in_proj_weight") and ".resblocks." in name}
    online = {name for name in in_blocks if not name.split(".")[0].endswith("_m")}
    assert names == {name for name in online if "pruner" not in name} and names
    by_kind = [set(sparse_weights(model, (2, 4), layers).weights) for layers in ("attention", "mlp")]
    assert by_kind[0] | by_kind[1] == names and not by_kind[0] & by_kind[1]
    assert all(any(word in name for word in (".mlp.", ".intermediate.", ".output.dense")) for name in by_kind[1])


@pytest.mark.parametrize("kind", ["retrieval", "clip", "siglip"])
def test_momentum_encoders_get_the_same_masks(kind):
    model = MODELS[kind]()
    sparse = sparse_weights(model, (2, 4), "all")
    sparse.select(sparse.weights)
    parameters = dict(model.named_parameters())
    for name, mask in sparse.masks.items():
        top, _, rest = name.partition(".")
        assert torch.equal(parameters[f"{top}_m.{rest}"] != 0, mask)


@pytest.mark.parametrize("kind", MODELS)
def test_weights_fall_into_the_attention_and_the_mlp_of_each_block(kind):
    names = sparse_weights(MODELS[kind](), (2, 4), "all").weights
    found = groups(names, "block")
    assert sorted(sum(found.values(), [])) == sorted(names)
    blocks = [{re.search(r"^(.*?\.(?:blocks|layer|resblocks)\.\d+)\.", name)[1] for name in each} for each in found.values()]
    assert all(len(each) == 1 for each in blocks) and len(found) == 2 * len(set.union(*blocks))


def test_weights_fall_into_the_attention_and_the_mlps_of_each_tower():
    names = sparse_weights(tiny.nlvr(), (2, 4), "all").weights
    towers = ("visual_encoder", "text_encoder")
    assert set(groups(names, "tower")) == {f"{tower} {kind}" for tower in towers for kind in ("attention", "mlp")}
