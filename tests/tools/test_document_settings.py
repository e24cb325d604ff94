"""The page of settings: generated from the configs, complete, and up to date."""

from configs.schema import Config
from tasks.registry import TASKS
from tools.document_settings import PAGE, page


def test_the_page_is_what_the_configs_say():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tools/document_settings.py"


def test_every_key_of_every_task_is_on_it():
    text = page()
    keys = set(Config.model_fields).union(*(task.config_class.model_fields for task in TASKS.values()))
    assert [key for key in keys if f"| `{key}` |" not in text] == []
    assert "| required |" not in text.split("## Keys of `augment`")[0] and "| `p` | `0.5` | number |" in text
