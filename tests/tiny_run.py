"""The files of a run of any task: config and checkpoint of a tiny model with lively weights, test data, a result."""

import json
from pathlib import Path

import torch
from PIL import Image

from tasks.registry import TASKS, build_model, load_any_config
from tests import tiny

SAMPLES = 4
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "star", "and")
SENTENCES = ["a red star" + " and a red star" * (index % 3) for index in range(SAMPLES)]
TEMPERATURE = 3.0

VIT = "vit: {patch_size: 8, embed_dim: 20, depth: 3, num_heads: 2}\n"
BERT = (
    "bert: {hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 32, max_position_embeddings: 24,"
    " dropout: 0}\n"
)
CLIP = (
    "clip: {patch_size: 8, vision_width: 20, vision_layers: 3, vision_heads: 2, text_width: 16, text_layers: 2, text_heads: 2,"
    " context_length: 24, embed_dim: 12}\n"
)
PAIRS = "dataset: flickr\nqueue_size: 8\nk_test: 3\nmax_text_tokens: 24\n"
VQA = "vqa_root: {folder}\nvg_root: {folder}\ntrain_files: vqa_train\nval_file: vqa_val\nk_test: 2\n"
MODELS = {
    "nlvr": VIT + BERT,
    "retrieval": VIT + BERT + PAIRS,
    "retrieval_clip": CLIP + PAIRS,
    "caption": VIT + BERT + "prompt: 'a '\nmax_length: 8\nmax_text_tokens: 24\n",
    "vqa": VIT + BERT + VQA,
}


def write_run(folder: Path, task: str, p: float = 0.4) -> Path:
    """The folder of a run at p, uncompressed if that is 0; its data lie in it: pictures of 16 patches, texts of three lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder)
    rule = {"method": "dtp", "variant": "paper", "keep": "instance", "p": p, "batch_size": 3}
    weights, setting = folder / "checkpoint_best.pth", {"temperature": TEMPERATURE if p else None, "prune_from": 1}
    (folder / "config.yaml").write_text(
        f"task: {task}\nimage_root: {folder}\nann_root: {folder}\ntokenizer: {folder}/vocab.txt\noutput_dir: {folder}\n"
        f"pretrained: {weights}\nevaluate: {not p}\np: {p}\nimage_size: 32\nkeep: instance\nsd_num: 5\nsd_dim: 24\n"
        f"batch_size_test: 3\ndevice: cpu\n{MODELS[task].replace('{folder}', str(folder))}"
    )
    model = tiny.with_lively_weights(build_model(load_any_config(folder / "config.yaml"))[0])
    torch.save({"model": model.state_dict(), **setting, **rule}, weights)
    return folder


def result_of(task: str, p: float, sparsity_type: str = "") -> dict:
    """result.json of a run that reached p to the letter. Uncompressed, a sample costs 2 GFLOPs, in deployment 1 but for NLVR2.

    Sparse weights alone save 40 %.
    """
    gflops = {name: 2 - 2 * p for name in ("target", "measured", "val", "test", "deployment")}
    if task != "nlvr":
        gflops["deployment"] = 1 - 0.6 * p
    names = [name for column in TASKS[task].columns.values() for name in column]
    metrics = {
        split: {name: start + place for place, name in enumerate(names)} for split, start in (("val", 80.0), ("test", 81.25))
    }
    return {
        "task": task, "method": "dtp" if p else "none", "variant": "paper", "keep": "instance", "reduce_ratio": p,
        "sparsity_type": sparsity_type,
        "temperature": 6.37 if p else None, "prune_from": 1 if p else 0, "epoch": 3, "seed": 42,
        "gflops": {"uncompressed": 2.0, "reference": 2.5, "tokens": 2 - p, "weights": 1.2 if sparsity_type else 2.0, **gflops},
        "params": {"total": 1_500_000, "nonzero": 1_500_000}, "metrics": metrics,
    }  # fmt: skip


def log_of(result: dict, epochs: int) -> list[dict]:
    """log.txt of such a run."""
    return [{"epoch": epoch, "temperature": 6.0 + epoch, "gflops": result["gflops"]} for epoch in range(epochs)]


def write_data(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for index in range(SAMPLES):
        for side in "ab":
            noise = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8).numpy()
            Image.fromarray(noise).save(folder / f"{index}{side}.jpg", format="PNG")
    pairs = [
        {"sentence": sentence, "label": "True", "images": [f"{index}a.jpg", f"{index}b.jpg"]}
        for index, sentence in enumerate(SENTENCES)
    ]
    for split in ("train", "dev", "test"):
        (folder / f"nlvr_{split}.json").write_text(json.dumps(pairs))
    captioned = [{"image": f"{index}a.jpg", "caption": [first, "a star"]} for index, first in enumerate(SENTENCES)]
    for name in ("flickr30k_test", "coco_karpathy_test"):
        (folder / f"{name}.json").write_text(json.dumps(captioned))
    asked = [
        {"question_id": index, "question": sentence, "answer": ["red"] * 10, "image": f"{index}a.jpg", "dataset": "vqa"}
        for index, sentence in enumerate(SENTENCES)
    ]
    for name in ("vqa_train", "vqa_val", "vqa_test"):
        (folder / f"{name}.json").write_text(json.dumps(asked))
    (folder / "answer_list.json").write_text(json.dumps(["red", "star", "a red star"]))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
