"""Local ranks, forked and spawned: one world, one end, one exit code."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.warm import Running

SCRIPT = """
import json, os, signal, sys, time
import torch, torch.distributed as dist
from disttrain import local_ranks
from disttrain.config.problems import Problem, RefusedInput
from disttrain.failures import exit_code
from disttrain.interruption import Interruption
from disttrain.launch import detect

def behave(interruption):
    rank = detect(os.environ)
    open(f"pid{rank.rank}", "w").write(str(os.getpid()))
    match sys.argv[2]:
        case "sum":
            dist.init_process_group("gloo")
            total = torch.tensor(float(rank.rank))
            dist.all_reduce(total)
            json.dump({**vars(rank), "total": total.item()}, open(f"rank{rank.rank}", "w"))
            dist.destroy_process_group()
        case "one refuses" if rank.rank == 1:
            raise RefusedInput([Problem(("setting=1",), "this cannot be", "do something else")])
        case "measure":
            time.sleep(60)
        case "one raises" if rank.rank == 1:
            raise KeyError("unexpected")
        case _:
            while not interruption.requested:
                time.sleep(0.01)
            if sys.argv[2] == "one is late" and rank.rank == 1:
                interruption._since = time.monotonic() - 10  # another signal would end it at once
                time.sleep(1)
            return 130
    return 0

if __name__ == "__main__":
    sys.exit(exit_code(lambda: local_ranks.start(
        3, behave, None if sys.argv[2] == "measure" else Interruption().listen(), sys.argv[1])))
"""


def started(folder: Path, what: str) -> Running:
    (folder / "script.py").write_text(SCRIPT)
    return Running(["fork", what], folder, os.environ, folder / "script.py")


def wait_for_pids(folder: Path, process: Running) -> list[int]:
    files = [folder / f"pid{rank}" for rank in range(3)]
    deadline = time.monotonic() + 100
    while not all(file.exists() and file.read_text() for file in files):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return [int(file.read_text()) for file in files]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_ranks_meet_and_know_their_places(tmp_path: Path, method: str) -> None:
    if method == "fork":
        process = started(tmp_path, "sum")
        assert (process.communicate(100), process.returncode) == ("", 0)
    else:  # a script of its own, which the ranks read again
        (tmp_path / "script.py").write_text(SCRIPT)
        done = subprocess.run([sys.executable, "script.py", method, "sum"], cwd=tmp_path, check=True, timeout=100,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        assert done.stdout == b""
    for rank in range(3):
        found = json.loads((tmp_path / f"rank{rank}").read_text())
        assert found["total"] == 3.0
        assert (found["launcher"], found["rank"], found["world_size"]) == ("local", rank, 3)
        assert (found["local_rank"], found["local_world_size"], found["node_rank"], found["nodes"]) == (rank, 3, 0, 1)


@pytest.mark.parametrize("what, code, says", [("one refuses", 2, ""), ("one raises", 1, "KeyError: 'unexpected'")])
def test_one_failure_ends_all(tmp_path: Path, what: str, code: int, says: str) -> None:
    process = started(tmp_path, what)
    assert says in process.communicate(timeout=60)
    assert process.returncode == code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_every_rank(tmp_path: Path, number: signal.Signals) -> None:
    process = started(tmp_path, "wait")
    wait_for_pids(tmp_path, process)
    process.send_signal(number)
    assert process.communicate(timeout=60) == ""
    assert process.returncode == 130


def test_a_rank_that_saves_longer_than_its_peers_is_left_alone(tmp_path: Path) -> None:
    process = started(tmp_path, "one is late")
    wait_for_pids(tmp_path, process)
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=60) == ""
    assert process.returncode == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ranks_without_anything_to_save_end_at_once(tmp_path: Path, number: signal.Signals) -> None:
    process = started(tmp_path, "measure")
    pids = wait_for_pids(tmp_path, process)
    for pid in pids if number == signal.SIGINT else ():  # which a terminal sends to all
        os.kill(pid, number)
    process.send_signal(number)
    assert process.communicate(timeout=30) == "disttrain: interrupted; nothing is lost, the same command goes on\n"
    assert process.returncode == 130
    assert not any(Path(f"/proc/{pid}/cmdline").exists() for pid in pids)


def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    process = started(tmp_path, "wait")
    pids = wait_for_pids(tmp_path, process)
    os.kill(pids[1], signal.SIGKILL)
    assert process.communicate(timeout=60) == (
        "disttrain: rank 1 was killed by SIGKILL; the same command resumes the run\n"
    )
    assert process.returncode == 1


def test_ranks_end_with_their_parent(tmp_path: Path) -> None:
    process = started(tmp_path, "wait")
    pids = wait_for_pids(tmp_path, process)
    process.kill()
    process.wait(60)
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)
