"""BLIP's weights for captioning and VQA from transformers: all are translated."""

import pytest
import torch
from torch import nn

from models.weights.blip import load_decoder_weights
from tests.models import test_blip_caption, test_blip_vqa
from utils import UserError

MODELS = {"caption": test_blip_caption, "vqa": test_blip_vqa}
SIZE = test_blip_vqa.LARGER


def emptied(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


@pytest.mark.parametrize("task", MODELS)
def test_transformers_weights_become_ours(task):
    """The twin computes as ours does, which the models' own tests show; here its weights come back from their names."""
    model = MODELS[task].model_of(SIZE)
    theirs = MODELS[task].twin(model, SIZE).state_dict()
    assert any(name.startswith("vision_model.") for name in theirs)
    loaded = emptied(MODELS[task].model_of(SIZE))
    load_decoder_weights(loaded, {**theirs, "text_decoder.bert.embeddings.position_ids": torch.arange(32)[None]}, "x")
    ours = model.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in loaded.state_dict().items())


def test_position_embeddings_of_transformers_are_interpolated_and_foreign_weights_named():
    model = test_blip_caption.model_of(SIZE)
    theirs = test_blip_caption.twin(model, SIZE).state_dict()
    name = "vision_model.embeddings.position_embedding"
    theirs[name] = torch.cat([theirs[name][:, :1], theirs[name][:, 1:2].expand(-1, 64, -1)], dim=1)
    load_decoder_weights(model, dict(theirs), "x")
    torch.testing.assert_close(model.visual_encoder.pos_embed[:, 1:], theirs[name][:, 1:2].expand(-1, 36, -1))
    with pytest.raises(UserError, match="x: holds text_decoder.x, which this model does not have"):
        load_decoder_weights(model, {**theirs, "text_decoder.x": torch.ones(1)}, "x")
