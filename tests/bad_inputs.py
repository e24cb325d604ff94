"""Bad inputs: how to break the files or settings of a tiny run, the words of the one line that answers, and what to do.

docs/troubleshooting.md is written from this table: PYTHONPATH=. python -m tests.bad_inputs
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from tests.folders import blip_folder, changed, clip_folder
from tests.spoil import (
    WEIGHTS,
    Break,
    cut,
    dense,
    entry,
    gone,
    of_another_task,
    open_clips,
    renamed,
    run_code,
    saved,
    siglip,
    weights,
    written,
    yaml,
)
from tests.tiny_run import write_run

PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
NUMBER = r"\b\d+[a-z]?\b"


class BadInput(NamedTuple):
    """A mistake of a user.

    task: of the run that is broken
    name: of the mistake, unique within its section
    said: words of the line that answers it
    todo: what to do, for docs/troubleshooting.md; where the line says it all, nothing
    flags: of the program, {folder} being the run's; later flags override earlier ones
    spoil: breaks the run's files
    program: the entry script of the task, where none is named
    """

    task: str
    name: str
    said: str
    todo: str = ""
    flags: str = ""
    spoil: Break = lambda folder: None
    program: str = ""


def write_world(folder: Path, task: str) -> Path:
    """Writes a run at p = 0.4 with all files of its data."""
    write_run(folder, task)
    for name in ("flickr30k", "coco_karpathy"):
        captioned = json.loads((folder / f"{name}_test.json").read_text())
        pairs = [{**entry, "caption": entry["caption"][0], "image_id": index} for index, entry in enumerate(captioned)]
        (folder / f"{name}_val.json").write_text(json.dumps(captioned))
        (folder / f"{name}_train.json").write_text(json.dumps(pairs))
    return folder


# The table

TRAIN = "--no-evaluate --output_dir {folder}/out "
CLIP_FILE = b'{"model_cfg": {"vision_cfg": {"pool_type": "avg"}, "text_cfg": {}}}'
CONVERT = (
    "Convert it to the format in [Data and weights](data.md): BLIP's files are in it, and `tools/import_data.py` converts most."
)
CONVERT_NONE = "Give the file that the authors of the data set publish, under its own name."
FETCH = "The download broke off or was not the file; fetch it again."

SETTINGS = [
    BadInput("nlvr", "no config", "No such file or directory; give the path of a YAML file with --config", "", "--config x.yaml"),
    BadInput("nlvr", "no YAML", "not valid YAML", "Correct the line that is named.", spoil=yaml("a: b: c")),
    BadInput("nlvr", "a list", "must hold `key: value` lines", spoil=written("config.yaml", [1])),
    BadInput(
        "nlvr",
        "unknown key",
        "unknown key",
        "Use the name that the line offers; all are in [Settings](settings.md).",
        "--set bach_size_train=3",
    ),
    BadInput("nlvr", "unknown nested key", "unknown key 'vit.dpth'; did you mean 'vit.depth'?", "", "--set vit.dpth=8"),
    BadInput("nlvr", "p of 1", "key 'p' must be below 1", "", "--p 1"),
    BadInput("nlvr", "p below 0", "key 'p' must be at least 0", "", "--p=-0.1"),
    BadInput("nlvr", "p that is no number", "key 'p'", "", "--p nan"),
    BadInput("nlvr", "p that is empty", "key 'p' must be a number, got None", flags="--set p="),
    BadInput("nlvr", "a word for a number", "key 'init_lr' must be a number", "", "--set init_lr=abc"),
    BadInput("nlvr", "a broken number of epochs", "key 'max_epoch' must be a whole number", "", "--epoch 1.5"),
    BadInput("nlvr", "neither true nor false", "key 'amp' must be true or false", "", "--set amp=perhaps"),
    BadInput("nlvr", "an unknown choice", "key 'keep' must be one of 'max', 'mean', 'instance'", "", "--set keep=most"),
    BadInput("nlvr", "an incomplete mapping", "key 'vit.embed_dim' is missing; add it", "", "--set vit={patch_size:\\ 8}"),
    BadInput(
        "nlvr", "a size that does not fit the patches", "image_size must be a multiple of the patch size", "", "--set image_size=30"
    ),
    BadInput("nlvr", "a first block that is not there", "prune_from must be below the number of blocks", "", "--set prune_from=12"),
    BadInput("nlvr", "heads that do not divide", "embed_dim must be a multiple of num_heads", "", "--set vit.num_heads=3"),
    BadInput("nlvr", "a setting without a value", "write it as --set key=value", "", "--set amp"),
    BadInput("nlvr", "a setting that is no YAML", "the value is not valid YAML; quote it", "", "--set keep=[1"),
    BadInput("nlvr", "a pattern without sparse weights", "belongs to --enable-sparse-api", "", "--weight-sparse-pattern 2:4"),
    BadInput("nlvr", "no pattern", "is no N:M pattern; write 2:4", "", "--set sparsity_type=4:2"),
    BadInput(
        "nlvr",
        "masks chosen twice",
        "order: adaptive chooses its masks once",
        "",
        "--set order=adaptive --set mask_schedule=refresh",
    ),
    BadInput("nlvr", "a device that is not known", "key 'device' must be cpu, cuda or cuda:N", "", "--device gpu"),
    BadInput(
        "nlvr",
        "a batch that is too large",
        "training samples do not fill a batch of 99",
        "Lower `batch_size_train`, or add data.",
        TRAIN + "--set batch_size_train=99",
    ),
    BadInput(
        "nlvr",
        "a ramp that does not end",
        "the ramp ends in epoch 3, but max_epoch is 1",
        "Raise `max_epoch` or lower `ramp_epochs`; the flag `--epoch` alone shortens the ramp.",
        TRAIN + "--set batch_size_train=2 --set max_epoch=1 --set ramp_epochs=3",
    ),
    BadInput(
        "nlvr",
        "p out of reach",
        "is out of reach",
        "Choose `p` in the range that the line names, or lower `prune_from`.",
        "--p 0.97",
    ),
    BadInput("nlvr", "a file for a folder", "give another folder with --output_dir", "", "--output_dir {folder}/vocab.txt"),
    BadInput(
        "nlvr",
        "a run over its own start",
        "would remove it; give another folder with --output_dir",
        "A new run replaces the checkpoints in its folder: write to another one.",
        "--no-evaluate --set batch_size_train=2 --set max_epoch=1",
    ),
    BadInput(
        "nlvr",
        "the folder of another run",
        "of another run; go on with that run by --resume",
        "A new run would replace the checkpoints in its folder, after `--overwrite` does.",
        "--no-evaluate --pretrained= --p 0 --set batch_size_train=2",
    ),
    BadInput(
        "nlvr",
        "the folder of another evaluation",
        "holds a result.json",
        "Results are kept unless `--overwrite` is given.",
        spoil=written("result.json", {}),
    ),
    BadInput(
        "nlvr",
        "a step of too many batches",
        "accumulate: 99 batches make a step",
        "",
        TRAIN + "--set batch_size_train=2 --pretrained= --p 0 --set accumulate=99",
    ),
    BadInput(
        "nlvr",
        "nothing to learn from",
        "there is no model to learn from",
        "",
        TRAIN + "--set batch_size_train=2 --pretrained= --set distill=true",
    ),
    BadInput(
        "nlvr",
        "a compressed teacher",
        "is compressed, and a teacher must not be",
        "Give the weights that the run started from as `teacher`.",
        TRAIN + "--set batch_size_train=2 --set distill=true",
    ),
    BadInput("nlvr", "nothing to resume", "no such checkpoint to resume from", "", TRAIN + "--set batch_size_train=2 --resume"),
    BadInput(
        "nlvr",
        "weights to resume",
        "holds weights, not a run to resume",
        "Resume from `checkpoint_last.pth`; `checkpoint_best.pth` is for `--pretrained`.",
        TRAIN + "--set batch_size_train=2 --resume {folder}/" + WEIGHTS,
    ),
    BadInput("caption", "two batch sizes", "batch_size is 4 and batch_size_test 3", "", "--set batch_size=4"),
    BadInput("caption", "no room behind the prompt", "max_length must be more than", "", "--set max_length=2"),
    BadInput(
        "retrieval",
        "a text longer than the encoder",
        "max_text_tokens must be at most bert.max_position_embeddings",
        "",
        "--set max_text_tokens=600",
    ),
    BadInput("retrieval", "an unknown data set", "key 'dataset' must be one of 'coco', 'flickr'", "", "--set dataset=vg"),
    BadInput("retrieval_clip", "the authors' CLIP", "the authors' CLIP reads another token", "", "--set variant=released"),
    BadInput(
        "retrieval_clip",
        "an activation without heads",
        "activation needs vision_heads and text_heads",
        "",
        "--set clip={activation:\\ gelu}",
    ),
]

CHECKPOINTS = [
    BadInput("nlvr", "missing", "no such checkpoint; set the key 'pretrained'", "", "--pretrained x.pth"),
    BadInput("nlvr", "a folder", "no such checkpoint", "", "--pretrained {folder}"),
    BadInput(
        "nlvr",
        "a pointer",
        "a Git LFS pointer",
        "Fetch the weights with `git lfs pull`.",
        spoil=written(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"),
    ),
    BadInput("nlvr", "a web page", "not a PyTorch checkpoint", FETCH, spoil=written(WEIGHTS, b"<!DOCTYPE html>")),
    BadInput("nlvr", "empty", "not a PyTorch checkpoint", spoil=written(WEIGHTS, b"")),
    BadInput("nlvr", "cut off", "is it cut off? Fetch it again", FETCH, spoil=cut(WEIGHTS, 0.6)),
    BadInput(
        "nlvr",
        "safetensors cut off",
        "is it cut off? Fetch it again",
        "",
        "--pretrained {folder}/x.safetensors",
        lambda folder: (save_file({"a": torch.ones(9)}, folder / "x.safetensors"), cut("x.safetensors", 0.9)(folder)),
    ),
    BadInput(
        "nlvr",
        "code",
        "it holds Python objects whose loading could run code",
        "Load it in the program that wrote it, and save the state dict alone.",
        spoil=run_code,
    ),
    BadInput("nlvr", "a list", "holds a list, not a state dict", spoil=saved([1])),
    BadInput("nlvr", "no weights", "its weights are not all tensors", "Save the model's state dict.", spoil=saved({"lr": 0.1})),
    BadInput(
        "nlvr",
        "not a number",
        "has values that are not finite numbers",
        "The training that wrote it diverged; take an earlier checkpoint.",
        spoil=weights(lambda model: model["cls_head.0.bias"].fill_(float("nan"))),
    ),
    BadInput(
        "nlvr",
        "another task",
        "is it a checkpoint of this kind of model?",
        "The weights are of another model: check the task.",
        spoil=of_another_task,
    ),
    BadInput(
        "nlvr",
        "unknown weights",
        "which this model does not have",
        "The weights are of another model: check `vit`, `bert` or `clip`.",
        spoil=weights(lambda model: model.update(x=torch.ones(1))),
    ),
    BadInput(
        "nlvr",
        "another size",
        "shapes do not fit",
        "Set the keys that the line names as in the run that wrote the weights; its `config.yaml` has them.",
        "--set sd_num=6",
    ),
    BadInput(
        "nlvr", "pruned weights at p 0", "it prunes tokens, and here p is 0", "Evaluate with the run's `config.yaml`.", "--p 0"
    ),
    BadInput(
        "nlvr",
        "no head",
        "so its answers would be random",
        "Weights of pretraining have no head: train before you evaluate.",
        spoil=weights(lambda model: [model.pop(name) for name in list(model) if "cls_head" in name]),
    ),
    BadInput(
        "retrieval_clip",
        "unknown activation",
        "does not show its activation and heads",
        "Put the config that is published with the weights beside them, or set the keys.",
        "--set tokenizer=clip --p 0 --pretrained {folder}/open_clip.pth",
        open_clips,
    ),
    BadInput(
        "retrieval_clip",
        "a CLIP of another kind",
        "is of a CLIP that this project does not have",
        "",
        "--set tokenizer=clip --p 0 --pretrained {folder}/open_clip.pth",
        lambda folder: (open_clips(folder), (folder / "open_clip_config.json").write_bytes(CLIP_FILE)),
    ),
    BadInput(
        "retrieval_clip",
        "a broken config beside them",
        "not a config of CLIP",
        "",
        "--set tokenizer=clip --p 0 --pretrained {folder}/open_clip.pth",
        lambda folder: (open_clips(folder), (folder / "open_clip_config.json").write_text("{}")),
    ),
    BadInput("nlvr", "a vocabulary that is not there", "set the key 'tokenizer' to BERT's vocab.txt", spoil=gone("vocab.txt")),
    BadInput(
        "nlvr",
        "another vocabulary",
        "has no [PAD]",
        "`tokenizer` is the `vocab.txt` of bert-base-uncased.",
        spoil=written("vocab.txt", b"a\nred\nstar\n"),
    ),
    BadInput("nlvr", "no vocabulary", "not a text file; set the key 'tokenizer'", spoil=written("vocab.txt", b"\xff\xfe\xfa")),
    BadInput(
        "vqa",
        "sizes that are not the folder's",
        "vit.embed_dim: 20 contradicts",
        "A folder of transformers has its own sizes and tokenizer: leave these keys out, or `tools/convert_checkpoint.py` makes a"
        " file of it.",
        "--pretrained {folder}/there",
        lambda folder: blip_folder(folder / "there", "vqa"),
    ),
    BadInput(
        "vqa",
        "another image size than the folder's",
        "image_size: 48 contradicts",
        "",
        "--pretrained {folder}/there --set image_size=48",
        lambda folder: blip_folder(folder / "there", "vqa"),
    ),
    BadInput(
        "caption",
        "the folder of another task",
        "holds BlipForQuestionAnswering, and task 'caption' takes BlipForConditionalGeneration",
        "Each task takes the weights of one class: see [Formats of weights](formats.md).",
        "--pretrained {folder}/there",
        lambda folder: blip_folder(folder / "there", "vqa"),
    ),
    BadInput(
        "nlvr",
        "a folder for NLVR2",
        "which has no BLIP for NLVR2",
        "",
        "--pretrained {folder}/there",
        lambda folder: blip_folder(folder / "there", "vqa"),
    ),
    BadInput(
        "retrieval_clip",
        "the folder of a CLIP that ends texts otherwise",
        "which is not the highest, is of a model that this project does not have",
        "",
        "--pretrained {folder}/there",
        lambda folder: (clip_folder(folder / "there"), changed(folder / "there/config.json", text_config__eos_token_id=5)),
    ),
    BadInput(
        "retrieval_clip",
        "a broken folder",
        "config.json: not a JSON object; fetch the folder again",
        FETCH,
        "--pretrained {folder}/there",
        lambda folder: (clip_folder(folder / "there"), (folder / "there/config.json").write_text("[")),
    ),
    BadInput(
        "retrieval_clip",
        "SigLIP 2 for pictures of any shape",
        "holds SigLIP 2 NaFlex (Siglip2Model), whose pictures have patches of any number",
        "",
        spoil=siglip(lambda there: changed(there / "config.json", model_type="siglip2", architectures=["Siglip2Model"])),
    ),
    BadInput(
        "retrieval_clip",
        "another normalisation than the folder's",
        "pictures.mean: [0.48, 0.46, 0.41] contradicts",
        "",
        spoil=siglip(pictures={"mean": [0.48, 0.46, 0.41]}),
    ),
    BadInput(
        "retrieval_clip",
        "another length of texts than the folder's",
        "max_text_tokens: 24 contradicts",
        "",
        spoil=siglip(max_text_tokens=24),
    ),
    BadInput(
        "retrieval_clip",
        "a folder of SigLIP without its tokenizer",
        "has no tokenizer.json or spiece.model",
        FETCH,
        spoil=siglip(gone("tokenizer.json")),
    ),
    BadInput(
        "retrieval_clip",
        "the tokenizer of another SigLIP",
        "has 7 words, more than clip.vocab_size",
        "",
        spoil=siglip(lambda there: changed(there / "config.json", text_config__vocab_size=5)),
    ),
    BadInput(
        "retrieval_clip",
        "a text length that SigLIP does not pad to",
        "SigLIP pads its texts to clip.context_length, 24",
        "",
        "--set max_text_tokens=20 --set clip.family=siglip --set clip.embed_dim=20",
    ),
    BadInput("retrieval_clip", "a list without [UNK]", "has no [UNK]", spoil=written("vocab.txt", b"a\nred\n")),
]

OFFICIAL = {
    "VQA's questions": ({"questions": []}, "VQA's official questions"),
    "VQA's annotations": ({"annotations": []}, "VQA's official annotations"),
    "COCO's": ({"images": [], "annotations": []}, "COCO's own annotations"),
    "Karpathy's": ({"images": [], "dataset": "coco"}, "Karpathy's split file"),
    "Visual Genome's": ([{"id": 1, "qas": []}], "Visual Genome's own questions"),
}
OWN_HEADER = b"image,question,answer,split\n"
OWN_PAIR = b"image_a,image_b,sentence,label,split\n0a.jpg,0b.jpg,a,maybe,train\n"
ANNOTATIONS = [
    BadInput(
        "nlvr",
        "missing",
        "No such file or directory; set the key 'ann_root'",
        "Set `ann_root`, or the name of the file.",
        spoil=gone("nlvr_train.json"),
    ),
    BadInput("nlvr", "cut off", "is it cut off? Write it again", FETCH, spoil=cut("nlvr_dev.json", 0.7)),
    BadInput("nlvr", "no text", "not a text file", spoil=written("nlvr_dev.json", b"\x1f\x8b\x08\xff\xfe")),
    BadInput(
        "nlvr",
        "an object a line",
        "has an object on each line",
        CONVERT,
        spoil=written("nlvr_dev.json", b'{"identifier": 1}\n{"identifier": 2}\n'),
    ),
    *(
        BadInput("vqa", f"{name} own file", f"is in the format of {said}", CONVERT, spoil=written("vqa_train.json", content))
        for name, (content, said) in OFFICIAL.items()
    ),
    BadInput("nlvr", "empty", "must be a list of entries, and not empty", spoil=written("nlvr_test.json", [])),
    BadInput("nlvr", "an object", "must be a list of entries", spoil=written("nlvr_test.json", {})),
    BadInput("nlvr", "a list of texts", "entry 0 is not an object", spoil=written("nlvr_test.json", ["a"])),
    BadInput(
        "nlvr",
        "no sentence",
        "entry 1 has no 'sentence' that is text",
        "Correct the entry; the first is number 0.",
        spoil=entry("nlvr_train", sentence=None),
    ),
    BadInput("nlvr", "another label", "entry 1 has the 'label' 'maybe'", spoil=entry("nlvr_train", label="maybe")),
    BadInput("nlvr", "one image", "entry 1 has no 'images' that are two paths", spoil=entry("nlvr_train", images=["0a.jpg"])),
    BadInput(
        "retrieval",
        "captions to train on",
        "entry 1 has no 'caption' that is text, as a training entry has",
        "Training files have one caption an entry, evaluation files a list.",
        spoil=entry("flickr30k_train", caption=["a"]),
    ),
    BadInput("retrieval", "no image id", "entry 1 has no 'image_id'", spoil=entry("flickr30k_train", image_id=None)),
    BadInput(
        "retrieval",
        "one id for two images",
        "has the image_id 0 of another image",
        "Number the images anew: captions of one image share an id, and only these.",
        spoil=entry("flickr30k_train", image_id=0),
    ),
    BadInput(
        "retrieval",
        "a caption to evaluate",
        "entry 1 has no 'caption' that is a list of texts, as an evaluation entry has",
        spoil=entry("flickr30k_val", caption="a"),
    ),
    BadInput("caption", "no image", "entry 1 has no 'image' that is a path", spoil=entry("coco_karpathy_test", image=None)),
    BadInput(
        "caption", "no ground truth", "No such file or directory; set the key 'coco_gt_root'", "", "--set coco_gt_root={folder}"
    ),
    BadInput(
        "caption",
        "another ground truth",
        "has no list 'annotations'",
        "",
        "--set coco_gt_root={folder}",
        written("coco_karpathy_val_gt.json", []),
    ),
    BadInput(
        "caption",
        "the ground truth of another split",
        "is it of another split?",
        "",
        "--set coco_gt_root={folder}",
        written("coco_karpathy_val_gt.json", {"annotations": []}),
    ),
    BadInput("vqa", "no question", "entry 1 has no 'question' that is text", spoil=entry("vqa_val", question=None)),
    BadInput("vqa", "no question id", "entry 1 has no 'question_id'", spoil=entry("vqa_val", question_id=None)),
    BadInput(
        "vqa",
        "a question id twice",
        "share the question_id 0; give each its own",
        "Predictions are kept by question id: each needs its own.",
        spoil=entry("vqa_test", question_id=0),
    ),
    BadInput("vqa", "another data set", "entry 1 has the 'dataset' 'gqa'", spoil=entry("vqa_val", dataset="gqa")),
    BadInput("vqa", "no answers", "entry 1 has no 'answer' that is a list of texts", spoil=entry("vqa_train", answer=None)),
    BadInput("vqa", "one answer of VQA", "entry 1 has no 'answer' that is a list of texts", spoil=entry("vqa_train", answer="red")),
    BadInput(
        "vqa",
        "no list of candidates",
        "must be a list of texts, and not empty; set the key 'answer_list'",
        spoil=written("answer_list.json", {}),
    ),
    BadInput("vqa", "validated on what is trained", "is among the train_files; leave it empty", "", "--set val_file=vqa_train"),
    BadInput(
        "vqa",
        "tested on what is trained",
        "is among the train_files; name a file that is not trained on",
        "",
        TRAIN + "--set test_file=vqa_train",
    ),
    BadInput("vqa", "too few images", "too few images to hold 2% of them out", "Name a `val_file`.", "--set \"val_file=''\""),
]

OWN = "--set table={folder}/own.csv --set train_files= --set val_file= --set test_file= "
TABLES = [
    BadInput(
        "vqa",
        "no table",
        "own.csv: No such file or directory; set the key 'table'",
        flags=OWN,
    ),
    BadInput(
        "vqa",
        "a table beside annotation files",
        "its splits are train, val and test, but train_files is 'vqa_train'",
        "A table has its own splits: leave `train_files`, `val_file` and `test_file` out.",
        "--set table={folder}/own.csv",
    ),
    BadInput(
        "vqa",
        "no column",
        "line 1 has no column 'answer', only image, question",
        "The first line of a CSV file names its columns: see [Own data](data.md#own-data).",
        OWN,
        written("own.csv", b"image,question\n"),
    ),
    BadInput(
        "vqa",
        "another number of cells",
        "line 2 has 4 cells for 3 columns; quote texts that hold commas",
        "",
        OWN,
        written("own.csv", b"image,question,answer\n0a.jpg,a,red,star\n"),
    ),
    BadInput(
        "vqa", "an empty cell", "line 2 has no 'image' that is a path", "", OWN, written("own.csv", OWN_HEADER + b",a,red,train")
    ),
    BadInput(
        "vqa",
        "no answer to train on",
        "line 2 has no 'answer' that is text",
        "",
        OWN,
        written("own.csv", OWN_HEADER + b"0a.jpg,a,,train"),
    ),
    BadInput(
        "vqa",
        "an unknown split",
        "line 2 has the split 'dev', not train, val, test",
        "",
        OWN,
        written("own.csv", OWN_HEADER + b"0a.jpg,a,red,dev"),
    ),
    BadInput(
        "vqa",
        "a split without rows",
        "has no rows of the split 'val'",
        "Give each of train, val and test some rows, or leave the column `split` out and set `split_shares`.",
        OWN,
        written("own.csv", OWN_HEADER + b"0a.jpg,a,red,train"),
    ),
    BadInput("nlvr", "a label that is none", "line 2 has the 'label' 'maybe'", "", OWN, written("own.csv", OWN_PAIR)),
    BadInput(
        "caption",
        "a line that is no object",
        "line 2 is not a JSON object; write one on each line",
        "",
        OWN.replace("own.csv", "own.jsonl"),
        written("own.jsonl", b'{"image": "0a.jpg", "caption": "a"}\n[]\n'),
    ),
    BadInput(
        "retrieval",
        "no picture of the table",
        "no such picture; set the key 'image_root'",
        "",
        OWN,
        written("own.csv", b"image,caption\n" + b"".join(b"x/%d.jpg,a star\n" % number for number in range(30))),
    ),
    BadInput("vqa", "shares of more than all", "split_shares must be three numbers", "", OWN + "--set split_shares=[1,1,1]"),
]

IMAGES = [
    BadInput(
        "nlvr",
        "missing",
        "no such picture; set the key 'image_root'",
        "Set `image_root` to the folder that the paths of the annotations start from.",
        spoil=gone("0a.jpg"),
    ),
    BadInput("vqa", "missing for VQA", "no such picture; set the key 'vqa_root'", spoil=gone("0a.jpg")),
    BadInput(
        "nlvr",
        "another case",
        "no such picture, but 0a.JPG is there",
        "Rename the file, or correct the annotations.",
        spoil=renamed("0a.jpg", "0a.JPG"),
    ),
    BadInput("nlvr", "no picture", "not a readable picture", FETCH, spoil=written("0a.jpg", b"GIF")),
    BadInput("nlvr", "empty", "not a readable picture", spoil=written("0b.jpg", b"")),
    BadInput("nlvr", "cut off", "not a readable picture", spoil=cut("0a.jpg", 0.5)),
    BadInput("retrieval", "missing for retrieval", "no such picture; set the key 'image_root'", "", "--set image_root=/nowhere"),
]

PREDICT = "--checkpoint {folder}/checkpoint_best.pth --device cpu "
DRAW = "--config {folder}/config.yaml --checkpoint {folder}/checkpoint_best.pth --device cpu "
TOOLS = [
    BadInput(
        "nlvr", "no checkpoint", "no such file; give a run's checkpoint_best.pth", "", "--checkpoint x.pth", program="tools.predict"
    ),
    BadInput(
        "nlvr",
        "no picture",
        "no such picture; give the path of one with --image",
        "",
        PREDICT + "--image x.jpg",
        program="tools.predict",
    ),
    BadInput(
        "nlvr", "no words", "has no words; write what the model is to read", "", PREDICT + "--text ...", program="tools.predict"
    ),
    BadInput("nlvr", "no PNG", "must end in .png", "", PREDICT + "--explain x.pdf", program="tools.predict"),
    BadInput(
        "nlvr",
        "too few pictures",
        "task 'nlvr' wants",
        "",
        PREDICT + "--image {folder}/0a.jpg --text star",
        program="tools.predict",
    ),
    BadInput(
        "nlvr",
        "no temperature",
        "pruned weights without their temperature",
        "Give a run's `checkpoint_best.pth`.",
        PREDICT,
        lambda folder: torch.save(torch.load(folder / WEIGHTS)["model"], folder / WEIGHTS),
        "tools.predict",
    ),
    BadInput(
        "nlvr",
        "no task",
        "its key 'task' is None; set it, or --task",
        "",
        PREDICT,
        lambda folder: (folder / "config.yaml").write_text("p: 0.4\n"),
        "tools.predict",
    ),
    BadInput("nlvr", "an unknown sample", "no such test sample", "", DRAW + "--ids x", program="tools.visualize"),
    BadInput("nlvr", "no sample", "--samples must be at least 1", "", DRAW + "--samples 0", program="tools.visualize"),
    BadInput(
        "nlvr",
        "dense weights to pack",
        "has no sparse weights; leave it out",
        "",
        "--checkpoint {folder}/checkpoint_best.pth --out {folder}/out --packed",
        program="tools.export",
    ),
    BadInput(
        "nlvr",
        "a file in the way",
        "the file is there already; give a folder",
        "",
        "--checkpoint {folder}/checkpoint_best.pth --out {folder}/vocab.txt",
        program="tools.export",
    ),
    BadInput(
        "nlvr",
        "too large for float16",
        "is beyond float16; leave it out",
        "",
        "--checkpoint {folder}/checkpoint_best.pth --out {folder}/out --half",
        weights(lambda model: model["cls_head.0.bias"].fill_(1e6)),
        "tools.export",
    ),
]

CONVERT_TOOL = "--checkpoint {folder}/checkpoint_best.pth "
TOOLS += [
    BadInput(
        "nlvr",
        "pruned weights to convert",
        "prunes tokens",
        "Other programs cannot prune: convert the dense weights that the run started from.",
        CONVERT_TOOL + "--to blip --out {folder}/x.pth",
        program="tools.convert_checkpoint",
    ),
    BadInput(
        "nlvr",
        "NLVR2 for transformers",
        "a BLIP for NLVR2, for which transformers has no class",
        "",
        CONVERT_TOOL + "--to transformers --out {folder}/out",
        dense,
        "tools.convert_checkpoint",
    ),
    BadInput(
        "caption",
        "something in the way",
        "is there already; give another path",
        "",
        CONVERT_TOOL + "--to blip --out {folder}/vocab.txt",
        dense,
        "tools.convert_checkpoint",
    ),
    BadInput(
        "caption",
        "another file ending",
        "give a file that ends in .pth, .pt or .bin",
        "",
        CONVERT_TOOL + "--to blip --out {folder}/x.zip",
        dense,
        "tools.convert_checkpoint",
    ),
    BadInput(
        "caption",
        "a weight that is not known",
        "holds x, which no BLIP has",
        "Save BLIP's weights alone: a conversion leaves out nothing that it does not know.",
        CONVERT_TOOL + "--to blip --out {folder}/x.pth",
        lambda folder: (dense(folder), weights(lambda model: model.update(x=torch.ones(1)))(folder)),
        "tools.convert_checkpoint",
    ),
    BadInput(
        "caption",
        "heads that nothing tells",
        "does not show its attention heads",
        "",
        CONVERT_TOOL + "--to transformers --out {folder}/out",
        lambda folder: (dense(folder), gone("config.yaml")(folder)),
        "tools.convert_checkpoint",
    ),
    BadInput(
        "caption",
        "no weights of this project",
        "neither a BLIP nor a CLIP of this project",
        "",
        CONVERT_TOOL + "--to blip --out {folder}/x.pth",
        saved({"model": {"x": torch.ones(1)}}),
        "tools.convert_checkpoint",
    ),
]

CAPTIONS = {
    "images": [{"id": 9, "file_name": "COCO_val2014_000000000009.jpg"}],
    "annotations": [{"image_id": 9, "caption": "a star"}],
}
IMPORT = "--out {folder}/out --images {folder} "
TOOLS += [
    BadInput(
        "caption",
        "official files without pictures",
        "1 of 1 pictures of coco_val are missing, the first val2014/COCO_val2014_000000000009.jpg",
        "`--images` is the folder that holds `train2014/` and the like.",
        IMPORT + "--from coco --files {folder}/captions_val2014.json",
        written("captions_val2014.json", CAPTIONS),
        "tools.import_data",
    ),
    BadInput(
        "caption",
        "an unknown split of Karpathy's",
        "image 0 has the split 'dev', not one of train, restval, val, test",
        "",
        IMPORT + "--from karpathy --files {folder}/x.json",
        written("x.json", {"dataset": "coco", "images": [{"split": "dev"}]}),
        "tools.import_data",
    ),
    BadInput(
        "vqa",
        "questions without annotations",
        "the annotations of train2014 are not given; add their file",
        "",
        IMPORT + "--from vqa --files {folder}/x.json",
        written("x.json", {"data_subtype": "train2014", "questions": []}),
        "tools.import_data",
    ),
    BadInput(
        "nlvr",
        "statements of another split",
        "line 1 has the identifier 'balanced-0-0-0', of none of the splits",
        "",
        IMPORT + "--from nlvr --files {folder}/x.json",
        written("x.json", b'{"identifier": "balanced-0-0-0"}\n'),
        "tools.import_data",
    ),
    BadInput(
        "caption",
        "no official file",
        "has no 'annotations', as the official file has",
        CONVERT_NONE,
        IMPORT + "--from coco --files {folder}/captions_val2014.json",
        written("captions_val2014.json", {"images": []}),
        "tools.import_data",
    ),
]

TABLE = {
    "Settings": SETTINGS,
    "Weights": CHECKPOINTS,
    "Annotations": ANNOTATIONS,
    "Own data": TABLES,
    "Images": IMAGES,
    "Tools": TOOLS,
}


def page() -> str:
    """Returns docs/troubleshooting.md."""
    lines = [
        "# Troubleshooting",
        "",
        "A mistake in the input ends a program with one line, `error: what: where; what to do`, and exit code 2.",
        "This page explains the lines that do not say it all; … stands for a number or a name."
        " It is written from `tests/bad_inputs.py`, by `PYTHONPATH=. python -m tests.bad_inputs`.",
        "`tools/doctor.py` finds such mistakes before a run, all at once: see [Training](training.md#before-a-long-run).",
    ]
    for section, inputs in TABLE.items():
        rows: dict[str, list[str]] = {}
        for bad in inputs:
            if bad.todo:
                rows.setdefault(bad.todo, []).append(f"`{re.sub(NUMBER, '…', bad.said)}`")
        lines += ["", f"## {section}", "", "| message | what to do |", "|---|---|"]
        lines += [f"| {'<br>'.join(dict.fromkeys(said))} | {todo} |" for todo, said in rows.items()]
    return "\n".join(lines) + "\n"


def cases() -> Iterator[tuple[str, BadInput]]:
    """Yields each bad input with its name."""
    return ((f"{section.lower()}: {bad.name}", bad) for section, inputs in TABLE.items() for bad in inputs)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
