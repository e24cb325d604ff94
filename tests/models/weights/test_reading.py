"""Weights of others: read safely, translated, and refused by name when they do not fit."""

import argparse
import os
import pickle
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from madtp.rule import PruningRule
from models.weights.blip import load_nlvr_weights
from models.weights.reading import interpolate_position_embedding, load_weights, read_checkpoint
from tests import tiny
from utils import UserError

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


class Plain(torch.nn.Module):
    """A model whose state dict is WEIGHTS' kind."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(3, 2)


@pytest.fixture
def files(tmp_path):
    torch.save(WEIGHTS, tmp_path / "bare.pth")
    torch.save({"model": WEIGHTS, "temperature": 2.5, "epoch": 3}, tmp_path / "wrapped.pth")
    torch.save(WEIGHTS, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(WEIGHTS, tmp_path / "x.safetensors")
    return tmp_path


def refusal(path) -> str:
    with pytest.raises(UserError) as error:
        read_checkpoint(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["bare.pth", "wrapped.pth", "legacy.pth", "x.safetensors"])
def test_all_kinds_of_file_are_read(files, name):
    checkpoint = read_checkpoint(str(files / name))
    assert checkpoint["model"].keys() == WEIGHTS.keys()
    assert all(torch.equal(checkpoint["model"][key], WEIGHTS[key]) for key in WEIGHTS)
    assert checkpoint.get("temperature") == (2.5 if name == "wrapped.pth" else None)


class Code:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_wants_to_run_code_is_refused_and_does_not(tmp_path, zipped):
    torch.save({"model": WEIGHTS, "x": Code(tmp_path / "ran")}, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    assert "could run code" in refusal(tmp_path / "evil.pth")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Code(tmp_path / "ran"), protocol=2))
    refusal(tmp_path / "evil.pkl")
    assert not (tmp_path / "ran").exists()
    os.system(f"touch {tmp_path / 'ran'}")  # that it would have
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["wrapped.pth", "legacy.pth", "x.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95])
def test_a_file_that_is_cut_off_is_refused(files, name, share):
    content = (files / name).read_bytes()
    (files / name).write_bytes(content[: int(share * len(content))])
    refusal(files / name)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=40), st.sampled_from(["pth", "safetensors"]))
def test_rubbish_is_refused(tmp_path_factory, content, suffix):
    path = tmp_path_factory.getbasetemp() / f"rubbish.{suffix}"
    path.write_bytes(content)
    refusal(path)


def test_what_is_no_state_dict_is_refused(tmp_path):
    assert "no such checkpoint" in refusal(tmp_path / "none.pth")
    refusal(tmp_path)
    for content, reason in (([1, 2], "holds a list"), ({"model": {}}, "not all tensors"), ({"lr": 0.1}, "not all tensors")):
        torch.save(content, tmp_path / "x.pth")
        assert reason in refusal(tmp_path / "x.pth")


def test_one_cross_attention_becomes_two():
    """Weights as BLIP pretrains them: one cross-attention a layer, no learnable tokens, another head, other towers beside."""
    model, source = tiny.nlvr(PruningRule(), layers=7), tiny.nlvr(layers=7).state_dict()
    single = {
        name.replace("self0", "self").replace("dense0", "dense"): tensor * 2
        for name, tensor in source.items()
        if not any(part in name for part in ("self1", "dense1", "merge_layer", "cls_head"))
    }
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_nlvr_weights(
        model, {**single, "temp": torch.ones(()), "text_decoder.bert.x": torch.ones(1), "itm_head.weight": torch.ones(2)}, "x"
    )
    for name, tensor in model.state_dict().items():
        origin = name.replace("self0", "self").replace("self1", "self").replace("dense0", "dense").replace("dense1", "dense")
        new = any(part in name for part in ("space_dict", "pruner", "merge_layer", "cls_head"))
        assert torch.equal(tensor, before[name] if new else single[origin]), name


def test_a_trained_model_is_loaded_whole():
    model, other = tiny.nlvr(PruningRule(), layers=7), tiny.nlvr(PruningRule(), layers=7)
    trained = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    load_nlvr_weights(other, trained, "x")
    assert all(torch.equal(tensor, trained[name]) for name, tensor in other.state_dict().items())


def test_position_embeddings_are_interpolated():
    embedding = torch.randn(1, 1 + 16, 8)
    assert interpolate_position_embedding(embedding, 17) is embedding
    constant = embedding[:, 1:2].expand(-1, 16, -1)
    larger = interpolate_position_embedding(torch.cat([embedding[:, :1], constant], dim=1), 1 + 36)
    assert larger.shape == (1, 37, 8) and torch.equal(larger[:, 0], embedding[:, 0])
    torch.testing.assert_close(larger[:, 1:], constant[:, :1].expand(-1, 36, -1))
    ramp = torch.arange(4.0).repeat(4).view(1, 16, 1)  # grows along a row
    grid = interpolate_position_embedding(torch.cat([embedding[:, :1, :1], ramp], dim=1), 1 + 64)[0, 1:, 0].view(8, 8)
    assert (grid.diff(dim=1) > 0).all() and grid.diff(dim=0).abs().max() < 1e-5
    assert interpolate_position_embedding(embedding, 1 + 15) is embedding  # no square: left for the shape check to name


def test_a_model_for_other_pictures_is_interpolated_on_loading():
    small = tiny.nlvr()
    weights = small.state_dict()
    weights["visual_encoder.pos_embed"] = torch.randn(1, 1 + 64, 20)
    load_nlvr_weights(small, weights, "x")
    expected = interpolate_position_embedding(weights["visual_encoder.pos_embed"], 17)
    assert torch.equal(small.visual_encoder.pos_embed, expected)


def test_only_what_may_miss_may_miss():
    model = Plain()
    bias = model.a.bias.detach().clone()
    load_weights(model, {"a.weight": WEIGHTS["a.weight"]}, "x.pth", may_miss=(".bias",))
    assert torch.equal(model.a.bias, bias) and torch.equal(model.a.weight, WEIGHTS["a.weight"])
    with pytest.raises(UserError, match="x.pth: lacks a.bias; is it a checkpoint of this kind"):
        load_weights(model, {"a.weight": WEIGHTS["a.weight"]}, "x.pth", may_miss=("b.",))


def test_only_what_may_be_ignored_is_ignored():
    more = {**WEIGHTS, "head.weight": torch.ones(1)}
    load_weights(Plain(), more, "x.pth", may_ignore=("head.",))
    with pytest.raises(UserError, match="x.pth: holds head.weight, which this model does not have"):
        load_weights(Plain(), more, "x.pth")


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="x.pth: shapes do not fit: a.weight is 3x3, the model's 2x3; check 'vit'"):
        load_weights(Plain(), {**WEIGHTS, "a.weight": torch.ones(3, 3)}, "x.pth")


def test_of_many_names_the_first_three_are_shown():
    with pytest.raises(UserError, match=r"holds k0, k1, k2 and 4 more, which"):
        load_weights(Plain(), {**WEIGHTS, **{f"k{i}": torch.ones(1) for i in range(7)}}, "x.pth")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        ("<!DOCTYPE html>\n<html>not found</html>\n", "not a PyTorch checkpoint"),
    ],
    ids=["pointer", "web page"],
)
def test_what_a_download_left_instead_of_weights_is_named(tmp_path, content, said):
    (tmp_path / "model.pth").write_text(content)
    with pytest.raises(UserError, match=said):
        read_checkpoint(tmp_path / "model.pth")


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state_dict", None])
@pytest.mark.parametrize("front", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model."])
def test_weights_are_found_wherever_other_programs_put_them(tmp_path, wrapper, front):
    named = {front + name: tensor for name, tensor in WEIGHTS.items()}
    content = {wrapper: named, "optimizer": {"lr": 0.1}, "epoch": 3} if wrapper else named
    torch.save(content, tmp_path / "epoch_3.pt")
    read = read_checkpoint(tmp_path / "epoch_3.pt")
    assert read["model"].keys() == WEIGHTS.keys() and torch.equal(read["model"]["a.bias"], WEIGHTS["a.bias"])
    assert read.get("epoch") == (3 if wrapper == "model" else None)


def test_an_entry_model_that_holds_no_weights_does_not_hide_them(tmp_path):
    torch.save({"model": {"name": "ViT-B-32"}, "state_dict": WEIGHTS}, tmp_path / "x.pt")
    assert read_checkpoint(tmp_path / "x.pt")["model"].keys() == WEIGHTS.keys()


def test_a_part_that_was_compiled_alone_keeps_its_names(tmp_path):
    torch.save({"a._orig_mod.weight": WEIGHTS["a.weight"], "a.bias": WEIGHTS["a.bias"]}, tmp_path / "x.pth")
    assert read_checkpoint(tmp_path / "x.pth")["model"].keys() == WEIGHTS.keys()


BESIDE = {
    "args": argparse.Namespace(lr=0.1, name="run", out=Path("out")),
    "path": Path("a/b"),
    "windows": PureWindowsPath("a/b"),
    "float64": np.float64(1.5),
    "float32": np.float32(2.5),
    "int64": np.int64(7),
    "bool": np.bool_(True),
}


@pytest.mark.parametrize("kind", BESIDE)
@pytest.mark.parametrize("zipped", [True, False])
def test_plain_values_beside_the_weights_do_no_harm(tmp_path, kind, zipped):
    torch.save({"model": WEIGHTS, "x": BESIDE[kind]}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(tmp_path / "x.pth")
    assert read["model"].keys() == WEIGHTS.keys() and str(read["x"]).replace("PurePosix", "Posix") == str(BESIDE[kind])


@pytest.mark.parametrize("wrap", [lambda code: argparse.Namespace(x=code), lambda code: {"state_dict": WEIGHTS, "x": [code]}])
def test_code_within_a_plain_value_is_refused_and_does_not_run(tmp_path, wrap):
    torch.save({"model": WEIGHTS, "x": wrap(Code(tmp_path / "ran"))}, tmp_path / "evil.pth")
    assert "could run code" in refusal(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)  # that it would have
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, value, kind):
    weights = {**WEIGHTS, "a.bias": torch.tensor([1.0, value])}
    torch.save(weights, tmp_path / "x.pth")
    save_file(weights, tmp_path / "x.safetensors")
    assert "a.bias has values that are not finite numbers (NaN, inf)" in refusal(tmp_path / f"x.{kind}")


@pytest.mark.parametrize("name", ["bare.pth", "legacy.pth", "x.safetensors"])
def test_of_a_file_that_is_cut_off_the_size_is_told_and_nothing_of_the_readers_insides(files, name):
    path = files / name
    path.write_bytes(path.read_bytes()[:-40])
    said = refusal(path)
    assert f"({path.stat().st_size} bytes of it); is it cut off? Fetch it again" in said
    assert not any(word in said for word in ("miniz", "Stream", "central directory", "Error", "header"))
