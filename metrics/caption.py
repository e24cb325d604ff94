"""Captioning metrics, in percent, computed by pycocoevalcap.

Its tokenizer (PTB), METEOR and SPICE are Java programs, and SPICE needs a download. A metric that cannot be computed is reported
with the reason, and the others are computed all the same. Without Java, captions are split into words by `split_words`.
"""

import json
import math
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

import pycocoevalcap
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.spice.get_stanford_models import JAR, SPICELIB
from pycocoevalcap.spice.spice import SPICE_JAR
from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR

ORDERS = 4  # largest n-gram of BLEU

_PROGRAMS = Path(pycocoevalcap.__path__[0])
_CLITIC = re.compile(r"(n't|'(?:s|m|d|ll|re|ve))\b")
# A contraction, a word with inner signs (and/or, o'clock, 1,000.5, 12:30), or a single sign.
_WORD = re.compile(r"n't|'(?:s|m|d|ll|re|ve)\b|\w+(?:(?:[-/']|(?<=\d)[.,:](?=\d))\w+)*|[^\w\s]")
_PLAIN_QUOTES = str.maketrans("‘’“”", "''\"\"")
_REMOVED = {*PUNCTUATIONS, '"', "…", "–", "—"}
_BRACKETS = dict(zip("()[]{}", "-lrb- -rrb- -lsb- -rsb- -lcb- -rcb-".split(), strict=True))

Texts = dict[int, list[str]]  # tokenised texts by image: words joined by spaces


class CaptionScores(NamedTuple):
    """The scores of captions.

    scores: metric -> percent. CIDEr is scaled in the same way: 1.33 is given as 133, as in papers.
    not_computed: metric -> the reason
    tokenizer: PTB, or "words" without Java. Scores with "words" differ slightly from published ones.
    """

    scores: dict[str, float]
    not_computed: dict[str, str]
    tokenizer: Literal["PTB", "words"]


class _NotComputed(Exception):
    """A metric cannot be computed; the message is the reason, in one line."""


def caption_scores(
    predictions: Mapping[int | str, str], references: Mapping[int | str, Sequence[str]], slow: bool = True
) -> CaptionScores:
    """Computes Bleu_1 to Bleu_4, METEOR, ROUGE_L, CIDEr and SPICE of one caption per image.

    Args:
        predictions: image id -> caption.
        references: image id -> reference captions.
        slow: also compute METEOR, which takes ten seconds to start, and SPICE, which takes minutes.

    Raises:
        ValueError: when there is no image, or an image has no prediction or no reference.
    """
    if not predictions or predictions.keys() != references.keys() or not all(references.values()):
        raise ValueError("scoring needs at least one image, and a prediction and references for each image")
    texts = [[predictions[image], *references[image]] for image in predictions]
    words, tokenizer = _tokenize([" ".join(text.split()) for image in texts for text in image])
    split = [[next(words) for _ in image] for image in texts]
    said = {index: image[:1] for index, image in enumerate(split)}
    truth = {index: image[1:] for index, image in enumerate(split)}

    scores = {f"Bleu_{n}": value for n, value in enumerate(Bleu(ORDERS).compute_score(truth, said, verbose=0)[0], 1)}
    not_computed = {}
    for name, (score, is_slow) in _SCORERS.items():
        if slow or not is_slow:
            try:
                scores[name] = score(truth, said)
            except _NotComputed as reason:
                not_computed[name] = str(reason)
    return CaptionScores({name: 100 * float(value) for name, value in scores.items()}, not_computed, tokenizer)


def _tokenize(texts: list[str]) -> tuple[Iterator[str], Literal["PTB", "words"]]:
    """Tokenises texts. Returns an iterator of the words of each text, joined by spaces, and the tokenizer's name."""
    try:
        lines = _java(
            "tokenizer",
            *("-cp", STANFORD_CORENLP_3_4_1_JAR, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"),
            text="".join(f"{text}\n" for text in texts),
        ).splitlines()
        if len(lines) == len(texts):
            return (_kept(line.split()) for line in lines), "PTB"
    except _NotComputed:
        pass
    return map(split_words, texts), "words"


def split_words(text: str) -> str:
    """Tokenises a text: lower case, no punctuation, contractions split (do n't).

    The result is that of PTB, except for abbreviations and rare cases.
    """
    text = _CLITIC.sub(r" \1", text.lower().translate(_PLAIN_QUOTES))
    return _kept(_BRACKETS.get(word, word) for word in _WORD.findall(text))


def _kept(words: Iterable[str]) -> str:
    """Joins words without punctuation.

    Brackets stay, as in the official evaluation: its punctuation list has them in upper case (-LRB-), but the words are
    already in lower case.
    """
    return " ".join(word for word in words if word not in _REMOVED)


def _rouge(truth: Texts, said: Texts) -> float:
    return Rouge().compute_score(truth, said)[0]


def _cider(truth: Texts, said: Texts) -> float:
    if not any(text for texts in truth.values() for text in texts):
        raise _NotComputed("no reference has a word in it")
    return Cider().compute_score(truth, said)[0]


def _meteor(truth: Texts, said: Texts) -> float:
    _java("meteor", "-version")  # raises a clear error if Java is missing or broken; Meteor() would not
    meteor = Meteor()
    try:
        return meteor.compute_score(truth, said)[0]
    except (OSError, ValueError):  # the Java process ended before it answered
        raise _NotComputed("its Java program failed; it needs 2 GB of memory") from None
    finally:  # its destructor would wait for the lock, which a failure leaves held, and complain about the pipes
        meteor.meteor_p.kill()
        meteor.meteor_p.wait()
        for pipe in (meteor.meteor_p.stdin, meteor.meteor_p.stdout, meteor.meteor_p.stderr):
            with suppress(OSError):
                pipe.close()
        if meteor.lock.locked():
            meteor.lock.release()


def _spice(truth: Texts, said: Texts) -> float:
    """Runs SPICE's program in a temporary folder. pycocoevalcap's wrapper would download files and write into the package."""
    _check_spice_models()
    with TemporaryDirectory() as folder:
        asked, answered = Path(folder, "asked.json"), Path(folder, "answered.json")
        entries = [{"image_id": index, "test": said[index][0], "refs": truth[index]} for index in truth]
        asked.write_text(json.dumps(entries), encoding="utf-8")
        files = ["-cache", str(Path(folder, "cache")), "-out", str(answered)]
        Path(folder, "cache").mkdir()
        _java("spice", "-jar", "-Xmx8G", SPICE_JAR, str(asked), *files, "-subset", "-silent")
        values = [entry["scores"]["All"]["f"] for entry in json.loads(answered.read_text(encoding="utf-8"))]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise _NotComputed("its Java program gave no number for some image")
    return sum(values) / len(values)


def _check_spice_models() -> None:
    if not (_PROGRAMS / "spice" / SPICELIB / f"{JAR}-models.jar").exists():
        raise _NotComputed("needs Stanford's models: fetch them once with python -m pycocoevalcap.spice.get_stanford_models")


def not_computable() -> dict[str, str]:
    """Returns what cannot be computed on this machine, of PTB (the tokenizer), METEOR and SPICE, each with the reason.

    Asks Java for its version, and scores nothing.
    """
    try:
        _java("meteor", "-version")
    except _NotComputed as reason:
        return dict.fromkeys(("PTB", "METEOR", "SPICE"), str(reason))
    try:
        _check_spice_models()
    except _NotComputed as reason:
        return {"SPICE": str(reason)}
    return {}


def _java(program: str, *arguments: str, text: str = "") -> str:
    """Runs Java in the folder of one of pycocoevalcap's programs, with `text` on its input. Returns its output.

    Raises:
        _NotComputed: when Java is missing or fails.
    """
    try:
        done = subprocess.run(
            ["java", *arguments], cwd=_PROGRAMS / program, input=text.encode("utf-8", "replace"), capture_output=True, check=False
        )
    except OSError:
        raise _NotComputed("needs Java, which is not on the PATH") from None
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").splitlines() or ["no message"]
        raise _NotComputed(f"its Java program failed ({said[0]}); it is made for Java 8")
    return done.stdout.decode("utf-8")


_SCORERS = {"METEOR": (_meteor, True), "ROUGE_L": (_rouge, False), "CIDEr": (_cider, False), "SPICE": (_spice, True)}
