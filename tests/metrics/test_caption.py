"""Caption metrics against figures made by hand, with Java and without."""

import gc
import json
import shutil
import sys
import warnings
from math import exp, log, sqrt
from pathlib import Path

import pytest

from metrics import caption
from metrics.caption import CaptionScores, caption_scores, split_words

BLEU = {f"Bleu_{n}" for n in range(1, 5)}
WITHOUT_JAVA = BLEU | {"ROUGE_L", "CIDEr"}
LIKE_PTB = [
    "A \"red\" dog's toy, don't touch: 3.5 dollars (1,000) -- it's 12:30... no",
    "Größe 犬 ñandú & / 50% $3 a-b black-and-white #1 and/or x_y [a] {b} smith. dogs' 'single'",
    "o'clock mother-in-law 3-year-old 1/2 wasn't he'd i'm they've we'll YOU'RE 2nd 1980's",
    "it’s “quoted” dog’s — … – don’t",
    " \n",
]
ODD = ["", '"', "...", "犬が走る", "3,000.5 o'clock 'n' \"x\" ||| [a] {b}", "a\u2028b\rc\n", "\ud83d"]


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setenv("PATH", "")


def java_that(monkeypatch, folder: Path, program: str) -> None:
    """Puts a Python program on the PATH as java."""
    (folder / "java").write_text(f"#!{sys.executable}\n{program}")
    (folder / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def score(predictions: list[str], references: list[list[str]], **settings) -> CaptionScores:
    return caption_scores(dict(enumerate(predictions)), dict(enumerate(references)), **settings)


def test_cider_by_hand(no_java):
    # Of 3 images red and cat are in the references of 2, all else is in one: weights ln(3/2) and ln(3).
    common, rare = log(3 / 2), log(3)
    # Alike: cosine 1 for words and for pairs of words; there are no longer ones.
    first = 1 + 1
    # Shares "red" with "red cat"; no pair.
    second = common**2 / (sqrt(common**2 + rare**2) * sqrt(common**2 + common**2))
    # "blue cat cat": of (rare, 2 common) as much counts as is in (rare, common). Of the pairs "blue cat" and "cat cat" the first.
    words = (rare * rare + common * common) / (sqrt(rare**2 + (2 * common) ** 2) * sqrt(rare**2 + common**2))
    pairs = rare * rare / (sqrt(rare**2 + rare**2) * rare)
    third = (words + pairs) * exp(-((2 - 1) ** 2) / (2 * 6**2))  # one pair too many, sigma 6
    predictions, references = ["Red dog.", "red dog", "blue cat cat"], [["red dog"], ["red cat"], ["blue cat"]]
    expected = 100 * 10 * (first + second + third) / 4 / 3  # of 4 orders and 3 images
    assert score(predictions, references).scores["CIDEr"] == pytest.approx(expected)


def test_bleu_by_hand(no_java):
    scores = score(["A red dog!", "dog, dog"], [["the red dog", "a red cat runs"], ["red dog sits here"]]).scores
    # a, red and dog are in a reference, dog counts once; so do "a red" and "red dog", and no three words. 5 words for 3 + 4.
    brevity = exp(1 - 7 / 5)
    assert scores["Bleu_1"] == pytest.approx(100 * 4 / 5 * brevity)
    assert scores["Bleu_2"] == pytest.approx(100 * sqrt(4 / 5 * 2 / 3) * brevity)
    assert scores["Bleu_3"] == pytest.approx(0, abs=1e-2)


def test_rouge_by_hand(no_java):
    scores = score(["a red dog", "a cat"], [["a big red cat", "dog dog dog"], ["the dog"]]).scores
    precision, recall = 2 / 3, 2 / 4  # "a red"; of the second caption nothing
    assert scores["ROUGE_L"] == pytest.approx(100 / 2 * (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision))


def test_captions_are_scored_against_their_own_images(no_java):
    references = {"a": ["a red dog runs", "the red dog"], 7: ["two cats sit on a bed"], "b": ["blue sky over a hill"]}
    right = {"a": "a red dog runs", 7: "two cats sit on a bed", "b": "blue sky over a hill"}
    swapped = {**right, "a": right[7], 7: right["a"]}
    scores, worse, reordered = (
        caption_scores(predictions, references).scores for predictions in (right, swapped, dict(reversed(right.items())))
    )
    assert scores == pytest.approx(reordered)
    assert scores["ROUGE_L"] == pytest.approx(100) and scores["Bleu_4"] == pytest.approx(100, abs=1e-4)
    assert all(worse[name] < scores[name] / 2 for name in WITHOUT_JAVA)


@pytest.mark.parametrize("text", ODD)
def test_any_text_is_scored(text, no_java):
    found = score([text, "a dog"], [["a cat", text], ["a dog"]])
    assert found.scores.keys() == WITHOUT_JAVA and all(0 <= value <= 1000 for value in found.scores.values())
    assert found.scores["ROUGE_L"] == pytest.approx(100)  # each is one of its references
    assert score(["a cat", "zebra"], [["a cat"], [text]]).scores["ROUGE_L"] == pytest.approx(50)


def test_without_a_word_in_the_references_there_is_no_cider(no_java):
    found = score(["a dog"], [["", "."]])
    assert found.not_computed["CIDEr"] == "no reference has a word in it" and "CIDEr" not in found.scores


def test_without_java_metrics_are_named_and_the_rest_is_computed(no_java, capfd):
    found = score(["a dog", ""], [["a dog"], ["a cat"]])
    assert found.tokenizer == "words" and found.scores.keys() == WITHOUT_JAVA
    assert found.not_computed.keys() == {"METEOR", "SPICE"}
    assert found.not_computed["METEOR"] == "needs Java, which is not on the PATH"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("fails", ["import sys; sys.exit('no')", "import sys; sys.exit('-version' not in sys.argv)"])
def test_a_java_that_fails_is_named_and_waited_for_no_longer(monkeypatch, tmp_path, fails, capfd):
    java_that(monkeypatch, tmp_path, fails)
    found = score(["a dog"], [["a dog"]])
    assert found.tokenizer == "words" and found.scores.keys() == WITHOUT_JAVA
    assert "its Java program failed" in found.not_computed["METEOR"]
    assert capfd.readouterr() == ("", "")


def test_no_pipe_of_java_stays_open(monkeypatch, tmp_path):
    java_that(monkeypatch, tmp_path, "import sys; sys.exit('-version' not in sys.argv)")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        score(["a dog"], [["a dog"]])
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


def spice_that_says(monkeypatch, folder: Path, scores: list) -> None:
    """A program in the place of SPICE's, with the models that it needs; it keeps what it was asked."""
    (folder / "spice" / "lib").mkdir(parents=True)
    (folder / "spice" / "lib" / f"{caption.JAR}-models.jar").touch()
    monkeypatch.setattr(caption, "_PROGRAMS", folder)
    answers = [{"image_id": index, "scores": {"All": {"f": value}}} for index, value in enumerate(scores)]
    copy = f"open({str(folder / 'asked')!r}, 'w').write(open(sys.argv[4]).read())"
    answer = f"open(sys.argv[sys.argv.index('-out') + 1], 'w').write({json.dumps(answers)!r})"
    java_that(monkeypatch, folder, f"import sys\n{copy}\n{answer}\n")


def test_spice_is_the_mean_over_images(monkeypatch, tmp_path):
    spice_that_says(monkeypatch, tmp_path, [0.5, 0.1])
    assert score(["A dog.", ""], [["a dog", "dogs"], ["a cat"]]).scores["SPICE"] == pytest.approx(30)
    asked = json.loads((tmp_path / "asked").read_text())
    assert asked == [{"image_id": 0, "test": "a dog", "refs": ["a dog", "dogs"]}, {"image_id": 1, "test": "", "refs": ["a cat"]}]


def test_a_spice_that_is_no_number_is_named(monkeypatch, tmp_path):
    spice_that_says(monkeypatch, tmp_path, [float("nan"), 0.1])
    assert "no number" in score(["a dog", ""], [["a dog"], ["a cat"]]).not_computed["SPICE"]


@pytest.mark.skipif(shutil.which("java") is None, reason="no Java")
def test_what_java_computes(capfd):
    found = score(ODD + LIKE_PTB, [[text] for text in ODD + LIKE_PTB])
    assert found.tokenizer == "PTB" and found.scores.keys() >= WITHOUT_JAVA | {"METEOR"}
    assert found.scores["METEOR"] == pytest.approx(100) == found.scores["ROUGE_L"]  # no text took the place of another
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(shutil.which("java") is None, reason="no Java")
def test_words_are_split_as_ptb_does(monkeypatch):
    words, tokenizer = caption._tokenize([" ".join(text.split()) for text in LIKE_PTB])
    assert tokenizer == "PTB" and list(words) == list(map(split_words, LIKE_PTB))
    found = score(["a dog", ""], [["a dog"], ["a cat"]], slow=False)
    assert found.tokenizer == "PTB" and found.scores.keys() == WITHOUT_JAVA and not found.not_computed


def test_words_by_hand():
    assert split_words("The \"dog's\" bowl, (3.5 l) isn't empty!") == "the dog 's bowl -lrb- 3.5 l -rrb- is n't empty"


@pytest.mark.parametrize(
    ("predictions", "references"),
    [({}, {}), ({1: "a"}, {}), ({1: "a"}, {2: ["a"]}), ({1: "a"}, {1: ["a"], 2: ["a"]}), ({1: "a"}, {1: []})],
)
def test_every_image_needs_a_prediction_and_references(predictions, references):
    with pytest.raises(ValueError, match="a prediction and references for each image"):
        caption_scores(predictions, references)
