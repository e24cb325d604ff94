"""The closed form against fvcore's counts of the authors' published code: at the real sizes and at those of the golden cases."""

import json

import pytest
import torch

from madtp.blocks import Guidance, TowerRecord
from madtp.flops import GIGA
from tasks.registry import TASKS, load_any_config
from tests import golden
from tests.clip.test_golden import image_tower
from tests.models.test_decoder_golden import caption_of, vqa_of
from tests.models.test_nlvr_golden import RELEASED, nlvr_of, setting, vit_of
from tests.models.test_retrieval_golden import config_of, model_of

# Entry of flops.json without its batch -> the config of that model.
REAL = {"nlvr": "nlvr", "caption": "caption_coco", "vqa": "vqa", "retrieval": "retrieval_coco", "clip": "retrieval_coco_clip"}


def counts(path) -> dict[str, int]:
    """The total of each case by the words in front of its parenthesis."""
    return {name.split(" (")[0]: entry["total"] for name, entry in json.loads(path.read_text())["cases"].items()}


def beyond_fvcore(record: TowerRecord, learnable: torch.Tensor, width: int, mapped: bool = False) -> int:
    """What the closed form counts of pruning and fvcore's trace of their code does not.

    That is theta, and the kept tokens in the merge; of a block that in the end prunes nothing also the products with the learnable
    tokens (and the map before them), which no output of the trace depends on.
    """
    total, (number, token_dim) = 0, learnable.shape
    for entering, leaving, kept in zip(record.entering, record.leaving, record.kept, strict=True):
        if kept is not None:
            tokens = entering - 1
            total += int((number * tokens + width * kept.sum(dim=1)).sum())
            if torch.equal(entering, leaving):
                total += int((tokens * token_dim * (number + width * mapped)).sum())
    return total


@pytest.mark.parametrize("path", golden.cases("flops"))
def test_the_real_models_cost_what_the_authors_code_costs(path):
    """Of retrieval a pair: each further one of its batch adds four products of features."""
    for name, entry in json.loads(path.read_text()).items():
        if name.startswith("_"):
            continue
        config = load_any_config(f"configs/{REAL[name.split('_')[0]]}.yaml", {"p": 0})
        with torch.device("meta"):
            model, _ = TASKS[config.task].reference_case(config)
        expected, lengths = entry["total"] / entry["batch"], []
        if config.task.startswith("retrieval"):
            lengths = [config.max_text_tokens]
            expected -= 4 * len(model.image_queue) * (entry["batch"] - 1)
        assert round(model.reference_gflops(*lengths) * GIGA) == expected, name


@pytest.mark.parametrize("path", golden.cases("flops_tiny"))
@torch.no_grad()
def test_pruned_image_towers_cost_what_the_authors_code_costs(path):
    info, t = golden.load(path.with_name("vit.json"))
    vit, learnable = vit_of(t, info["config"], RELEASED), t["space_dict"]
    for temperature in info["config"]["temperatures"]:
        _, _, record = vit(t["image"], Guidance(setting(temperature), learnable_tokens=learnable))
        expected = counts(path)[f"vit T{temperature}"] + beyond_fvcore(record, learnable, vit.embed_dim)
        assert int(vit.flops(record).sum()) == expected
    info, t = golden.load(path.with_name("clip_image.json"))
    tower, learnable = image_tower(info["config"], t), t["space_dict"]
    for temperature in info["config"]["temperatures"]:
        encoded = tower(t["image"], Guidance(setting(temperature), learnable_tokens=learnable))
        more = beyond_fvcore(encoded.record, learnable, info["config"]["width"], mapped=True)
        assert int(tower.flops(encoded).sum()) == counts(path)[f"clip_image T{temperature}"] + more


@pytest.mark.parametrize("path", golden.cases("flops_tiny"))
@pytest.mark.parametrize("case", ["nlvr", "nlvr_merge", "nlvr_padorder"])
@torch.no_grad()
def test_pruned_pairs_of_images_cost_what_the_authors_code_costs(path, case):
    """Sentences of one length: theirs counts padding."""
    info, t = golden.load(path.with_name(f"{case}.json"))
    model, learnable = nlvr_of(t, info["config"]), t["w.space_dict"]
    images = torch.stack(t["images"].chunk(2), dim=1)
    for temperature in info["config"]["temperatures"]:
        output = model(images, t["nopad.input_ids"], t["nopad.attention_mask"], Guidance(setting(temperature)))
        widths = (output.vision, model.visual_encoder.embed_dim), (output.language, model.text_encoder.hidden_size)
        more = sum(beyond_fvcore(record, learnable, width) for record, width in widths)
        assert round(float(model.gflops(output).sum()) * GIGA) == counts(path)[f"{case} nopad T{temperature}"] + more


@pytest.mark.parametrize("path", golden.cases("flops_tiny"))
@torch.no_grad()
def test_unpruned_models_with_decoders_and_pairs_cost_what_the_authors_code_costs(path, tmp_path):
    whole = torch.ones_like  # of padding too, as they count
    info, t = golden.load(source := path.with_name("caption.json"))
    caption = caption_of(info, t, source).costs(t["image"], t["input_ids"], whole(t["attention_mask"]))
    info, t = golden.load(source := path.with_name("vqa.json"))
    question = t["image"], t["question_input_ids"], whole(t["question_attention_mask"])
    vqa = vqa_of(info, t, source).costs(*question, t["answer_input_ids"], whole(t["answer_attention_mask"]), t["n"].long())
    info, t = golden.load(path.with_name("retrieval.json"))
    model = model_of(config_of(info, tmp_path / "vocab.txt"), golden.published_weights(t))
    retrieval = model.costs(t["images"], t["input_ids"], whole(t["attention_mask"]))
    pairs = len(t["images"])
    in_batch = 4 * len(model.image_queue) * pairs * (pairs - 1)  # ours is that of a pair alone
    for name, (by_module, _), more in (("caption", caption, 0), ("vqa", vqa, 0), ("retrieval", retrieval, in_batch)):
        assert round(float(sum(by_module.values()).sum()) * GIGA) + more == counts(path)[f"{name} T0"], name
