"""CLIP's tokenizer: OpenAI's numbers, texts that keep their end, and lists of words."""

import gzip
import pickle
from pathlib import Path

import numpy as np
import open_clip.tokenizer
import pytest
from transformers import CLIPTokenizer

from clip.tokenizer import ClipTokenizer, load_clip_tokenizer
from data.shapes.families import distinctive_caption, draw_family
from data.shapes.tasks import vocabulary
from data.text import clean_sentence, encode
from utils import UserError

START, END = 49406, 49407
WORDS = "[PAD] [UNK] a dog red is".split()


@pytest.fixture(scope="module")
def openai() -> ClipTokenizer:
    return load_clip_tokenizer("clip")


@pytest.fixture
def words(tmp_path: Path) -> ClipTokenizer:
    (tmp_path / "words.txt").write_text("\n".join(WORDS))
    return load_clip_tokenizer(str(tmp_path / "words.txt"))


def test_a_tokenizer_can_be_sent_to_workers_that_are_started_afresh(openai, words):
    for tokenizer in (openai, words):
        sent = pickle.loads(pickle.dumps(tokenizer))
        ids = tokenizer(["a red dog"])["input_ids"]
        assert sent(["a red dog"])["input_ids"].equal(ids)
        assert sent.convert_ids_to_tokens(ids[0].tolist()) == tokenizer.convert_ids_to_tokens(ids[0].tolist())


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("a diagram", [320, 22697]),
        ("Hello   World!", [3306, 1002, 256]),
        ("", []),
    ],
)
def test_openais_numbers(openai, text, ids):
    assert openai([text])["input_ids"].tolist() == [[START, *ids, END]] and len(openai) == 49408


def transformers_tokenizer() -> CLIPTokenizer:
    """Another implementation, of the merges as OpenAI lists and numbers them."""
    file = Path(open_clip.tokenizer.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    merges = gzip.open(file, "rt", encoding="utf-8").read().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(open_clip.tokenizer.bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({word: i for i, word in enumerate(words)}, [tuple(merge.split()) for merge in merges])


def test_captions_are_numbered_as_by_transformers(openai):
    captions = [
        "A man's skateboard, 2 dogs & 1,000 balloons!", "the woman who isn't there they've seen", "naïve café über alles",
        "a stop-sign reading \"STOP\" at 5:30pm", "supercalifragilisticexpialidocious giraffe", "two red stars above a circle",
    ]  # fmt: skip
    other = transformers_tokenizer()
    for caption in captions:
        assert openai([caption])["input_ids"][0].tolist() == other(caption)["input_ids"], caption


def test_a_batch_is_padded_with_0_behind_the_end(openai):
    batch = openai(["a photo of a cat", "a cat"])
    assert batch["input_ids"][1].tolist() == [START, 320, 2368, END, 0, 0, 0]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1] * 4 + [0] * 3]
    assert batch["input_ids"].argmax(dim=1).tolist() == [6, 3]


def test_a_text_that_is_cut_keeps_its_end(openai, words):
    assert openai(["a photo of a cat"], max_length=5)["input_ids"].tolist() == [[START, 320, 1125, 539, END]]
    assert openai(["a photo of a cat"], max_length=7)["input_ids"].tolist() == [[START, 320, 1125, 539, 320, 2368, END]]
    assert openai(["cat " * 100])["input_ids"].shape == (1, 77)
    assert encode(words, ["a red dog is red"], max_tokens=4)["input_ids"].tolist() == [[6, 2, 4, 7]]


def test_a_list_of_words_is_numbered_by_its_lines(words):
    assert len(words) == len(WORDS) + 2
    batch = words(["a dog is red", "a cat"])
    assert batch["input_ids"].tolist() == [[6, 2, 3, 5, 4, 7], [6, 2, 1, 7, 0, 0]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [6, 4]


def test_the_small_worlds_captions_are_all_known_words(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary()))
    tokenizer, rng = load_clip_tokenizer(str(tmp_path / "vocab.txt")), np.random.default_rng(0)
    unknown = vocabulary().index("[UNK]")
    for _ in range(10):
        family = draw_family(rng)
        caption = clean_sentence(distinctive_caption(rng, family[0], family[1:]), "caption", 30)
        ids = tokenizer([caption])["input_ids"]
        assert ids.shape[1] == len(caption.split()) + 2 and not (ids == unknown).any()


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "No such file or directory"), (b"\xff\xfe", "not a text file"), (b"a\ndog", r"has no \[UNK\]")],
)
def test_what_is_no_list_of_words_is_named_in_one_line(tmp_path, content, said):
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"\A{path}: {said}; set the key 'tokenizer' to 'clip' or to a list of words\Z"):
        load_clip_tokenizer(str(path))


def test_ids_are_shown_as_what_they_stand_for(openai, words):
    ids = openai(["a photo of antidisestablishmentarianism"])["input_ids"][0].tolist()
    pieces = ["anti", "dise", "stab", "lish", "ment", "arianism"]
    assert openai.convert_ids_to_tokens(ids) == ["[START]", "a", "photo", "of", *pieces, "[END]"]
    ids = words(["a red cat"])["input_ids"][0].tolist()
    assert words.convert_ids_to_tokens(ids) == ["[START]", "a", "red", "[UNK]", "[END]"]
