"""Signals that ask a run to stop, sent to real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs.conftest import Workplace

LISTENING = """
import signal, time
from disttrain import interruption
interruption.ALREADY_COUNTED_S = 0.0
interruption = interruption.Interruption().listen()
print("listening", flush=True)
while not interruption.requested: time.sleep(0.01)
print(interruption.signal.name, flush=True)
time.sleep({seconds})
"""


def process(seconds: float) -> subprocess.Popen:
    started = subprocess.Popen([sys.executable, "-c", LISTENING.format(seconds=seconds)], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)  # fmt: skip
    assert started.stdout and started.stdout.readline() == "listening\n"
    return started


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_each_signal_is_a_request(number: signal.Signals) -> None:
    asked = process(0)
    asked.send_signal(number)
    assert asked.communicate(timeout=60)[0] == f"{number.name}\n"
    assert asked.returncode == 0


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 130), (signal.SIGUSR1, 0)])
def test_a_repeated_warning_does_not_end_a_process_at_once(number: signal.Signals, code: int) -> None:
    asked = process(3)
    asked.send_signal(signal.SIGUSR1)
    assert asked.stdout and asked.stdout.readline() == "SIGUSR1\n"
    asked.send_signal(number)
    assert asked.wait(60) == code


def test_local_ranks_save_on_a_warning(tmp_path: Path) -> None:
    workplace = Workplace(tmp_path)
    running = workplace.start("train", "run.yaml", "--nproc", "2", "train.steps=100000", "train.eval_every=0")
    deadline = time.monotonic() + 200
    while not workplace.records("run", "step"):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGUSR1)
    output = running.communicate(timeout=200)
    assert running.returncode == 130, output
    assert "stopped at once" not in output
    last = workplace.records("run", "step")[-1]["step"]
    assert (tmp_path / f"runs/run/checkpoints/step_{last:08d}").is_dir()
    assert (tmp_path / "runs/run/loss_curve.png").is_file()


def test_doctor_ends_with_the_first_interruption(tmp_path: Path) -> None:
    """Ctrl-C goes to the command and to its ranks, wherever they are: starting, meeting or measuring."""
    command = [sys.executable, "-m", "disttrain", "doctor", "--nproc", "2"]
    running = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)  # fmt: skip
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    deadline = time.monotonic() + 100
    while len(children.read_text().split()) < 2:
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)
    os.killpg(running.pid, signal.SIGINT)
    _, said = running.communicate(timeout=30)
    assert said.endswith("disttrain: interrupted; nothing is lost, the same command goes on\n")
    assert running.returncode == 130
