"""Devices that are asked for, and numbers on a command line."""

import argparse
import errno
import os
from pathlib import Path

import pytest
import torch

import utils
from tests.runs import refusal
from utils import UserError, at_least_one, init_run, run_main, user_path


@pytest.mark.parametrize(
    ("device", "processes", "rank", "said"),
    [
        ("cuda:2", 1, 0, "GPU 2 is not there, this machine has 2"),
        ("cuda", 3, 2, "GPU 2 is not there, this machine has 2; start fewer processes"),
        ("cuda:1", 2, 0, "2 processes cannot share a GPU; pass --device cuda"),
        ("gpu", 1, 0, "there is no such kind of device"),
    ],
)
def test_a_gpu_that_cannot_be_had_is_refused(monkeypatch, device, processes, rank, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("WORLD_SIZE", processes), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=said):
        init_run(device)


@pytest.mark.parametrize(("device", "rank", "own"), [("cuda", 1, 1), ("cuda:1", 0, 1), ("cuda", 0, 0)])
def test_a_gpu_becomes_the_processs_own(monkeypatch, device, rank, own):
    """Objects made without naming a device, such as a kernel's stream, belong to it too."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(utils, "seed_everything", lambda seed: None)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    allowed = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", allowed.append)
    assert init_run(device).device == torch.device("cuda", own) and current == [torch.device("cuda", own)]
    assert allowed == [False] and not torch.backends.cudnn.allow_tf32


def test_a_count_is_at_least_one():
    assert at_least_one("3") == 3
    with pytest.raises(argparse.ArgumentTypeError, match="must be at least 1, got 0"):
        at_least_one("0")


def test_a_tilde_in_a_tools_path_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/out") == tmp_path / "out" and user_path("a~/b") == Path("a~/b")
    assert user_path("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "No space left on device; make room"), (errno.EACCES, "Permission denied; change what is allowed there")],
)
def test_a_file_that_the_system_refuses_is_the_users_to_mend(capsys, number, said):
    def write():
        raise OSError(number, os.strerror(number), "log.txt")

    assert f"error: log.txt: {said}" in refusal(capsys, write)


def test_other_errors_of_the_system_keep_their_traceback():
    def receive():
        raise ConnectionResetError(errno.ECONNRESET, "reset")

    with pytest.raises(ConnectionResetError):
        run_main(receive)
