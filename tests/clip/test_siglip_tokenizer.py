"""SigLIP's tokenizer: the numbers of its folder, at the length at which texts are read."""

import pickle
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoTokenizer

from clip import siglip_tokenizer
from clip.siglip_tokenizer import load_siglip_tokenizer
from data.text import encode
from tests.folders import SIGLIP_LENGTH, SIGLIP_WORDS, changed, siglip_folder
from utils import UserError

TEXTS = ["A red star", "a star and a red star and a red star and a star", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    siglip_folder(folder)
    return folder


def test_texts_are_numbered_and_padded_as_by_transformers(folder):
    theirs = AutoTokenizer.from_pretrained(folder)
    how = {"padding": "max_length", "truncation": True, "max_length": SIGLIP_LENGTH}
    found = encode(load_siglip_tokenizer(str(folder)), TEXTS, SIGLIP_LENGTH)
    assert found["input_ids"].tolist() == theirs([text.lower() for text in TEXTS], **how)["input_ids"]
    assert found["input_ids"].tolist()[0] == [3, 4, 5, 1, 0, 0, 0, 0, 0, 0] and found["input_ids"][1, -1] == 1  # it ends where cut
    assert torch.equal(found["attention_mask"], torch.ones(3, SIGLIP_LENGTH, dtype=torch.long))  # padding takes part


def test_ids_are_shown_as_words_and_the_length_is_their_number(folder):
    tokenizer = load_siglip_tokenizer(str(folder))
    assert tokenizer.convert_ids_to_tokens([3, 4, 5, 1, 0]) == ["a", "red", "star", "</s>", "<pad>"]
    assert len(tokenizer) == len(SIGLIP_WORDS)


def test_it_can_be_sent_to_workers_that_are_started_afresh(folder):
    tokenizer = load_siglip_tokenizer(str(folder))
    sent = pickle.loads(pickle.dumps(tokenizer))
    assert torch.equal(sent(TEXTS)["input_ids"], tokenizer(TEXTS)["input_ids"])


def test_the_first_siglip_needs_a_package_even_if_another_tokenizer_is_there(tmp_path, monkeypatch):
    """Its own removes punctuation; tokenizer.json does not."""
    siglip_folder(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"x")
    monkeypatch.setattr(siglip_tokenizer, "find_spec", lambda name: None if name == "sentencepiece" else find_spec("re"))
    with pytest.raises(UserError, match="spiece.model: needs the package sentencepiece; install it: pip install"):
        load_siglip_tokenizer(str(tmp_path))


def test_a_broken_tokenizer_and_one_that_cannot_pad_are_named(tmp_path):
    siglip_folder(tmp_path)
    changed(tmp_path / "tokenizer_config.json", pad_token=None)
    with pytest.raises(UserError, match="has no padding token"):
        load_siglip_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="its tokenizer cannot be read; fetch the folder again"):
        load_siglip_tokenizer(str(tmp_path))
