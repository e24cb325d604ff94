"""Checks of exported files: a deviation is refused, ties are told apart from it, and a missing package is named."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tools.exports import writing
from tools.exports.engines import instruction_sets, needed
from tools.exports.writing import Check, check, deciding_products, deviation, is_decided
from utils import UserError


class Shifted:
    """An engine that is off by a constant."""

    name, version = "shifted", "1"

    def __init__(self, by: float):
        self.by = by

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [2 * x + self.by]


def double() -> SimpleNamespace:
    return SimpleNamespace(module=lambda x: (2 * x,), name="double", inputs=("x",))


def test_the_deviation_is_relative_to_the_largest_value_of_an_output():
    assert deviation([torch.tensor([1.0, 4.0])], [torch.tensor([1.0, 4.4])]) == pytest.approx(0.1)
    assert deviation([torch.ones(2)], [torch.tensor([1.0, float("nan")])]) == float("inf")


def test_every_sample_is_compared_alone_and_in_a_batch():
    samples = [(torch.tensor([[1.0, 2.0]]),), (torch.tensor([[4.0, 1.0]]),)]
    found = check(double(), Shifted(0.04), samples)
    assert (found.samples, found.undecided, found.engine) == (2, 0, "shifted")
    assert found.deviation == pytest.approx(0.01)  # of the largest output of the first sample, 4
    assert check(double(), Shifted(0.04), samples, number=1).samples == 1


def test_a_file_that_deviates_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "write_onnx", lambda part, example, path: path.write_bytes(b""))
    monkeypatch.setattr(writing, "opened_engine", lambda path, precision="fp32": Shifted(0.04))
    with pytest.raises(UserError, match="double.onnx: deviates from PyTorch by 1.0e-02 in shifted .*; more than 0.0001"):
        writing.write(double(), "onnx", False, tmp_path, [(torch.tensor([[1.0, 2.0]]),)])


def test_only_a_result_that_rounding_turns_over_is_a_tie():
    assert is_decided(lambda x: (2 * x,), (torch.tensor([[1.0, 2.0]]),))
    tied = torch.full((1, 64), 0.5)
    assert not is_decided(lambda x: (torch.nn.functional.one_hot(x.argmax(dim=1), 64).float(),), (tied,))
    assert is_decided(lambda ids: (ids.float(),), (torch.tensor([[3, 4]]),))  # whole numbers have no rounding


def test_samples_left_out_are_counted():
    def step(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.nn.functional.one_hot(x.argmax(dim=1), 64).float(),)

    tied, clear = torch.full((1, 64), 0.5), torch.linspace(0, 1, 64)[None]
    part = SimpleNamespace(module=step)
    found = check(
        part, type("Last", (Shifted,), {"__call__": lambda self, x: [step(x.flip(1))[0].flip(1)]})(0.0), [(tied,), (clear,)]
    )
    assert (found.undecided, found.deviation) == (1, 0.0)
    assert str(Check("e", "1", 0.0, 2, 1)).endswith("(2 samples, 1 of them left out as ties)")


@pytest.mark.parametrize(("package", "extra"), [("onnxscript", "onnx"), ("nncf", "onnx,openvino")])
def test_a_missing_package_is_named_with_what_to_install(monkeypatch, package, extra):
    def failing(name: str):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", failing)
    with pytest.raises(UserError, match=rf"needs the package {package}; install it with: pip install -e '\.\[{extra}\]'"):
        needed(package)


def test_instruction_sets_are_names():
    assert all(name == name.lower() or name.isupper() for name in instruction_sets())


class Node:
    """An operator of an OpenVINO model, as far as the search for products looks at it."""

    def __init__(self, name: str, kind: str, *inputs: "Node", data: np.ndarray | None = None):
        self.name, self.kind, self.inputs, self.data = name, kind, inputs, data

    def get_node(self) -> "Node":
        return self

    def get_type_name(self) -> str:
        return self.kind

    def get_friendly_name(self) -> str:
        return self.name

    def input_values(self) -> tuple["Node", ...]:
        return self.inputs

    def input_value(self, index: int) -> "Node":
        return self.inputs[index]


def test_products_that_decide_are_those_of_activations_and_those_with_the_learnable_tokens():
    learnable, weight = torch.randn(4, 3), np.ones((4, 3), dtype=np.float32)
    tokens, layer = Node("tokens", "Parameter"), Node("weight", "Constant", data=weight)
    constant = Node("learnable", "Constant", data=learnable.numpy())
    operators = [
        Node("linear", "MatMul", tokens, layer),
        Node("transposed linear", "MatMul", tokens, Node("moved", "Transpose", layer, Node("order", "Constant"))),
        Node("map", "MatMul", tokens, Node("keys", "Transpose", tokens, Node("order", "Constant"))),
        Node("alignment", "MatMul", tokens, constant),
        Node("folded alignment", "MatMul", tokens, Node("turned", "Constant", data=learnable.numpy().T)),
        Node("sum", "Add", tokens, tokens),
    ]
    model = SimpleNamespace(get_ordered_ops=lambda: operators)
    assert deciding_products(model, learnable) == ["map", "alignment", "folded alignment"]
    assert deciding_products(model, None) == ["map"]
