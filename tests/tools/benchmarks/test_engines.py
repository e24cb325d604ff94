"""Engines on a GPU: the deployment form is compiled into CUDA graphs, and exported files are refused."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from tools.benchmarks import engines
from utils import UserError


@pytest.mark.parametrize(("device", "mode"), [("cpu", None), ("cuda", "reduce-overhead"), ("cuda:1", "reduce-overhead")])
def test_the_deployment_form_is_compiled_into_cuda_graphs_on_a_gpu_alone(monkeypatch, device, mode):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda module, **options: asked.append(options) or module)
    module, _ = engines.compiled(Namespace(device=device), SimpleNamespace(module=len), ())
    assert module is len and asked == [{"dynamic": False, "mode": mode}]


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_exported_files_are_timed_on_a_cpu_alone(engine):
    flags = dict.fromkeys(("train", "metered", "sparse", "shapes", "amp", "temperature"))
    args = Namespace(**flags, against="dense", task="vit", engine=engine, precision="fp32", device="cuda")
    if engine in ("torch", "compile"):
        engines.check_engine(args)
    else:
        with pytest.raises(UserError, match=f"engine {engine} runs on the CPU here; use --device cpu"):
            engines.check_engine(args)
