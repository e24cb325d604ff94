"""Sentences and their tokens."""

from pathlib import Path

import pytest
import torch

from data.text import as_texts, clean_sentence, dec_token_id, enc_token_id, load_tokenizer
from utils import UserError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "##s"]


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return tmp_path / "vocab.txt"


def test_a_statement_gets_a_space_for_each_sign() -> None:
    assert clean_sentence('A (red) dog;  "sits"... here, ok?\n', "caption", 40) == "a red dog sits here, ok?"


def test_a_question_loses_its_signs() -> None:
    assert clean_sentence("What's in *here*; a.b? ", "question", 50) == "what's in here ab?"


def test_long_sentences_are_cut_at_words() -> None:
    assert clean_sentence("one two three", "caption", 2) == "one two"


def test_the_two_first_tokens_follow_the_vocabulary(vocabulary: Path) -> None:
    for path in (vocabulary, vocabulary.parent):
        tokenizer = load_tokenizer(path)
        assert (dec_token_id(tokenizer), enc_token_id(tokenizer)) == (len(WORDS), len(WORDS) + 1)
        assert len(tokenizer) == len(WORDS) + 2 and tokenizer.pad_token_id == 0
        assert tokenizer("A DOGS cat").input_ids == [2, 5, 6, 7, 1, 3]


def test_a_vocabulary_with_a_byte_order_mark_is_read(vocabulary: Path) -> None:
    plain = load_tokenizer(vocabulary)("a dog")["input_ids"]
    vocabulary.write_text("\n".join(WORDS) + "\n", encoding="utf-8-sig")
    assert load_tokenizer(vocabulary)("a dog")["input_ids"] == plain


def test_tokens_that_the_vocabulary_has_are_not_added_again(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, "[ENC]", "[DEC]"]))
    tokenizer = load_tokenizer(tmp_path)
    assert (enc_token_id(tokenizer), dec_token_id(tokenizer), len(tokenizer)) == (8, 9, 10)
    assert tokenizer("[ENC] dog", add_special_tokens=False).input_ids == [8, 6]


def test_a_missing_or_foreign_vocabulary_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vocab.txt: No such file.*'tokenizer'"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"has no \[PAD\]"):
        load_tokenizer(tmp_path)


def test_what_is_written_has_its_apostrophes_where_they_belong(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, "'", "don", "t", "s", ","]))
    tokenizer = load_tokenizer(tmp_path / "vocab.txt")
    for text in ("don't", "a dog's a", "a, dogs"):
        assert as_texts(tokenizer, torch.tensor([tokenizer(text).input_ids])) == [text]
