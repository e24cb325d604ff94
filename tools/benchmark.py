"""How fast compressed models are beside dense ones: throughput, latency and memory at real size, methods in turn.

    python tools/benchmark.py --task nlvr --p 0.5,0.7,0.8 --batch-sizes 8 --device cpu
    python tools/benchmark.py --task vit --against dense,timm,transformers --batch-sizes 1,8,32
    python tools/benchmark.py --task nlvr --keep-schedule 0.9,0.9,0.8,0.8,0.7,0.7,0.7,0.7,0.7,0.7,0.7,0.7

The pictures are noise and the weights random, and scores of these mean nothing. So every block keeps the same share of its tokens,
the one that makes the GFLOPs fall by p, pruning's own cost included; scores and thresholds are computed all the same.
--keep-schedule gives the share of each block instead; --temperature prunes as --pretrained weights would.

nlvr is BLIP-NLVR whole (pairs), vit its image encoder (images), block the first block of that, on all its tokens.
dense is this project's model without pruners (fused attention), compiled the same under torch.compile; timm and transformers are
their image encoders of the same size and exist for --task vit. speedup is the throughput over that of dense, round by round.
"""

import argparse
import csv
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import NlvrConfig, load_config  # noqa: E402
from engine.results import write_json  # noqa: E402
from engine.train import Precision  # noqa: E402
from madtp.flops import GIGA  # noqa: E402
from madtp.packing import pack  # noqa: E402
from madtp.pruning import OFF, PruneSetting, TokenPruner  # noqa: E402
from models.blip_nlvr import REFERENCE_TEXT_TOKENS, BlipNlvr  # noqa: E402
from models.build import nlvr_from_config  # noqa: E402
from models.pretrained import load_nlvr_weights, read_checkpoint  # noqa: E402
from models.tower import TowerRecord, count_tokens  # noqa: E402
from tools.flops import BERT_VOCABULARY  # noqa: E402
from utils import UserError, run_main  # noqa: E402

CONFIG = Path("configs/nlvr.yaml")
LIVELY = 0.1  # standard deviation of random learnable tokens: alignment that is not flat
BISECTIONS = 12
MIB = 2**20

Forward = Callable[[], object]


@dataclass
class Row:
    """One line of the result. throughput: pairs (nlvr) or images (vit) a second; keep: tokens after each image block."""

    method: str
    p: float
    batch_size: int
    device: str
    throughput: float
    throughput_spread: float
    speedup: float
    latency_ms: float
    peak_memory_mib: float
    gflops: float | None
    keep: list[float]


@dataclass
class Method:
    """A model to time: `prepare(inputs)` gives the forward pass, GFLOPs and kept tokens are of one sample."""

    name: str
    p: float
    prepare: Callable[[tuple[Tensor, ...]], Forward]
    gflops: float | None = None
    keep: tuple[float, ...] = ()


class Nlvr:
    """Two images and a text."""

    @staticmethod
    def inputs(config: NlvrConfig, batch_size: int) -> tuple[Tensor, ...]:
        size, tokens = config.image_size, min(REFERENCE_TEXT_TOKENS, config.bert_sizes.max_position_embeddings)
        ids = torch.randint(5, 30, (batch_size, tokens))
        return torch.randn(batch_size, 2, 3, size, size), ids, torch.ones_like(ids)

    @staticmethod
    def run(model: BlipNlvr, inputs: tuple[Tensor, ...], setting: PruneSetting, packed: bool):
        return model(*inputs, setting, packed=packed)

    @staticmethod
    def cost(model: BlipNlvr, output, setting: PruneSetting) -> tuple[float, TowerRecord]:
        return float(model.gflops(output, setting).mean()), output.vision


class Vit:
    """An image, and the image encoder alone."""

    @staticmethod
    def inputs(config: NlvrConfig, batch_size: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch_size, 3, config.image_size, config.image_size),)

    @staticmethod
    def run(model: BlipNlvr, inputs: tuple[Tensor, ...], setting: PruneSetting, packed: bool):
        return model.visual_encoder(*inputs, model.learnable_tokens, setting, packed=packed)

    @staticmethod
    def cost(model: BlipNlvr, output, setting: PruneSetting) -> tuple[float, TowerRecord]:
        return float(model.visual_encoder.flops(output[2], setting).double().mean() / GIGA), output[2]


class OneBlock:
    """The tokens that enter a block of the image encoder, and that block alone."""

    @staticmethod
    def inputs(config: NlvrConfig, batch_size: int) -> tuple[Tensor, ...]:
        tokens = 1 + (config.image_size // config.vit_sizes.patch_size) ** 2
        return (torch.randn(batch_size, tokens, config.vit_sizes.embed_dim),)

    @staticmethod
    def run(model: BlipNlvr, inputs: tuple[Tensor, ...], setting: PruneSetting, packed: bool):
        x, layout = pack(inputs[0], None) if packed else (inputs[0], None)
        before = count_tokens(x, layout)
        temperature = setting.at(0)
        x, layout, kept, _ = model.visual_encoder.blocks[0](x, layout, model.learnable_tokens, temperature, False)
        record = TowerRecord(without_map=packed)
        record.add(before, count_tokens(x, layout), kept, None)
        return record

    @staticmethod
    def cost(model: BlipNlvr, record: TowerRecord, setting: PruneSetting) -> tuple[float, TowerRecord]:
        active, entering, leaving = setting.at(0) is not None, record.entering[0], record.leaving[0]
        total = model.visual_encoder.blocks[0].flops(entering, leaving, active, False, record.without_map)
        return float(total.double().mean() / GIGA), record


TASKS = {"nlvr": Nlvr, "vit": Vit, "block": OneBlock}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="nlvr")
    parser.add_argument("--config", type=Path, default=CONFIG, help="sizes of the model; the published one by default")
    parser.add_argument("--pretrained", help="weights to load")
    parser.add_argument("--p", type=numbers(float), default=(0.5, 0.7, 0.8), help="shares of the GFLOPs to remove, 0.5,0.8")
    parser.add_argument("--keep-schedule", type=numbers(float), help="the share of its tokens that each block keeps")
    parser.add_argument("--temperature", type=float, help="prune at this temperature, instead of --p")
    parser.add_argument("--batch-sizes", type=numbers(int), default=(8,))
    parser.add_argument("--against", default="dense", help="of dense, compiled, timm, transformers")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", action="store_true", help="bf16 under autocast")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--out", type=Path, help="a folder for a CSV and a plot, named by task, device and PyTorch version")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rows = benchmark(args)
    print(table(rows))
    if args.json:
        write_json({"command": " ".join(sys.argv), **machine(args.device), "rows": [asdict(row) for row in rows]}, args.json)
    if args.out:
        save(rows, args)


def numbers(kind: type) -> Callable[[str], tuple]:
    """An argparse type: numbers with commas between."""

    def parse(text: str) -> tuple:
        return tuple(kind(part) for part in text.split(","))

    parse.__name__ = f"list of {kind.__name__}"
    return parse


@torch.inference_mode()
def benchmark(args: argparse.Namespace) -> list[Row]:
    device = torch.device(args.device)
    precision = Precision(device, args.amp)
    methods = build_methods(args, device)
    rows = []
    for batch_size in args.batch_sizes:
        inputs = random_inputs(args, batch_size, device)
        forwards = [method.prepare(inputs) for method in methods]
        with precision.autocast():
            seconds, memory = time_in_turn(forwards, args.rounds, device)
        dense = seconds[0]
        for method, times, mib in zip(methods, seconds, memory, strict=True):
            speedup = statistics.median(a / b for a, b in zip(dense, times, strict=True))
            rates = sorted(batch_size / t for t in times)
            spread = (rates[-1 - len(rates) // 4] - rates[len(rates) // 4]) / 2  # half of what lies between the quartiles
            rate, latency = statistics.median(rates), 1000 * statistics.median(times)
            rows.append(
                Row(method.name, method.p, batch_size, str(device), rate, spread, speedup, latency, mib, method.gflops,
                    list(method.keep))
            )  # fmt: skip
    return rows


def build_methods(args: argparse.Namespace, device: torch.device) -> list[Method]:
    names = args.against.split(",")
    known = {"dense": dense_method, "compiled": compiled_method, "timm": timm_method, "transformers": transformers_method}
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--against {unknown[0]}: not known; choose of {', '.join(known)}")
    names = ["dense", *(name for name in names if name != "dense")]  # what the others are measured by comes first
    methods = [known[name](args, device) for name in names]
    if args.keep_schedule or args.temperature:
        return [*methods, pruned_method(args, device, None)]
    return methods + [pruned_method(args, device, p) for p in args.p if p > 0]


def model_of(args: argparse.Namespace, p: float) -> BlipNlvr:
    config = load_config(NlvrConfig, args.config, {"p": p, "keep": "instance", "sd_init_std": LIVELY})
    model = nlvr_from_config(config, BERT_VOCABULARY).eval()
    if args.pretrained:
        load_nlvr_weights(model, read_checkpoint(args.pretrained)["model"], args.pretrained)
    return model


def random_inputs(args: argparse.Namespace, batch_size: int, device: torch.device) -> tuple[Tensor, ...]:
    config = load_config(NlvrConfig, args.config, {"p": 0.0})
    return tuple(part.to(device) for part in TASKS[args.task].inputs(config, batch_size))


def forward_of(args: argparse.Namespace, model: BlipNlvr, setting: PruneSetting, packed: bool):
    """inputs -> the forward pass of a task's model."""
    return lambda inputs: lambda: TASKS[args.task].run(model, inputs, setting, packed)


def cost_of(args: argparse.Namespace, model: BlipNlvr, setting: PruneSetting, packed: bool) -> tuple[float, tuple[float, ...]]:
    """GFLOPs of a sample and the tokens after each image block, from a batch of one."""
    inputs = random_inputs(args, 1, next(model.parameters()).device)
    gflops, record = TASKS[args.task].cost(model, TASKS[args.task].run(model, inputs, setting, packed), setting)
    return gflops, tuple(float(n.double().mean()) for n in record.leaving)


def dense_method(args: argparse.Namespace, device: torch.device) -> Method:
    model = model_of(args, 0.0).to(device)
    return Method("dense", 0.0, forward_of(args, model, OFF, False), *cost_of(args, model, OFF, False))


def compiled_method(args: argparse.Namespace, device: torch.device) -> Method:
    model = model_of(args, 0.0).to(device)
    compiled = torch.compile(lambda inputs: TASKS[args.task].run(model, inputs, OFF, False))
    return Method("compiled", 0.0, lambda inputs: lambda: compiled(inputs), *cost_of(args, model, OFF, False))


def timm_method(args: argparse.Namespace, device: torch.device) -> Method:
    import timm

    config = vit_only(args, "timm")
    size = config.vit_sizes
    model = timm.models.VisionTransformer(
        config.image_size, size.patch_size, num_classes=0, global_pool="", embed_dim=size.embed_dim, depth=size.depth,
        num_heads=size.num_heads, mlp_ratio=size.mlp_ratio,
    )  # fmt: skip
    model = model.eval().to(device)
    return Method("timm", 0.0, lambda inputs: lambda: model(*inputs))


def transformers_method(args: argparse.Namespace, device: torch.device) -> Method:
    from transformers import ViTConfig, ViTModel

    config = vit_only(args, "transformers")
    size = config.vit_sizes
    settings = ViTConfig(
        hidden_size=size.embed_dim, num_hidden_layers=size.depth, num_attention_heads=size.num_heads,
        intermediate_size=int(size.embed_dim * size.mlp_ratio), image_size=config.image_size, patch_size=size.patch_size,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = ViTModel(settings, add_pooling_layer=False).eval().to(device)
    return Method("transformers", 0.0, lambda inputs: lambda: model(*inputs))


def vit_only(args: argparse.Namespace, name: str) -> NlvrConfig:
    if args.task != "vit":
        raise UserError(f"--against {name}: has no model of task {args.task}; compare image encoders with --task vit")
    return load_config(NlvrConfig, args.config, {"p": 0.0})


def pruned_method(args: argparse.Namespace, device: torch.device, p: float | None) -> Method:
    """This project's packed model at `p`, or under --keep-schedule."""
    dense = cost_of(args, model_of(args, 0.0).to(device), OFF, False)[0]
    model = model_of(args, 0.5).to(device)
    setting = PruneSetting(args.temperature or 1.0)  # which temperature does not matter where the share is imposed
    if p is not None:
        impose(model, share_for(args, model, dense * (1 - p)))
    elif args.keep_schedule:
        schedule = args.keep_schedule
        blocks = 1 if args.task == "block" else model.visual_encoder.depth
        if len(schedule) != blocks:
            raise UserError(f"--keep-schedule: {len(schedule)} shares for {blocks} blocks; give one a block")
        impose(model, *schedule)
    gflops, keep = cost_of(args, model, setting, True)
    return Method("madtp", round(1 - gflops / dense, 4), forward_of(args, model, setting, True), gflops, keep)


def impose(model: BlipNlvr, *shares: float) -> None:
    """The share that each block keeps, in both towers; one for all, or one a block."""
    for tower in (model.visual_encoder.blocks, model.text_encoder.encoder.layer):
        for index, block in enumerate(tower):
            pruner: TokenPruner = block.pruner
            pruner.rule = replace(pruner.rule, share=shares[min(index, len(shares) - 1)])


def share_for(args: argparse.Namespace, model: BlipNlvr, target: float) -> float:
    """The share, the same in all blocks, at which a sample costs `target` GFLOPs."""
    low, high = 0.01, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        impose(model, middle)
        low, high = (middle, high) if cost_of(args, model, PruneSetting(1.0), True)[0] < target else (low, middle)
    return (low + high) / 2


def time_in_turn(forwards: Sequence[Forward], rounds: int, device: torch.device) -> tuple[list[list[float]], list[float]]:
    """Seconds of each round of each forward pass, after a warm-up, and its peak memory in MiB above what was there before."""
    memory = [peak_memory(forward, device) for forward in forwards]
    for forward in forwards:
        forward()
    seconds: list[list[float]] = [[] for _ in forwards]
    for _ in range(rounds):
        for forward, times in zip(forwards, seconds, strict=True):
            synchronise(device)
            started = time.perf_counter()
            forward()
            synchronise(device)
            times.append(time.perf_counter() - started)
    return seconds, memory


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(forward: Forward, device: torch.device) -> float:
    """MiB that a forward pass needs beyond weights and inputs; of a CPU as Linux counts them."""
    if device.type == "cuda":
        forward()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        forward()
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is there now
        before = status("VmRSS")
        forward()
        return (status("VmHWM") - before) / 1024
    except OSError:  # no Linux
        return float("nan")


def status(key: str) -> int:
    """KiB, from Linux' account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def machine(device: str) -> dict:
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    return {"device": device, "machine": name, "torch": torch.__version__}


def table(rows: Sequence[Row]) -> str:
    head = f"{'method':14}{'p':>7}{'batch':>7}{'a second':>12}{'+-':>8}{'speedup':>9}{'ms':>10}{'MiB':>9}{'GFLOPs':>10}"
    lines = [
        f"{r.method:14}{r.p:7.3f}{r.batch_size:7d}{r.throughput:12.2f}{r.throughput_spread:8.2f}{r.speedup:9.2f}"
        f"{r.latency_ms:10.1f}{r.peak_memory_mib:9.0f}" + (f"{r.gflops:10.3f}" if r.gflops else f"{'':10}")
        for r in rows
    ]
    return "\n".join([head, *lines])


def save(rows: Sequence[Row], args: argparse.Namespace) -> None:
    """A CSV with the command that made it, and the throughput over the GFLOPs reduction."""
    from matplotlib.figure import Figure

    args.out.mkdir(parents=True, exist_ok=True)
    name = args.out / f"{args.task}_{args.device.replace(':', '')}_torch{torch.__version__.partition('+')[0]}"
    with open(f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        file.write(f"# python {' '.join(sys.argv)}\n# {json.dumps(machine(args.device))}\n")
        writer = csv.DictWriter(file, asdict(rows[0]))
        writer.writeheader()
        writer.writerows({**asdict(row), "keep": " ".join(f"{n:g}" for n in row.keep)} for row in rows)
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for size in args.batch_sizes:
        mine = sorted((row.p, row.speedup) for row in rows if row.batch_size == size and row.method in ("dense", "madtp"))
        axes.plot(*zip(*mine, strict=True), marker="o", label=f"batch {size}")
    axes.set(xlabel="GFLOPs removed, p", ylabel="throughput over dense", title=f"{args.task} on {args.device}")
    axes.legend()
    figure.savefig(f"{name}.png")


if __name__ == "__main__":
    run_main(main)
