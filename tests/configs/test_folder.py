"""Keys that a folder of transformers determines: taken where they are left out, refused where they contradict it."""

import json

import pytest

from configs.load import load_config, save_config
from configs.vocabulary import read_vocabulary
from tasks.registry import TASKS
from tests.folders import SIDE, VOCABULARY, blip_folder, changed, clip_folder
from tests.runs import run_here
from tests.tiny_run import WORDS, write_data
from utils import UserError


def config_of(folder, task, **keys):
    file = folder / "experiment.yaml"
    file.write_text(json.dumps({"pretrained": str(folder), "p": 0, **keys}))
    return load_config(TASKS[task].config_class, file)


def refusal(folder, task, **keys) -> str:
    with pytest.raises(UserError) as error:
        config_of(folder, task, **keys)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def vqa(tmp_path):
    blip_folder(tmp_path, "vqa")
    return tmp_path


def test_keys_that_are_left_out_are_those_of_the_folder(vqa):
    config = config_of(vqa, "vqa")
    assert config.image_size == SIDE and config.vit_norm_eps == 1e-5 and str(config.tokenizer) == str(vqa)
    assert int(config.vit_sizes.embed_dim * config.vit_sizes.mlp_ratio) == 56 and config.vit_sizes.depth == 3
    assert config.bert_sizes.num_attention_heads == 3 and config.bert_sizes.max_position_embeddings == 20


def test_a_script_evaluates_a_folder(vqa):
    """Its config names nothing but the data."""
    write_data(vqa)
    files = {"vqa_root": str(vqa), "ann_root": str(vqa), "train_files": ["vqa_train"], "val_file": "vqa_val", "k_test": 2}
    (vqa / "experiment.yaml").write_text(json.dumps({"p": 0, "keep": "instance", "num_workers": 0, **files}))
    flags = ["--pretrained", vqa, "--evaluate", "--device", "cpu", "--output_dir", vqa / "out"]
    run_here("compress_vqa_dtp", ["--config", str(vqa / "experiment.yaml"), *map(str, flags)])
    assert 0 <= json.loads((vqa / "out/result.json").read_text())["metrics"]["test"]["acc"] <= 100
    assert load_config(TASKS["vqa"].config_class, vqa / "out/config.yaml").vit_norm_eps == 1e-5


def test_the_saved_config_is_read_again(vqa, tmp_path):
    config = config_of(vqa, "vqa")
    save_config(config, tmp_path / "config.yaml")
    assert load_config(TASKS["vqa"].config_class, tmp_path / "config.yaml") == config


def test_keys_that_agree_may_be_given(vqa, tmp_path):
    (tmp_path / "words.txt").write_text("\n".join(WORDS) + "\n")
    bert = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40, "dropout": 0.2}
    given = {"image_size": SIDE, "bert": {**bert, "max_position_embeddings": 20}, "tokenizer": str(tmp_path / "words.txt")}
    config = config_of(vqa, "vqa", **given)
    assert config.bert_sizes.dropout == 0.2 and config.tokenizer == tmp_path / "words.txt"  # dropout is no fact about weights


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"image_size": 480}, "image_size: 480 contradicts"),
        ({"vit": "base"}, "vit.patch_size: 16 contradicts"),
        ({"vit": {"patch_size": 4}}, "vit.patch_size: 4 contradicts"),
        ({"vit": {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 4}}, "vit.num_heads: 4 contradicts"),
        ({"bert": "base"}, "bert.hidden_size: 768 contradicts"),
        ({"decoder_layers": 1}, "decoder_layers: 1 contradicts"),
        ({"vit_norm_eps": 1e-6}, "vit_norm_eps: 1e-06 contradicts"),
        ({"tokenizer": "nowhere"}, "tokenizer: nowhere: No such file or directory; leave the key out"),
    ],
)
def test_a_key_that_contradicts_the_folder_is_refused(vqa, keys, said):
    assert said in refusal(vqa, "vqa", **keys)


def test_the_folder_of_a_teacher_counts_as_well(vqa):
    (vqa / "experiment.yaml").write_text(json.dumps({"teacher": str(vqa), "pretrained": "x.pth"}))
    assert load_config(TASKS["vqa"].config_class, vqa / "experiment.yaml").vit_norm_eps == 1e-5
    (vqa / "experiment.yaml").write_text(json.dumps({"teacher": str(vqa), "vit": "base"}))
    with pytest.raises(UserError, match="vit.patch_size: 16 contradicts"):
        load_config(TASKS["vqa"].config_class, vqa / "experiment.yaml")


def test_another_word_list_is_refused(vqa, tmp_path):
    (tmp_path / "words.txt").write_text("\n".join(reversed(WORDS)) + "\n")
    assert "has other words than" in refusal(vqa, "vqa", tokenizer=str(tmp_path / "words.txt"))


def test_of_a_mapping_single_sizes_may_be_given_and_an_unknown_one_is_explained(vqa):
    assert config_of(vqa, "vqa", vit={"patch_size": 8}).vit_sizes.embed_dim == 24
    assert "unknown key 'vit.dpth'; did you mean 'vit.depth'?" in refusal(vqa, "vqa", vit={"dpth": 8})


@pytest.mark.parametrize(
    ("file", "keys", "said"),
    [
        ("config.json", {"vision_config__hidden_act": "relu"}, "vision_config.hidden_act: 'relu' is of a model"),
        ("config.json", {"text_config__layer_norm_eps": 1e-5}, "text_config.layer_norm_eps: 1e-05 is of a model"),
        ("config.json", {"text_config__bos_token_id": 10}, "bos_token_id is 10, but [DEC] is word 9"),
        ("config.json", {"text_config__vocab_size": 12}, "has 11 words, but config.json says 12"),
        ("config.json", {"vision_config": [1]}, "not a config of BLIP"),
        ("config.json", {"model_type": "bert", "architectures": ["BertModel"]}, "holds BertModel, and task 'vqa' takes BlipFor"),
        ("processor_config.json", {"image_processor__image_mean": [0.5] * 3}, "mean: [0.5, 0.5, 0.5] is of a model"),
        ("processor_config.json", {"image_processor__size": {"height": 48, "width": 48}}, "but config.json says 32 pixels"),
        ("tokenizer_config.json", {"do_lower_case": False}, "a tokenizer that keeps upper case is of a model"),
        ("tokenizer.json", {"model__vocab": [["a", 0.5]]}, "not a word list (holds no words with their ids)"),
    ],
)
def test_a_folder_of_another_model_is_refused(vqa, file, keys, said):
    changed(vqa / file, **keys)
    assert said in refusal(vqa, "vqa")


def test_the_folder_of_another_task_is_refused(vqa):
    assert "holds BlipForQuestionAnswering, and task 'caption' takes BlipForConditionalGeneration" in refusal(vqa, "caption")
    assert "transformers, which has no BLIP for NLVR2; give BLIP's .pth" in refusal(vqa, "nlvr")


def test_a_folder_that_is_none_of_transformers_is_left_to_others(tmp_path):
    assert config_of(tmp_path, "vqa").vit == "base"


def test_of_clip_single_sizes_may_be_given(tmp_path):
    clip_folder(tmp_path)
    config = config_of(tmp_path, "retrieval_clip", max_text_tokens=12, clip={"patch_size": 8})
    assert config.clip.vision_width == 24 and config.clip.text_heads == 4 and config.tokenizer == str(tmp_path)
    assert "clip.vision_layers: 24 contradicts" in refusal(tmp_path, "retrieval_clip", clip={"vision_layers": 24})
    assert "tokenizer: clip has other words than" in refusal(tmp_path, "retrieval_clip", tokenizer="clip")


def test_a_clip_whose_texts_end_otherwise_is_refused(tmp_path):
    clip_folder(tmp_path)
    changed(tmp_path / "config.json", text_config__eos_token_id=5)
    assert "eos_token_id: 5, which is not the highest, is of a model" in refusal(tmp_path, "retrieval_clip")


def test_words_are_read_from_every_kind_of_file(vqa, tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(VOCABULARY)}))
    assert read_vocabulary(tmp_path / "vocab.json") == read_vocabulary(vqa / "tokenizer.json") == list(VOCABULARY)
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 2}))
    with pytest.raises(ValueError, match="its ids are not 0, 1, 2"):
        read_vocabulary(tmp_path / "vocab.json")
