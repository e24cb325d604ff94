"""Conversions there and back change no weight; what they write is read by the libraries; what cannot be written is refused."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoProcessor, AutoTokenizer, BlipProcessor, CLIPModel, CLIPProcessor, SiglipModel

from clip.tokenizer import load_clip_tokenizer
from configs.folder import CLASSES
from data.text import load_tokenizer
from models.weights import blip, clip
from models.weights.reading import read_checkpoint
from tests.folders import DEC, VOCABULARY, blip_folder, clip_folder, pictures, siglip_folder
from tests.tiny_run import write_run
from tools import convert_checkpoint
from utils import UserError

CONFIG = """task: {task}
vit: {{patch_size: 8, embed_dim: 24, depth: 3, num_heads: 2}}
vit_norm_eps: 1.0e-05
bert: {{hidden_size: 24, num_hidden_layers: 2, num_attention_heads: 3, intermediate_size: 40, max_position_embeddings: 20}}
max_text_tokens: 12
image_size: 32
tokenizer: {folder}
"""
BLIP_TASKS = ("retrieval", "vqa", "caption")


@pytest.fixture
def convert(monkeypatch, capsys):
    """(checkpoint, format, out, flags) -> what the program prints."""

    def run(checkpoint: Path, to: str, out: Path, *flags: object) -> str:
        argv = ["--checkpoint", checkpoint, "--to", to, "--out", out, *flags]
        monkeypatch.setattr("sys.argv", ["convert_checkpoint.py", *map(str, argv)])
        convert_checkpoint.main()
        return capsys.readouterr().out

    return run


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]) and tensor.dtype == theirs[name].dtype, name


def config_of(folder: Path, task: str) -> Path:
    """The config of a run on the weights of `blip_folder`."""
    file = folder / "run.yaml"
    keys = CONFIG.format(task=task, folder=folder)
    file.write_text(keys if task != "vqa" else keys.replace("max_text_tokens: 12\n", ""))
    return file


@pytest.mark.parametrize("task", BLIP_TASKS)
@pytest.mark.parametrize("middle", ["blip", "madtp"])
def test_a_folder_of_blip_comes_back_from_a_file(task, middle, tmp_path, convert):
    blip_folder(tmp_path / "there", task)
    said = convert(tmp_path / "there", middle, tmp_path / "x.pth")
    assert "vit_norm_eps: 1e-05" in said
    convert(tmp_path / "x.pth", "transformers", tmp_path / "back", "--config", config_of(tmp_path / "there", task))
    assert_same(load_file(tmp_path / "back/model.safetensors"), load_file(tmp_path / "there/model.safetensors"))
    first, second = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("there", "back"))
    for part in ("vision_config", "text_config"):
        for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "layer_norm_eps"):
            assert first[part][key] == second[part][key]
    _, loading = getattr(transformers, CLASSES[task]).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not loading["unexpected_keys"] and not [name for name in loading["missing_keys"] if "predictions.decoder" not in name]


@pytest.mark.parametrize("task", BLIP_TASKS)
@torch.no_grad()
def test_transformers_answers_alike_with_a_folder_that_came_back(task, tmp_path, convert):
    other = blip_folder(tmp_path / "there", task)
    convert(tmp_path / "there", "blip", tmp_path / "x.pth")
    convert(tmp_path / "x.pth", "transformers", tmp_path / "back", "--config", config_of(tmp_path / "there", task))
    again = type(other).from_pretrained(tmp_path / "back").eval()
    words = BlipProcessor.from_pretrained(tmp_path / "back").tokenizer("a red star", return_tensors="pt")
    inputs = {"pixel_values": pictures(1), "input_ids": words["input_ids"], "attention_mask": words["attention_mask"]}
    if task == "vqa":
        ours, theirs = (model.generate(**inputs, max_length=6, do_sample=False) for model in (again, other))
    else:
        ours, theirs = (model(**inputs) for model in (again, other))
        ours, theirs = (out.itm_score if task == "retrieval" else out.logits for out in (ours, theirs))
    assert torch.equal(ours, theirs)


@torch.no_grad()
def test_a_folder_of_siglip_comes_back_from_a_file(tmp_path, convert):
    other = siglip_folder(tmp_path / "there")
    said = convert(tmp_path / "there", "madtp", tmp_path / "x.pth")
    assert 'clip: {"family": "siglip", ' in said and "image_size" not in said
    convert(tmp_path / "x.pth", "transformers", tmp_path / "back", "--tokenizer", tmp_path / "there")
    assert_same(load_file(tmp_path / "back/model.safetensors"), load_file(tmp_path / "there/model.safetensors"))
    again, processor = SiglipModel.from_pretrained(tmp_path / "back").eval(), AutoProcessor.from_pretrained(tmp_path / "back")
    words = processor.tokenizer(["a red star", "a star"], padding="max_length", max_length=10, return_tensors="pt")["input_ids"]
    inputs = {"pixel_values": pictures(2), "input_ids": words}
    assert torch.equal(again(**inputs).logits_per_text, other(**inputs).logits_per_text)
    assert list(processor.image_processor.image_mean) == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("to", ["openai", "open_clip", "blip"])
def test_siglip_has_two_formats(to, tmp_path, convert):
    siglip_folder(tmp_path / "there")
    with pytest.raises(UserError, match="is a SigLIP; give transformers or madtp"):
        convert(tmp_path / "there", to, tmp_path / "x.pth")


@pytest.mark.parametrize("task", ["retrieval", "caption"])
def test_a_run_comes_back_from_a_folder_but_for_what_only_training_uses(task, tmp_path, convert):
    run = write_run(tmp_path / "run", task, p=0)
    said = convert(run / "checkpoint_best.pth", "transformers", tmp_path / "folder")
    assert ("left out, as only training uses them" in said) == (task == "retrieval")
    convert(tmp_path / "folder", "madtp", tmp_path / "back.pth")
    before, after = (read_checkpoint(path)["model"] for path in (run / "checkpoint_best.pth", tmp_path / "back.pth"))
    kept = {name: tensor for name, tensor in before.items() if not blip.TRAINING_ALONE.match(name) and name not in blip.TIED}
    assert_same(after, kept)


@pytest.mark.parametrize("task", [*BLIP_TASKS, "nlvr"])
def test_the_authors_names_come_back_from_ours(task, tmp_path, convert):
    """Position ids, the output layer under its second names, momentum encoders and queues included."""
    if task == "nlvr":
        weights = read_checkpoint(write_run(tmp_path / "run", task, p=0) / "checkpoint_best.pth")["model"]
        (tmp_path / "run/config.yaml").unlink()
    else:
        blip_folder(tmp_path / "there", task)
        weights = blip.dense_weights(load_file(tmp_path / "there/model.safetensors"), "x")
    if task == "retrieval":
        weights |= {f"visual_encoder_m.{name}": torch.ones(1) for name in ("pos_embed", "cls_token")}
        weights |= {"image_queue": torch.ones(12, 4), "queue_ptr": torch.zeros(1), "temp": torch.tensor(0.1)}
    published = blip.as_published(weights)
    assert ("text_decoder.cls.predictions.decoder.weight" in published) == (task in ("vqa", "caption"))
    torch.save({"model": published}, tmp_path / "theirs.pth")
    convert(tmp_path / "theirs.pth", "madtp", tmp_path / "ours.pth")
    convert(tmp_path / "ours.pth", "blip", tmp_path / "back.pth")
    assert_same(torch.load(tmp_path / "back.pth")["model"], published)


def test_the_folder_holds_the_tokenizer_and_the_pictures_preparation(tmp_path, convert):
    run = write_run(tmp_path / "run", "retrieval", p=0)
    convert(run / "checkpoint_best.pth", "transformers", tmp_path / "folder")
    processor = BlipProcessor.from_pretrained(tmp_path / "folder")
    words = load_tokenizer(tmp_path / "folder")
    assert processor.tokenizer("a red star")["input_ids"] == words("a red star")["input_ids"] and len(words) == len(VOCABULARY)
    assert json.loads((tmp_path / "folder/config.json").read_text())["text_config"]["bos_token_id"] == DEC
    prepared = json.loads((tmp_path / "folder/preprocessor_config.json").read_text())
    assert prepared["size"] == {"height": 32, "width": 32} and prepared["resample"] == 3


@pytest.mark.parametrize("middle", ["open_clip", "madtp", "openai"])
def test_a_folder_of_clip_comes_back_from_a_file(middle, tmp_path, convert):
    clip_folder(tmp_path / "there", "quick_gelu" if middle == "openai" else "gelu", head=64 if middle == "openai" else 0)
    convert(tmp_path / "there", middle, tmp_path / "file/x.pt")
    convert(tmp_path / "file/x.pt", "transformers", tmp_path / "back", "--tokenizer", tmp_path / "there")
    assert_same(load_file(tmp_path / "back/model.safetensors"), load_file(tmp_path / "there/model.safetensors"))
    _, loading = CLIPModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not loading["unexpected_keys"] and not loading["missing_keys"]
    theirs = CLIPProcessor.from_pretrained(tmp_path / "back").tokenizer("a star")["input_ids"]
    assert theirs == AutoTokenizer.from_pretrained(tmp_path / "there")("a star")["input_ids"]
    first, second = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("there", "back"))
    for part in ("vision_config", "text_config"):
        assert all(first[part][key] == second[part][key] for key in ("hidden_act", "num_attention_heads", "intermediate_size"))


@torch.no_grad()
def test_open_clip_reads_what_is_written_for_it(tmp_path, convert):
    other = clip_folder(tmp_path / "there")
    convert(tmp_path / "there", "open_clip", tmp_path / "x.pt")
    written = json.loads((tmp_path / "open_clip_config.json").read_text())["model_cfg"]
    model = open_clip.CLIP(**written).eval()
    weights = torch.load(tmp_path / "x.pt")
    assert not [name for name in model.load_state_dict(weights, strict=False).unexpected_keys]
    ids = load_clip_tokenizer(str(tmp_path / "there"))(["a star", "red"], max_length=12)["input_ids"]
    ids = torch.nn.functional.pad(ids, (0, 12 - ids.shape[1]))
    expected = other(input_ids=ids, pixel_values=pictures(2))
    torch.testing.assert_close(model.encode_image(pictures(2), normalize=True), expected.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.encode_text(ids, normalize=True), expected.text_embeds, atol=1e-5, rtol=0)


def test_openais_numbers_and_types_come_back(tmp_path, convert):
    clip_folder(tmp_path / "there", "quick_gelu", head=64)
    convert(tmp_path / "there", "openai", tmp_path / "x.pt")
    weights = torch.load(tmp_path / "x.pt")
    assert int(weights["input_resolution"]) == 32 and int(weights["context_length"]) == 12
    mixed = {name: tensor.half() if tensor.dim() == 2 else tensor for name, tensor in weights.items()}
    torch.save(mixed, tmp_path / "mixed.pt")
    convert(tmp_path / "mixed.pt", "transformers", tmp_path / "folder", "--tokenizer", tmp_path / "there")
    convert(tmp_path / "folder", "openai", tmp_path / "back.pt")
    assert_same(torch.load(tmp_path / "back.pt"), mixed)


def test_a_clip_run_with_its_own_words_comes_back(tmp_path, convert):
    run = write_run(tmp_path / "run", "retrieval_clip", p=0)
    convert(run / "checkpoint_best.pth", "transformers", tmp_path / "folder")
    assert load_clip_tokenizer(str(tmp_path / "folder")).words("a red star") == [5, 6, 7]
    convert(tmp_path / "folder", "madtp", tmp_path / "back.pth")
    before, after = (read_checkpoint(path)["model"] for path in (run / "checkpoint_best.pth", tmp_path / "back.pth"))
    assert after.pop("unseen").tolist() == [0, 2, 2]
    assert_same(after, {name: tensor for name, tensor in before.items() if not clip.TRAINING_ALONE.match(name)})


def test_openais_tokenizer_is_written_as_transformers_has_it(tmp_path, convert):
    run, folder = write_run(tmp_path / "run", "retrieval_clip", p=0), tmp_path / "folder"
    weights = read_checkpoint(run / "checkpoint_best.pth")["model"]
    torch.save({"model": weights | {"token_embedding.weight": torch.zeros(49408, 16)}}, run / "checkpoint_best.pth")
    convert(run / "checkpoint_best.pth", "transformers", folder, "--tokenizer", "clip")
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_clip_tokenizer("clip")
    for text in ("two dogs are running on the grass", "a 1990s car, don't stop"):
        assert theirs(text)["input_ids"] == ours([text])["input_ids"][0].tolist()


@pytest.mark.parametrize(
    ("task", "to", "said"),
    [
        ("nlvr", "transformers", "a BLIP for NLVR2, for which transformers has no class; give --to blip or madtp"),
        ("vqa", "transformers", "transformers' BlipForQuestionAnswering has no such form: of another shape"),  # its widths differ
        ("caption", "openai", "--to openai: a format of CLIP"),
        ("retrieval_clip", "blip", "--to blip: .* is a CLIP"),
        ("retrieval_clip", "openai", "its models have quick_gelu and heads of 64 channels"),
    ],
)
def test_a_format_that_a_model_does_not_have_is_refused(task, to, said, tmp_path, convert):
    run = write_run(tmp_path / "run", task, p=0)
    with pytest.raises(UserError, match=said) as error:
        convert(run / "checkpoint_best.pth", to, tmp_path / ("out.pth" if to != "transformers" else "out"))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists() and not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize("task", ["retrieval", "retrieval_clip"])
def test_every_weight_is_accounted_for(task, tmp_path, convert):
    run = write_run(tmp_path / "run", task, p=0)
    weights = read_checkpoint(run / "checkpoint_best.pth")["model"]
    name = "visual.extra.weight" if "clip" in task else "text_encoder.encoder.layer.0.extra.weight"
    torch.save({"model": {**weights, name: torch.ones(1)}}, run / "checkpoint_best.pth")
    with pytest.raises(UserError, match=f"holds {name}, which no"):
        convert(run / "checkpoint_best.pth", "madtp", tmp_path / "out.pth")


def test_an_output_layer_of_its_own_is_refused(tmp_path, convert):
    blip_folder(tmp_path / "there", "caption")
    convert(tmp_path / "there", "blip", tmp_path / "x.pth")
    weights = torch.load(tmp_path / "x.pth")["model"]
    weights["text_decoder.cls.predictions.decoder.weight"] = weights["text_decoder.cls.predictions.decoder.weight"] + 1
    torch.save({"model": weights}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="to which BLIP ties it"):
        convert(tmp_path / "x.pth", "madtp", tmp_path / "y.pth")


def test_weights_that_are_cut_off_are_refused(tmp_path, convert):
    blip_folder(tmp_path / "there", "caption")
    weights = blip.dense_weights(load_file(tmp_path / "there/model.safetensors"), "x")
    for front in ("text_decoder.bert.encoder.layer.0.intermediate.dense.weight", "visual_encoder.blocks."):
        torch.save({name: tensor for name, tensor in weights.items() if not name.startswith(front)}, tmp_path / "x.pth")
        with pytest.raises(UserError, match=f"x.pth: lacks {front}"):
            convert(tmp_path / "x.pth", "transformers", tmp_path / "x", "--tokenizer", tmp_path / "there")


def test_published_widths_tell_heads_and_epsilon(tmp_path, convert):
    width = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 1}
    blip_folder(tmp_path / "there", "retrieval", width, width)
    convert(tmp_path / "there", "blip", tmp_path / "x.pth")
    convert(tmp_path / "x.pth", "transformers", tmp_path / "back", "--tokenizer", tmp_path / "there")
    written = json.loads((tmp_path / "back/config.json").read_text())
    assert written["vision_config"]["num_attention_heads"] == written["text_config"]["num_attention_heads"] == 12
    assert written["vision_config"]["layer_norm_eps"] == 1e-6  # BLIP's


def test_another_tokenizer_is_refused_before_anything_is_written(tmp_path, convert):
    clip_folder(tmp_path / "clip")
    with pytest.raises(UserError, match="has 17 words, and the tokenizer clip 49408; give its own with --tokenizer"):
        convert(tmp_path / "clip", "transformers", tmp_path / "x", "--tokenizer", "clip")
    blip_folder(tmp_path / "blip", "caption")
    (tmp_path / "words.txt").write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")))
    with pytest.raises(UserError, match="words.txt: has 7 words with .DEC. and .ENC., the weights of .* others"):
        convert(tmp_path / "blip", "transformers", tmp_path / "x", "--tokenizer", tmp_path / "words.txt")
    assert not (tmp_path / "x").exists()


def test_heads_are_never_guessed(tmp_path, convert):
    blip_folder(tmp_path / "blip", "caption")
    convert(tmp_path / "blip", "madtp", tmp_path / "blip.pth")
    with pytest.raises(UserError, match="does not show its attention heads; give the config.yaml"):
        convert(tmp_path / "blip.pth", "transformers", tmp_path / "x", "--tokenizer", tmp_path / "blip")
    clip_folder(tmp_path / "clip")
    weights = clip.dense_weights(read_checkpoint(tmp_path / "clip")["model"], "x")
    torch.save(weights, tmp_path / "clip.pt")
    with pytest.raises(UserError, match="does not show its activation and heads"):
        convert(tmp_path / "clip.pt", "transformers", tmp_path / "x")
    torch.save({**weights, "image_queue": torch.ones(20, 4)}, tmp_path / "clip.pt")
    with pytest.raises(UserError, match="does not show its attention heads"):
        convert(tmp_path / "clip.pt", "transformers", tmp_path / "x")
