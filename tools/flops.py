"""GFLOPs and parameters of a model, from its config alone: no data, no weights, no tokenizer.

    python tools/flops.py --config configs/nlvr.yaml [--temperature T | --p P] [--json]

Counts the paper's reference case (NLVR2: two images, 36 text tokens; retrieval: a pair in a training step, its text padded to
the longest) by closed form and by fvcore, and what a sample costs in deployment: a pair with its text read once, a caption of
`max_length` tokens written, a question with its answer ranked among `k_test`, or written. With --temperature the model prunes;
with --p the temperature that removes this share is looked for first. Scores of random weights mean little, so give --pretrained
for a trained model's counts; the two ways of counting must agree whatever the weights are. Of a config with sparse weights --p is
what tokens and weights remove together, and the closed form counts N:M layers at N / M, which fvcore does not.
"""

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clip.tokenizer import OPENAI, load_clip_tokenizer  # noqa: E402
from configs.schema import (  # noqa: E402
    CONFIGS,
    CaptionConfig,
    ClipRetrievalConfig,
    Config,
    NlvrConfig,
    RetrievalConfig,
    VqaConfig,
)
from data.text import load_tokenizer  # noqa: E402
from engine.flop_table import flop_table, fvcore_gflops  # noqa: E402
from engine.results import count_parameters  # noqa: E402
from engine.restore import LOAD  # noqa: E402
from madtp.budget import UnreachableTarget, calibrate  # noqa: E402
from madtp.pruning import OFF, PruneSetting  # noqa: E402
from madtp.sparsity.masks import SparseWeights  # noqa: E402
from models.blip_caption import REFERENCE_TEXT_TOKENS as CAPTION_TOKENS  # noqa: E402
from models.blip_caption import BlipCaption  # noqa: E402
from models.blip_nlvr import REFERENCE_TEXT_TOKENS  # noqa: E402
from models.blip_vqa import ANSWER_TOKENS, ANSWERS, QUESTION_TOKENS, QUESTIONS, BlipVqa  # noqa: E402
from models.build import (  # noqa: E402
    caption_from_config,
    clip_from_config,
    nlvr_from_config,
    retrieval_from_config,
    vqa_from_config,
)
from madtp.sparsity.layers import sparse_weights  # noqa: E402
from models.weights.blip import read_checkpoint  # noqa: E402
from configs.load import load_any_config  # noqa: E402
from utils import UserError, run_main  # noqa: E402

Inputs = tuple[torch.Tensor, ...]

BERT_VOCABULARY = 30524  # bert-base-uncased with [DEC] and [ENC]
CLIP_VOCABULARY = 49408
PROMPT, END = [BERT_VOCABULARY - 2], 102  # [DEC] and [SEP] of bert-base-uncased; which ids they are changes no count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path)
    parser.add_argument("--task", choices=CONFIGS, help="where the file has no key 'task'")
    parser.add_argument("--pretrained", help="weights to load")
    strength = parser.add_mutually_exclusive_group()
    strength.add_argument("--temperature", type=float, help="prune at this temperature")
    strength.add_argument("--p", type=float, help="prune at the temperature that removes this share of the GFLOPs")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args()
    pruned = args.temperature is not None or bool(args.p)
    config = load_any_config(args.config, {"p": args.p or (0.5 if pruned else 0.0)}, args.task)
    torch.manual_seed(config.seed)
    model, inputs = BUILD[config.task](config)
    model.eval()
    saved = read_checkpoint(args.pretrained) if args.pretrained else {}
    if saved:
        LOAD[config.task](model, saved["model"], args.pretrained)
    setting, dense = OFF, total(model, inputs, OFF)
    sparse = sparse_weights(model, config.pattern, config.sparse_layers) if config.pattern else None
    with as_sparse(sparse, saved.get("masked")):
        if args.temperature is not None:
            setting = PruneSetting(args.temperature, config.prune_from)
        elif args.p:
            setting = setting_for(model, inputs, args.p, config.prune_from, dense)
        report = count(model, inputs, setting, partial(DEPLOYMENT[config.task], config) if config.task in DEPLOYMENT else None)
    if args.json:
        print(json.dumps(report))
        return
    print(flop_table(model, inputs))
    print(f"uncompressed: {dense:.4f} GFLOPs, {report['params'] / 1e6:.1f} M parameters")
    if setting.temperature is not None:
        print(f"pruning from block {setting.prune_from} at temperature {setting.temperature:.4g}:")
    print("closed form {closed_form:.4f}, fvcore {fvcore:.4f}, deployment {deployment:.4f} GFLOPs".format(**report["gflops"]))


def as_sparse(sparse: SparseWeights | None, masked: list[str] | None) -> AbstractContextManager:
    """Inside, the weights that a checkpoint lists as masked are counted as sparse; without such a list all that may be."""
    return sparse.counted(sparse.weights if masked is None else masked) if sparse else nullcontext()


def bert_vocabulary(config: Config) -> int:
    """The tokenizer's size, or BERT's where there is no tokenizer: embeddings cost parameters, not GFLOPs."""
    try:
        return len(load_tokenizer(config.tokenizer))
    except UserError:
        return BERT_VOCABULARY


def clip_vocabulary(config: ClipRetrievalConfig) -> int:
    """The same of CLIP's tokenizer."""
    try:
        return CLIP_VOCABULARY if config.tokenizer == OPENAI else len(load_clip_tokenizer(config.tokenizer))
    except UserError:
        return CLIP_VOCABULARY


def build_nlvr(config: NlvrConfig) -> tuple[torch.nn.Module, Inputs]:
    """The model and the reference case: a random image twice, so that `keep: instance` pads neither,
    and a text of the reference length (or the longest possible)."""
    tokens = min(REFERENCE_TEXT_TOKENS, config.bert_sizes.max_position_embeddings)
    images = torch.randn(1, 1, 3, config.image_size, config.image_size).expand(1, 2, -1, -1, -1)
    text = torch.randint(5, 30, (1, tokens))
    return nlvr_from_config(config, bert_vocabulary(config)), (images, text, torch.ones_like(text))


def build_retrieval(config: RetrievalConfig) -> tuple[torch.nn.Module, Inputs]:
    """The reference case: one image and a text of the longest length."""
    vocabulary = bert_vocabulary(config)
    text = torch.randint(5, 30, (1, config.max_text_tokens))
    inputs = torch.randn(1, 3, config.image_size, config.image_size), text, torch.ones_like(text)
    return retrieval_from_config(config, vocabulary, vocabulary - 1), inputs


def build_clip(config: ClipRetrievalConfig) -> tuple[torch.nn.Module, Inputs]:
    """The reference case: one image and a text that ends in the last place."""
    vocabulary = clip_vocabulary(config)
    text = torch.randint(1, vocabulary - 1, (1, config.max_text_tokens))
    text[:, -1] = vocabulary - 1
    inputs = torch.randn(1, 3, config.image_size, config.image_size), text, torch.ones_like(text)
    return clip_from_config(config, vocabulary), inputs


def build_caption(config: CaptionConfig) -> tuple[torch.nn.Module, Inputs]:
    """The reference case: an image and a caption of the reference length."""
    model = caption_from_config(config, bert_vocabulary(config), PROMPT, END, 0)
    text = torch.randint(5, 30, (1, CAPTION_TOKENS))
    inputs = torch.randn(1, 3, config.image_size, config.image_size), text, torch.ones_like(text)
    return model, inputs


def build_vqa(config: VqaConfig) -> tuple[torch.nn.Module, Inputs]:
    """The reference case: an image, questions that all read it, and answers that all belong to the first."""
    vocabulary = bert_vocabulary(config)
    questions, answers = torch.randint(5, 30, (QUESTIONS, QUESTION_TOKENS)), torch.randint(5, 30, (ANSWERS, ANSWER_TOKENS))
    image = torch.randn(1, 3, config.image_size, config.image_size)
    inputs = image, questions, torch.ones_like(questions), answers, torch.ones_like(answers), torch.tensor([ANSWERS])
    return vqa_from_config(config, vocabulary, vocabulary - 2, END, 0), inputs


BUILD = {"nlvr": build_nlvr, "retrieval": build_retrieval, "retrieval_clip": build_clip}
BUILD |= {"caption": build_caption, "vqa": build_vqa}


def captioning(config: CaptionConfig, model: BlipCaption, inputs: Inputs, setting: PruneSetting) -> torch.Tensor:
    """GFLOPs of an image whose caption is as long as it may become, (1,)."""
    _, _, record = model.encode(inputs[0], setting, align=False, packed=False)
    longest = torch.full((1, config.max_length), END + 1)
    return model.generation_gflops(record, longest, config.writing["num_beams"], setting)


def answering(config: VqaConfig, model: BlipVqa, inputs: Inputs, setting: PruneSetting) -> torch.Tensor:
    """GFLOPs of an image with one question, and of its answer, (1,)."""
    images, question_ids, question_mask = inputs[:3]
    question = model.read(images, question_ids[:1], question_mask[:1], setting)
    source = question.valid.sum(dim=1)
    if config.inference == "rank":
        answer = model.ranking_gflops(source, torch.full((1, config.k_test), ANSWER_TOKENS))
    else:
        answer = model.writing_gflops(source, torch.full((1, ANSWER_TOKENS), END + 1), config.num_beams)
    return model.reading_gflops(question, setting) + answer


DEPLOYMENT = {"caption": captioning, "vqa": answering}


@torch.no_grad()
def count(model: torch.nn.Module, inputs: Inputs, setting: PruneSetting, deployed: Callable | None = None) -> dict:
    """`deployed`: (model, inputs, setting) -> GFLOPs of a sample in use, where the model's `costs` do not give them."""
    parts, deployment = model.costs(*inputs, setting=setting)
    if deployed is not None:
        deployment = deployed(model, inputs, setting)
    by_module = {name: float(value[0]) for name, value in parts.items()}
    counted = sum(fvcore_gflops(model, inputs, setting).values())
    gflops = {"closed_form": sum(by_module.values()), "fvcore": counted, "deployment": float(deployment[0])}
    params = count_parameters(model)["total"]
    return {"gflops": gflops, "by_module": by_module, "params": params, **asdict(setting)}


@torch.no_grad()
def total(model: torch.nn.Module, inputs: Inputs, setting: PruneSetting) -> float:
    return float(sum(model.costs(*inputs, setting=setting)[0].values())[0])


def setting_for(model: torch.nn.Module, inputs: Inputs, p: float, prune_from: int, dense: float) -> PruneSetting:
    """What brings the model to a share 1 - p of the `dense` GFLOPs: nothing, where sparse weights do so alone."""

    def measure(setting: PruneSetting) -> float:
        return total(model, inputs, setting)

    if measure(OFF) <= dense * (1 - p):
        return OFF
    try:
        return calibrate(measure, dense * (1 - p), prune_from=prune_from, max_prune_from=model.depth - 1).setting
    except UnreachableTarget as error:
        low, high = 1 - error.high / dense, 1 - error.low / dense
        raise UserError(f"--p {p:g} is out of reach: these weights allow {low:.3f} to {high:.3f}; choose p in that range") from None


if __name__ == "__main__":
    run_main(main)
