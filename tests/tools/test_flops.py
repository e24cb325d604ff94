"""The cost of the published models, and the tool that counts it from a config alone."""

import json
import sys
from pathlib import Path

import pytest
import torch

from configs.schema import NlvrConfig
from engine.flop_table import analyse, flop_table
from madtp.blocks import Guidance
from madtp.rule import OFF, PruneSetting
from madtp.sparsity.layers import sparse_weights
from models.blip_vqa import ANSWER_TOKENS
from models.build import learnable_tokens
from models.momentum import MomentumModel
from tasks.caption import END
from tasks.registry import TASKS, load_any_config
from tasks.retrieval import CLIP_VOCABULARY
from tasks.task import BERT_VOCABULARY
from tools import flops
from utils import UserError

REFERENCE = {
    "nlvr": 132.5407,
    "retrieval_coco": 153.2425,
    "retrieval_flickr": 153.2425,
    "retrieval_coco_clip": 395.7007,
    "retrieval_flickr_clip": 395.7007,
    "caption_coco": 65.7196,
    "vqa": 186.1213,
}


@pytest.mark.parametrize("name", REFERENCE)
def test_the_papers_models_cost_what_the_paper_says(name):
    config = load_any_config(f"configs/{name}.yaml", {"p": 0})
    with torch.device("meta"):  # counting needs no weights
        model, _ = TASKS[config.task].reference_case(config)
    gflops = model.reference_gflops(*([config.max_text_tokens] if config.task.startswith("retrieval") else []))
    assert round(gflops, 4) == REFERENCE[name]


BLIP = """
tokenizer: none
image_size: 32
vit: {patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}
bert: {hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 32}
"""
CLIP = """
image_size: 32
clip:
  {patch_size: 8, vision_width: 24, vision_layers: 2, vision_heads: 2, text_width: 16, text_layers: 2, text_heads: 2, embed_dim: 8}
"""
PRUNED = """
keep: instance
sd_num: 5
sd_dim: 24
"""
QUEUE = "queue_size: 6\n"
TINY = {
    "nlvr": f"task: nlvr{BLIP}{PRUNED}",
    "retrieval": f"task: retrieval{BLIP}{PRUNED}{QUEUE}embed_dim: 8\n",
    "retrieval_clip": f"task: retrieval_clip{CLIP}{PRUNED}{QUEUE}",
    "caption": f"task: caption{BLIP}{PRUNED}",
    "vqa": f"task: vqa{BLIP}{PRUNED}",
}
EACH_TASK = pytest.mark.parametrize("task", TINY)
SIGLIP = TINY["retrieval_clip"].replace("{patch_size", "{family: siglip, vocab_size: 90, vision_hidden: 40, patch_size")
SIGLIP = SIGLIP.replace("embed_dim: 8", "context_length: 20, embed_dim: 24") + "max_text_tokens: 20\n"


@pytest.fixture
def report(monkeypatch, capsys, tmp_path):
    """Runs the tool on a config with these words of a command line; gives the JSON it prints."""

    def run(text: str, *words: str) -> dict:
        (tmp_path / "tiny.yaml").write_text(text)
        monkeypatch.setattr(sys, "argv", ["flops.py", "--config", str(tmp_path / "tiny.yaml"), "--json", *words])
        flops.main()
        return json.loads(capsys.readouterr().out)

    return run


@EACH_TASK
@pytest.mark.parametrize("temperature", [None, "5"])
def test_the_tool_reports_both_counts(report, task, temperature):
    found = report(TINY[task], *(("--temperature", temperature) if temperature else ()))
    gflops = found["gflops"]
    padded = task == "vqa" and temperature  # its 32 questions keep unequal numbers of tokens, and fvcore counts the padding
    assert gflops["fvcore"] == pytest.approx(gflops["closed_form"], rel=0.01 if padded else 1e-9)
    assert sum(found["by_module"].values()) == pytest.approx(gflops["closed_form"])
    assert 0 < gflops["deployment"] < gflops["closed_form"] or not task.startswith("retrieval")
    assert found["temperature"] == (temperature and float(temperature))


@pytest.mark.parametrize("temperature", [None, "5"])
def test_a_siglip_is_counted_without_its_tokenizer(report, temperature):
    gflops = report(SIGLIP, *(("--temperature", temperature) if temperature else ()))["gflops"]
    assert gflops["fvcore"] == pytest.approx(gflops["closed_form"], rel=1e-9)


@pytest.mark.parametrize("inference", ["rank", "generate"])
def test_deployment_is_what_an_evaluation_would_count(report, inference, tmp_path):
    """Counts the longest possible caption, and a question with its answer."""
    text = TINY["caption"] + "max_length: 9\nnum_beams: 2\n"
    model, (images, *_) = TASKS["caption"].reference_case(load_any_config(written(tmp_path, text), {"p": 0}))
    longest = torch.full((1, 9), END + 1)
    expected = model.eval().generation_gflops(model.encode(images)[2], longest, 2)
    found = report(text)["gflops"]
    assert found["deployment"] == pytest.approx(float(expected)) and found["deployment"] != found["closed_form"]

    text = TINY["vqa"] + f"k_test: 7\ninference: {inference}\n"
    model, inputs = TASKS["vqa"].reference_case(load_any_config(written(tmp_path, text), {"p": 0}))
    question = model.eval().encode(inputs[0], *(part[:1] for part in inputs[1:3]))
    found, read = report(text)["gflops"], float(model.encoding_gflops(question))
    tokens = torch.full((1, 7), ANSWER_TOKENS)
    if inference == "rank":
        assert found["deployment"] == pytest.approx(read + float(model.ranking_gflops(question.valid.sum(dim=1), tokens)))
    assert read < found["deployment"] < found["closed_form"]


def test_what_a_checkpoint_calls_masked_is_counted_as_sparse_and_no_more(report, tmp_path):
    sparse = TINY["nlvr"] + 'sparsity_type: "2:4"\n'
    config = load_any_config(written(tmp_path, sparse), {"p": 0.5})
    torch.manual_seed(config.seed)  # as the tool does, so its picture is the same
    model, inputs = TASKS["nlvr"].reference_case(config)
    names = list(sparse_weights(model, config.pattern, config.sparse_layers).weights)
    found = {}
    for masked in ((), names[:3], names):
        torch.save({"model": model.state_dict(), "masked": list(masked)}, tmp_path / "x.pth")
        said = report(sparse, "--pretrained", str(tmp_path / "x.pth"), "--temperature", "1e9")
        found[len(masked)] = said["gflops"]["closed_form"]
    assert found[0] > found[3] > found[len(names)]
    assert found[0] == flops.total(model.eval(), inputs, PruneSetting(1e9))


def test_small_untrained_learnable_tokens_prune_gently_from_the_first_block_on(report):
    """They say little of where tokens differ, so the temperature has to be high: otherwise only late blocks would prune."""
    found = report(TINY["nlvr"].replace("image_size: 32", "image_size: 128") + "sd_init_std: 0.001\n", "--p", "0.25")
    assert found["prune_from"] == 0 and found["temperature"] > 1e4


def test_learnable_tokens_start_as_the_paper_or_the_published_code_has_them():
    for settings, std in (({}, 0.02), ({"variant": "released"}, 1.0), ({"variant": "released", "sd_init_std": 5}, 5.0)):
        assert learnable_tokens(NlvrConfig(**settings)) == (100, 768, std)


def written(folder: Path, text: str) -> Path:
    (folder / "x.yaml").write_text(text)
    return folder / "x.yaml"


@torch.no_grad()
@pytest.mark.parametrize(
    ("task", "setting"), [(task, OFF) for task in TINY] + [(task, PruneSetting(4.0)) for task in TINY if task != "vqa"]
)
@pytest.mark.parametrize("every", [1, 3], ids=["all layers", "some layers"])
def test_the_meter_counts_what_fvcore_does_with_sparse_layers_halved(task, setting, every, tmp_path):
    """Momentum encoders share the masks of those that they follow. VQA's input is a batch, whose padding fvcore counts."""
    (tmp_path / "tiny.yaml").write_text(TINY[task])
    model, inputs = TASKS[task].reference_case(load_any_config(tmp_path / "tiny.yaml", {"p": 0.5}))
    model.eval()
    counted = analyse(model, inputs, Guidance(setting)).by_module_and_operator()
    sparse = sparse_weights(model, (2, 4), "all")
    names = chosen = list(sparse.weights)[::every]
    if isinstance(model, MomentumModel):
        names = names + [f"{name.split('.')[0]}_m.{name.partition('.')[2]}" for name in names]
    halves = 0
    for name in names:
        owner, _, kind = f"model.{name}".rpartition(".")
        halves += counted[owner]["linear"] / 2
        if kind == "in_proj_weight":  # a weight of the attention itself, beside its layer out_proj
            halves -= counted[f"{owner}.out_proj"]["linear"] / 2
    dense = flops.total(model, inputs, setting)
    with sparse.counted(chosen):
        assert flops.total(model, inputs, setting) == pytest.approx(dense - halves / 1e9, rel=1e-9)
    assert halves > 0 and (setting == OFF or dense < flops.total(model, inputs, OFF))
    sparse.select(chosen)
    if setting == OFF:  # masked scores prune other tokens
        assert flops.total(model, inputs, setting) == pytest.approx(dense - halves / 1e9, rel=1e-9)


def test_a_run_goes_on_without_a_table_where_fvcore_does_not_import(monkeypatch):
    monkeypatch.setitem(sys.modules, "fvcore.nn", None)
    assert flop_table(torch.nn.Identity(), ()).startswith("no table: import of fvcore.nn halted")


@EACH_TASK
def test_the_tool_counts_the_parameters_of_the_model(report, task, tmp_path):
    found = report(TINY[task])
    config = load_any_config(tmp_path / "tiny.yaml", {"p": 0})
    assert found["params"] == sum(p.numel() for p in TASKS[task].reference_case(config)[0].parameters() if p.requires_grad)


@pytest.mark.parametrize("task", ["nlvr", "retrieval", "retrieval_clip"])  # those without a head that dwarfs so small encoders
def test_the_tool_finds_the_temperature_for_a_share(report, task):
    dense, pruned = report(TINY[task]), report(TINY[task], "--p", "0.35")
    assert pruned["gflops"]["closed_form"] == pytest.approx(0.65 * dense["gflops"]["closed_form"], rel=0.05)
    with pytest.raises(UserError, match="--p 0.99 is out of reach: these weights allow"):
        report(TINY[task], "--p", "0.99")


def test_p_is_what_tokens_and_sparse_weights_remove_together(report):
    sparse = TINY["nlvr"] + 'sparsity_type: "2:4"\n'
    dense, both = report(TINY["nlvr"])["gflops"]["closed_form"], report(sparse, "--p", "0.5")
    assert both["gflops"]["closed_form"] == pytest.approx(0.5 * dense, rel=0.05) and both["temperature"] > 0
    weights = report(sparse, "--p", "0.1")
    assert weights["temperature"] is None and 0.6 * dense < weights["gflops"]["closed_form"] < 0.9 * dense


@pytest.mark.parametrize("task", ["retrieval", "retrieval_clip"])
def test_the_vocabulary_is_the_tokenizers(report, task, tmp_path):
    words = "[PAD] [UNK] [CLS] [SEP] [MASK]".split() + [f"word{i}" for i in range(45)]
    (tmp_path / "words.txt").write_text("\n".join(words))
    text = TINY[task].replace("tokenizer: none\n", "")
    large, small = (report(f"{text}tokenizer: {source}\n") for source in ("clip", tmp_path / "words.txt"))
    published = CLIP_VOCABULARY if task == "retrieval_clip" else BERT_VOCABULARY
    assert large["params"] - small["params"] == 16 * (published - len(words) - 2)  # the momentum copy does not count
    assert large["gflops"] == small["gflops"]


def test_a_config_that_names_no_task_needs_one(report):
    text = TINY["nlvr"].replace("task: nlvr\n", "")
    with pytest.raises(UserError, match="its key 'task' is None; set it, or --task, to one of nlvr, "):
        report(text)
    assert report(text, "--task", "nlvr") == report(TINY["nlvr"])
