"""Folders that transformers saves: the models that they become answer as they do there."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer, SiglipModel

from models.weights.reading import read_checkpoint
from tasks.registry import TASKS, build_model, load_any_config
from tests.folders import DEC, ENC, SIGLIP_LENGTH, blip_folder, changed, clip_folder, pictures, siglip_folder
from utils import UserError

WRITTEN = ["a red star and a star", "a star and a red a", "star star a star red red"]  # of as many words, so without padding


def opened(folder, task, **keys):
    """The model that a config with nothing but `pretrained` describes, its tokenizer, and the config."""
    file = folder / "experiment.yaml"
    file.write_text(json.dumps({"task": task, "pretrained": str(folder), "p": 0, **keys}))
    config = load_any_config(file)
    model, tokenizer = build_model(config)
    missing = TASKS[task].load(model, read_checkpoint(config.pretrained)["model"], config.pretrained)
    assert task not in ("vqa", "caption") or all("position_ids" in name or "predictions.decoder" in name for name in missing)
    return model.eval(), tokenizer, config


def texts(tokenizer, first=None):
    ids = tokenizer(WRITTEN, padding="longest", return_tensors="pt")
    if first is not None:
        ids["input_ids"][:, 0] = first
    return ids["input_ids"], ids["attention_mask"]


@torch.no_grad()
def test_retrieval_scores_and_matches_as_there(tmp_path):
    other = blip_folder(tmp_path, "retrieval")
    model, tokenizer, config = opened(tmp_path, "retrieval", max_text_tokens=20)
    assert config.vit_norm_eps == 1e-5 and config.embed_dim == 12 and config.image_size == 32 and config.bert_sizes.dropout == 0.1
    images, (ids, mask) = pictures(3), texts(tokenizer)
    image, text = model.encode_image(images), model.encode_text(ids, mask)
    expected = other(input_ids=ids, attention_mask=mask, pixel_values=images, use_itm_head=False).itm_score
    torch.testing.assert_close(image.feature @ text.feature.t(), expected, atol=1e-5, rtol=0)
    begun = texts(tokenizer, ENC)[0]  # transformers leaves [CLS] where BLIP puts [ENC]
    logits = other(input_ids=begun, attention_mask=mask, pixel_values=images).itm_score
    torch.testing.assert_close(model.match(ids, mask, (image.tokens, image.layout))[0], logits, atol=1e-5, rtol=1e-5)
    turned = other(input_ids=begun, attention_mask=mask, pixel_values=images.flip(0)).itm_score
    assert (logits - turned).abs().max() > 1e-2 and not torch.allclose(expected[0], expected[1], atol=1e-3)


@torch.no_grad()
def test_vqa_scores_and_writes_answers_as_there(tmp_path):
    other = blip_folder(tmp_path, "vqa").double()  # lively weights give large logits: float32 would round them at the fourth digit
    model, tokenizer, _ = opened(tmp_path, "vqa")
    model, images, (ids, mask) = model.double(), pictures(3).double(), texts(tokenizer, ENC)
    answers = torch.tensor([[DEC, 6, 7, 3], [DEC, 5, 8, 3], [DEC, 7, 7, 3]])
    question = model.encode(images, ids, mask)
    _, logits = model.answer(question, answers, torch.ones_like(answers), torch.ones(3, dtype=torch.long))
    seen = other.vision_model(pixel_values=images).last_hidden_state
    read = other.text_encoder(
        input_ids=ids, attention_mask=mask, encoder_hidden_states=seen, encoder_attention_mask=torch.ones(seen.shape[:2]).long()
    ).last_hidden_state
    torch.testing.assert_close(question.tokens, read, atol=1e-5, rtol=1e-5)
    expected = other.text_decoder(input_ids=answers, encoder_hidden_states=read, encoder_attention_mask=mask).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    ours, _ = model.generate(question, num_beams=2, max_length=8)
    theirs = other.generate(ids, images, attention_mask=mask, num_beams=2, max_length=8, min_length=1, do_sample=False)
    assert ours.tolist() == theirs.tolist() and len({tuple(answer) for answer in ours.tolist()}) > 1


@torch.no_grad()
def test_captions_are_scored_and_written_as_there(tmp_path):
    other = blip_folder(tmp_path, "caption").double()
    model, tokenizer, _ = opened(tmp_path, "caption", prompt="a ", max_length=12, max_text_tokens=12)
    model, images, (ids, mask) = model.double(), pictures(3).double(), texts(tokenizer, DEC)
    expected = other(pixel_values=images, input_ids=ids, attention_mask=mask).logits
    tokens, valid, _ = model.encode(images)
    torch.testing.assert_close(model.decode(tokens, valid, ids, mask).logits, expected, atol=1e-5, rtol=1e-5)
    ours, _ = model.generate(images, num_beams=2, max_length=10, min_length=4)
    prompt = torch.tensor([[DEC, 5, 3]]).expand(3, -1).clone()  # of which transformers cuts the last
    how = {"num_beams": 2, "max_length": 10, "min_length": 4, "do_sample": False}
    assert ours.tolist() == other.generate(pixel_values=images, input_ids=prompt, **how).tolist()


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@torch.no_grad()
def test_clips_features_and_tokens_are_those_there(tmp_path, activation):
    other = clip_folder(tmp_path, activation)
    model, tokenizer, config = opened(tmp_path, "retrieval_clip", max_text_tokens=12)
    assert config.clip.vision_heads == 3 and config.clip.activation == activation and config.clip.context_length == 12
    theirs = CLIPTokenizer.from_pretrained(tmp_path)(WRITTEN, padding=True)
    ids, mask = (tokenizer(WRITTEN, max_length=12)[name] for name in ("input_ids", "attention_mask"))
    assert [row[row >= 0][: sum(m)].tolist() for row, m in zip(ids, mask.tolist(), strict=True)] == [
        row[: sum(m)] for row, m in zip(theirs["input_ids"], theirs["attention_mask"], strict=True)
    ]
    images = pictures(3)
    expected = other(input_ids=ids, attention_mask=mask, pixel_values=images)
    torch.testing.assert_close(model.encode_image(images).feature, expected.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.encode_text(ids).feature, expected.text_embeds, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_siglips_features_are_those_there(tmp_path, dtype):
    siglip_folder(tmp_path).to(dtype).save_pretrained(tmp_path)
    other = SiglipModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    model, tokenizer, config = opened(tmp_path, "retrieval_clip")
    ids, images = tokenizer(WRITTEN, max_length=config.max_text_tokens)["input_ids"], pictures(3)
    assert ids.shape == (3, SIGLIP_LENGTH)
    expected = other(input_ids=ids, pixel_values=images)
    torch.testing.assert_close(model.encode_image(images).feature, expected.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.encode_text(ids).feature, expected.text_embeds, atol=1e-5, rtol=0)
    assert float(model.contrastive_temperature) == pytest.approx(float((-other.logit_scale).exp()))


def test_a_siglip_that_lacks_a_weight_or_has_one_more_is_refused(tmp_path):
    siglip_folder(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    for name, said in (
        ("vision_model.head.probe", "lacks visual.pool.probe"),
        ("text_model.encoder.layers.0.self_attn.k_proj.weight", "lacks text_model.encoder.layers.0.self_attn.k_proj.weight"),
    ):
        save_file({key: tensor for key, tensor in whole.items() if key != name}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=said):
            opened(tmp_path, "retrieval_clip")
    save_file({**whole, "vision_model.head.extra": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="holds visual.pool.extra, which this model does not have"):
        opened(tmp_path, "retrieval_clip")


def test_weights_in_several_files_are_read_together(tmp_path):
    blip_folder(tmp_path, "caption")
    whole = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(whole)
    parts = {f"model-0000{part}-of-00002.safetensors": names[part - 1 :: 2] for part in (1, 2)}
    for file, held in parts.items():
        save_file({name: whole[name] for name in held}, tmp_path / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    read = read_checkpoint(tmp_path)["model"]
    assert read.keys() == whole.keys() and all(torch.equal(read[name], whole[name]) for name in whole)
    changed(tmp_path / "model.safetensors.index.json", weight_map=[])
    with pytest.raises(UserError, match="has no 'weight_map' of weights"):
        read_checkpoint(tmp_path)


def test_a_folder_without_weights_is_named(tmp_path):
    blip_folder(tmp_path, "caption")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="a folder of transformers without model.safetensors or pytorch_model.bin"):
        read_checkpoint(tmp_path)
