"""Devices that are asked for, and numbers on a command line."""

import argparse
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import utils
from tests.runs import refusal
from utils import SharedError, UserError, at_least_one, first_host, init_run, run_main, user_path


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


SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77"}
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def slurm(monkeypatch) -> Callable[..., tuple]:
    """Joins with these variables instead; returns those of torchrun, by which a process joins."""

    def joined(**variables: str) -> tuple:
        for name in (*NAMES, "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        for name, value in {**SLURM, **variables}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(utils, "_join", lambda *arguments: None)
        run = init_run("cpu")
        found = tuple(os.environ.get(name) for name in NAMES)
        assert (str(run.rank), str(run.world_size)) == (found[0] or "0", found[1] or "1")
        return found

    return joined


def test_processes_that_srun_starts_find_each_other(slurm):
    nodes = {"SLURM_STEP_NODELIST": "gpu[07-09,12],login1"}
    rank, processes, local, address, port = slurm(**nodes)
    assert (rank, processes, local, address) == ("5", "8", "1", "gpu07") and 1024 < int(port) < 65536
    assert slurm(**nodes, SLURM_PROCID="0", SLURM_LOCALID="0")[3:] == (address, port)
    assert slurm(**nodes, SLURM_STEP_ID="1")[4] != port
    assert slurm(MASTER_ADDR="here", MASTER_PORT="29500") == ("5", "8", "1", "here", "29500")
    assert slurm(**nodes, CUDA_VISIBLE_DEVICES="3")[2] == "0"  # the one GPU that it sees
    assert slurm(**nodes, CUDA_VISIBLE_DEVICES="2,3")[2] == "1"


def test_torchrun_goes_before_slurm_and_one_process_needs_neither(slurm):
    torchrun = dict(zip(NAMES, ("1", "2", "1", "localhost", "29500"), strict=True))
    assert slurm(**torchrun) == tuple(torchrun.values())
    assert slurm(SLURM_NTASKS="1", SLURM_PROCID="0") == (None,) * 5


def test_processes_that_cannot_know_where_to_meet_are_told(slurm):
    with pytest.raises(UserError, match="process 5 of 8, but not where they meet; start the script with srun or torchrun"):
        slurm()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a1", "a1"), ("a1,b2", "a1"), ("n[003-7,9],x", "n003"), ("r2n[5,8]-ib", "r2n5-ib"), ("10.0.0.1", "10.0.0.1")],
)
def test_the_first_host_of_a_list_is_found(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(("rank", "lines"), [(0, 1), (1, 0)])
def test_what_all_processes_find_wrong_is_told_once(monkeypatch, capsys, rank, lines):
    def agreed():
        raise SharedError("wrong")

    monkeypatch.setattr(utils.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(utils.dist, "get_rank", lambda: rank)
    with pytest.raises(SystemExit) as left:
        run_main(agreed)
    assert left.value.code == 2 and capsys.readouterr().err.count("error: wrong") == lines


def test_a_process_that_loses_another_says_so_in_a_line(monkeypatch, capsys):
    def reduce():
        raise RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:22501")

    with pytest.raises(RuntimeError):
        run_main(reduce)
    monkeypatch.setattr(utils.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(utils.dist, "get_rank", lambda: 1)
    with pytest.raises(SystemExit) as left:
        run_main(reduce)
    assert left.value.code == 1 and capsys.readouterr().err == "process 1 ends, because another one has ended\n"
