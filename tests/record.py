"""Records small reference cases in tests/recorded: inputs, weights and the outputs of this code.

    python -m tests.record

They hold the method's numbers still, on every machine. Record them only while the golden tests pass (MADTP_GOLDEN is set): then
`variant: released` computes what the authors' published code computes.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from madtp.attention.statistics import map_statistics
from madtp.blocks import Guidance
from madtp.pruning import TokenPruner
from madtp.rule import PruneSetting, PruningRule
from tests import tiny

FOLDER = Path(__file__).parent / "recorded"
RULES = {"paper": PruningRule(keep="instance"), "released": PruningRule(variant="released")}
TEMPERATURES = {"paper": (0.0, 2.0, 30.0), "released": (0.5, 2.0, 30.0)}


def step_inputs() -> dict[str, Tensor]:
    """Tokens that enter a block and that leave its attention, the attention map, and learnable tokens."""
    generator = torch.Generator().manual_seed(11)
    shapes = {"inputs": (2, 10, 6), "x": (2, 10, 6), "learnable": (4, 6), "outputs": (2, 3, 10, 2), "logits": (2, 3, 10, 10)}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    drawn["attention"] = (2 * drawn.pop("logits")).softmax(dim=-1)
    return drawn


@torch.no_grad()
def step(case: dict[str, Tensor], variant: str) -> dict[str, Tensor]:
    """One pruning step at every temperature."""
    rule = RULES[variant]
    pruner = TokenPruner(6, 4, 6, rule)
    scores, _ = pruner.align(case["inputs"], None, case["learnable"], features=False)
    statistics = map_statistics(case["attention"], case["outputs"], None, rule)
    found = {}
    for temperature in TEMPERATURES[variant]:
        x, valid, kept = pruner.prune(case["x"], None, scores, statistics, temperature)
        lengths = torch.full((len(x),), x.shape[1]) if valid is None else valid.sum(dim=1)
        found |= {f"T{temperature}.x": x, f"T{temperature}.kept": kept, f"T{temperature}.lengths": lengths}
    return found


@torch.no_grad()
def nlvr(weights: dict[str, Tensor], inputs: dict[str, Tensor], variant: str) -> dict[str, Tensor]:
    """A small BLIP-NLVR at every temperature."""
    model = tiny.nlvr(RULES[variant])
    model.load_state_dict(weights)
    found = {}
    for temperature in TEMPERATURES[variant]:
        guidance = Guidance(PruneSetting(temperature), align=True)
        output = model(inputs["images"], inputs["input_ids"], inputs["attention_mask"], guidance)
        costs = {"logits": output.logits, "similarity": output.similarity, "gflops": model.gflops(output)}
        found |= {f"T{temperature}.{name}": value for name, value in costs.items()}
    return found


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    ids, mask = tiny.text([9, 6, 12], seed=5)
    inputs = {"images": tiny.images(3, seed=5), "input_ids": ids, "attention_mask": mask}
    for variant in RULES:
        case = step_inputs()
        save_file({**_named("in", case), **_named("out", step(case, variant))}, FOLDER / f"step_{variant}.safetensors")
        weights = tiny.nlvr(RULES[variant]).state_dict()
        found = nlvr(weights, inputs, variant)
        parts = {**_named("w", weights), **_named("in", inputs), **_named("out", found)}
        save_file({name: tensor.contiguous() for name, tensor in parts.items()}, FOLDER / f"nlvr_{variant}.safetensors")


def _named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor.clone() for name, tensor in tensors.items()}


if __name__ == "__main__":
    main()
