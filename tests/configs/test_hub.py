"""Models by their name on the Hub: found in its local cache, with one line where they are not."""

from pathlib import Path

import huggingface_hub
import pytest

from configs.folder import with_folder_keys
from configs.hub import from_hub, is_name
from tests.tools.test_compress import clip_folder
from utils import UserError

NAME = "somebody/clip-of-theirs"


@pytest.fixture
def cached(tmp_path, monkeypatch) -> Path:
    """The folder of a small CLIP in a local cache, as the Hub's library lays it out."""
    cache = tmp_path / "hub"
    model = cache / "models--somebody--clip-of-theirs"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    folder = clip_folder(model / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub._snapshot_download.HF_HUB_CACHE", str(cache), raising=False)
    return folder


@pytest.fixture
def offline(monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_a_name_is_told_from_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained").mkdir()
    assert is_name(NAME) and not any(map(is_name, ("pretrained/clip", "weights/clip.pth", "clip", "a/b/c", "/a/b", "~/clip", "")))


def test_a_model_in_the_cache_is_taken_from_there(cached, offline):
    assert from_hub(NAME, "pretrained") == cached
    with pytest.raises(UserError, match=f"{cached}/config.json: text_config.eos_token_id"):  # it is read, and is none for this task
        with_folder_keys("retrieval_clip", {"pretrained": NAME})


def test_a_model_that_is_nowhere_gets_one_line(tmp_path, cached, offline):
    with pytest.raises(UserError, match="pretrained: somebody/else is no file or folder here, and the Hub did not give") as error:
        with_folder_keys("retrieval_clip", {"pretrained": "somebody/else"})
    assert "\n" not in str(error.value)
