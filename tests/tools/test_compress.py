"""Folders of weights in, faster models out: what is recognised, skipped, measured, written and loaded again."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

import madtp
from tests.madtp.patch import test_open_clip, test_transformers
from tests.runs import refusal
from tools import compress
from tools.compression.inputs import read_pictures
from tools.compression.sources import features, open_source

CARD = "---\nlicense: mit\n---\n# A model\n"
WORDS = ["<|startoftext|>", "<|endoftext|>", "a</w>", "dog</w>", "cat</w>"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Pictures as people have them, and two files that are none."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    random = np.random.default_rng(0)
    for index, mode in enumerate(["RGB", "L", "P", "CMYK", "RGBA", "RGB", "RGB", "L", "RGB", "RGB", "RGB", "RGB"]):
        colours = Image.fromarray(random.integers(0, 255, (40, 30 + index, 3), dtype=np.uint8)).resize((64 + index, 48))
        name = folder / ("more" if index % 2 else ".") / f"{index}{'.jpg' if mode == 'CMYK' else '.png'}"
        colours.convert(mode).save(name)
    turned = Image.new("RGB", (40, 20), "red")
    exif = turned.getexif()
    exif[0x0112] = 6  # turn by 90 degrees
    turned.save(folder / "turned.jpg", exif=exif)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    (folder / "notes.txt").write_text("not a picture")
    return folder


def clip_folder(folder: Path) -> Path:
    model = test_transformers.model_of("clip")
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(WORDS)} | {"x": 49}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = {"tokenizer_class": "CLIPTokenizer", "bos_token": WORDS[0], "model_max_length": 16}
    tokenizer |= dict.fromkeys(("eos_token", "pad_token", "unk_token"), WORDS[1])
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"eos_token_id": 1, "bos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text(CARD)
    return folder


def dino_folder(folder: Path) -> Path:
    test_transformers.model_of("dinov2").save_pretrained(folder)
    size = {"height": 32, "width": 32}
    transformers.BitImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return folder


def encoder_folder(folder: Path) -> Path:
    """An image encoder alone, whose configuration has a type of its own."""
    test_transformers.model_of("clip's image encoder").save_pretrained(folder)
    size = {"height": 32, "width": 32}
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return folder


def open_clip_folder(folder: Path) -> Path:
    folder.mkdir()
    model = test_open_clip.model_of("clip")
    settings = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": test_open_clip.VISION, "text_cfg": test_open_clip.TEXT}
    settings["text_cfg"] = {**settings["text_cfg"], "vocab_size": 50}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings, "preprocess_cfg": {"mean": [0.5] * 3}}))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def timm_folder(folder: Path) -> Path:
    import timm

    folder.mkdir()
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **options)
    for parameter in model.blocks.parameters():
        parameter.data *= 3
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": options}
    (folder / "config.json").write_text(json.dumps(config | {"pretrained_cfg": {"input_size": [3, 32, 32]}}))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


FOLDERS: dict[str, Callable[[Path], Path]] = {
    "clip": clip_folder, "clip's image encoder": encoder_folder, "dinov2": dino_folder,
    "open_clip": open_clip_folder, "timm": timm_folder,
}  # fmt: skip


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["compress.py", *map(str, arguments), "--device", "cpu"])
    compress.main()


@pytest.mark.parametrize("init", ["none", "random"])
@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_becomes_a_folder_that_loads_to_the_same_features_to_the_bit(monkeypatch, tmp_path, photos, capsys, kind, init):
    model, out = FOLDERS[kind](tmp_path / "model"), tmp_path / "out"
    learnable = () if init == "none" else ("--init", init, "--learnable", 10)
    run(monkeypatch, "--model", model, "--images", photos, "--p", 0.3, "--out", out, *learnable)
    said = capsys.readouterr().out
    for words in ("skipped, not a readable picture: broken.jpg", "times, batches of 3", f"madtp.load('{out}')"):
        assert words in said
    told = json.loads((out / "madtp.json").read_text())
    measured = told["measured"]
    assert measured["gflops"]["pruned"] == pytest.approx(0.7 * measured["gflops"]["uncompressed"], rel=0.01)
    assert measured["calibration"] == 10 and measured["aside"] == 3 and 0 < measured["cosine"]["vision"]["worst"] < 1
    source = open_source(model)
    batch = source.batch(read_pictures(photos, 100)[0], None)
    settings = {"setting": madtp.PruneSetting(**told["setting"]), "towers": told["towers"]}
    if learnable:
        settings |= {"rule": madtp.PruningRule(keep="instance"), "num_learnable": 10}
    with torch.inference_mode():
        madtp.prune(source.model, **settings)
        pruned = features(source, batch)["vision"]
        source.model = madtp.load(out)
        assert torch.equal(features(source, batch)["vision"], pruned)
    card = (out / "README.md").read_text()
    assert "pruned to 70% of its GFLOPs" in card and ("license: mit" in card) == (kind == "clip")
    assert not list(out.glob("*.bin")) and (out / "model.safetensors").is_file()


def test_texts_prune_the_text_encoder_too(monkeypatch, tmp_path, photos, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text("a dog\n\na cat a dog a cat\n")
    words = test_transformers.texts
    # open_clip's own tokenizer has more words than the small model.
    monkeypatch.setattr("open_clip.tokenize", lambda texts, context_length: words(len(texts), context_length))
    for kind in ("clip", "open_clip"):
        given = ("--model", FOLDERS[kind](tmp_path / kind), "--images", photos, "--texts", texts)
        run(monkeypatch, *given, "--p", 0.3, "--out", tmp_path / f"{kind}_out")
        assert "features, language: cosine" in capsys.readouterr().out
        model = madtp.load(tmp_path / f"{kind}_out")
        assert [tower.name for tower in model.madtp.towers] == ["vision", "language"]


def test_pictures_are_upright_and_spread_over_the_folder(photos):
    pictures, skipped = read_pictures(photos, 100)
    assert len(pictures) == 13 and skipped == ["broken.jpg"] and {picture.mode for picture in pictures} == {"RGB"}
    assert (20, 40) in {picture.size for picture in pictures}
    assert len(read_pictures(photos, 9)[0]) + len(read_pictures(photos, 9)[1]) == 9


def test_wrong_input_gets_one_line(monkeypatch, tmp_path, photos, capsys):
    model, empty = clip_folder(tmp_path / "model"), tmp_path / "empty"
    empty.mkdir()
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").touch()
    vit = tmp_path / "vit"
    vit.mkdir()
    (vit / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))
    cut = clip_folder(tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-1000])
    texts = tmp_path / "texts.txt"
    texts.write_text("\n")
    given = {"--model": model, "--images": photos, "--out": tmp_path / "out"}
    for changed, message in (
        ({"--model": empty}, "holds no config.json"),
        ({"--model": model / "config.json"}, "is a file; give a folder of transformers"),
        ({"--model": vit}, "is a ViTModel of transformers; supported are CLIPModel"),
        ({"--model": cut}, "transformers cannot load it"),
        ({"--images": empty}, "has 0 readable pictures; give 8 or more"),
        ({"--out": full}, "is there already, and not empty"),
        ({"--texts": texts}, "is empty; give a text per line"),
        ({"--texts": empty}, "give a text file"),
        ({"--p": 0.999}, "choose another p"),
        ({"--learnable": 9}, "there are none by default; choose what they are made of with --init"),
    ):
        arguments = [part for pair in (given | changed).items() for part in pair]
        assert message in refusal(capsys, lambda arguments=arguments: run(monkeypatch, *arguments)), message
    assert not (tmp_path / "out").exists()
