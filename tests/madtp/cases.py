"""Random inputs of a pruner, and the paper's formulas as plain loops over them."""

import torch
from torch import Tensor

from madtp.attention.statistics import map_statistics
from madtp.importance import AttentionStatistics
from madtp.pruning import TokenPruner
from madtp.rule import PruningRule

WIDTH, LEARNABLE, HEADS = 6, 4, 3


def mask_of(lengths: list[int]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


class Sample:
    """Random tokens of a block and its self-attention, with large numbers in the padding."""

    def __init__(self, lengths: list[int], seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        number, longest = len(lengths), max(lengths)
        self.inside = mask_of(lengths)  # (B, N), without the class token
        self.valid = torch.cat([torch.ones(number, 1, dtype=torch.bool), self.inside], dim=1)
        logits = torch.randn(number, HEADS, 1 + longest, 1 + longest, generator=generator) * 2
        self.attention = logits.masked_fill(~self.valid[:, None, None, :], float("-inf")).softmax(dim=-1)
        self.x, self.outputs = (
            torch.randn(number, *shape, generator=generator) for shape in ((1 + longest, WIDTH), (HEADS, 1 + longest, 2))
        )
        self.inputs = torch.randn(number, 1 + longest, WIDTH, generator=generator)
        self.learnable = torch.randn(LEARNABLE, WIDTH, generator=generator)
        for tensor in (self.x, self.inputs, self.outputs.transpose(1, 2)):
            tensor[~self.valid] = 1e6
        self.attention = torch.where(self.valid[:, None, :, None], self.attention, torch.tensor(0.5))  # rows of padding

    def alone(self, index: int) -> "Sample":
        """Returns one sample as a batch of one without padding."""
        one = object.__new__(Sample)
        number = int(self.valid[index].sum())
        one.inside, one.valid, one.learnable = (
            self.inside[index : index + 1, : number - 1],
            self.valid[index : index + 1, :number],
            self.learnable,
        )
        one.x, one.inputs = self.x[index : index + 1, :number], self.inputs[index : index + 1, :number]
        one.outputs = self.outputs[index : index + 1, :, :number]
        one.attention = self.attention[index : index + 1, :, :number, :number]
        return one

    def run(self, rule: PruningRule, temperature: float):
        """prune's answer: tokens, valid, kept."""
        pruner = TokenPruner(WIDTH, LEARNABLE, WIDTH, rule)
        with torch.no_grad():
            aligned, _ = pruner.align(self.inputs, self.valid, self.learnable, features=False)
            statistics = map_statistics(self.attention, self.outputs, self.valid, rule)
            return pruner.prune(self.x, self.valid, aligned, statistics, temperature)


def importance_by_loops(sample: Sample, terms: tuple[str, ...]) -> Tensor:
    """Eq. 4-6 token by token."""
    result = torch.zeros(sample.inside.shape)
    for b in range(len(sample.x)):
        tokens = [k for k in range(1, sample.valid.shape[1]) if sample.valid[b, k]]
        raw = {"cls": [], "self": [], "token": []}
        for k in tokens:
            norms = [float(sample.outputs[b, h, k].norm()) for h in range(HEADS)]
            raw["cls"].append(sum(float(sample.attention[b, h, 0, k]) * norms[h] / sum(norms) for h in range(HEADS)))
            raw["self"].append(max(float(sample.attention[b, h, q, k]) for h in range(HEADS) for q in tokens))
            best = 0.0
            for learnable in sample.learnable:
                row = torch.tensor([float(learnable @ sample.inputs[b, j]) / WIDTH**0.5 for j in tokens]).softmax(dim=0)
                best = max(best, float(row[tokens.index(k)]))
            raw["token"].append(best)
        for k, *_ in zip(tokens, strict=True):
            shares = [raw[term][tokens.index(k)] / sum(raw[term]) for term in terms]
            result[b, k - 1] = sum(shares) / len(terms)
    return result


def parts(sample: Sample) -> tuple[Tensor, AttentionStatistics]:
    """A_token and the attention's statistics."""
    attention, _ = TokenPruner(WIDTH, LEARNABLE, WIDTH, PruningRule()).align(sample.inputs, sample.valid, sample.learnable, False)
    return attention, map_statistics(sample.attention, sample.outputs, sample.valid, PruningRule())


def gathered_by_loops(x: Tensor, valid: Tensor, importance: Tensor, kept: Tensor, merge: bool) -> list[list[list[float]]]:
    """Each sample's tokens after pruning, as long as it is."""
    samples = []
    for b in range(len(x)):
        tokens = [x[b, k].tolist() for k in range(x.shape[1]) if kept[b, k]]
        gone = [k for k in range(x.shape[1]) if valid[b, k] and not kept[b, k]]
        if merge and gone:
            weight = sum(float(importance[b, k]) for k in gone)
            tokens.append([sum(float(importance[b, k] * x[b, k, c]) for k in gone) / weight for c in range(x.shape[2])])
        samples.append(tokens)
    return samples
