"""How a run is started, waited for and stopped: an ordinary command in a process group of its own. Imports no torch."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import psutil

from disttrain.interruption import Interruption, die_with_parent

LOOK_S = 0.5
"""Seconds between two looks at a run: seldom enough to take nothing from it."""
STOP_S = 120.0
"""How long a run that is asked to stop may take to save a checkpoint and end, before it is killed."""


@dataclass(frozen=True)
class Starter:
    """One way to start ranks."""

    words: tuple[str, ...]
    """Command; `train CONFIG ...` is put behind it."""
    stop: signal.Signals = signal.SIGTERM
    """What makes its ranks save a checkpoint and end (docs/launchers.md)."""


_RANK = ("{python}", "-m", "disttrain")
STARTERS = {
    "local": Starter(_RANK),
    "torchrun": Starter(("{python}", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "{nproc}",
                         "-m", "disttrain")),
    "mpirun": Starter(("mpirun", "--bind-to", "none", "-n", "{nproc}", *_RANK), signal.SIGUSR1),
    "horovodrun": Starter(("horovodrun", "-np", "{nproc}", *_RANK)),
    "srun": Starter(("srun", "--ntasks", "{nproc}", "--kill-on-bad-exit=0", "--wait=600", *_RANK),
                    signal.SIGUSR1),
}  # fmt: skip
"""Launchers that a sweep names by a word."""


def starter(launcher: str | Sequence[str]) -> Starter:
    """The launcher of a sweep: one of `STARTERS`, or words of the user's own."""
    return STARTERS[launcher] if isinstance(launcher, str) else Starter(tuple(launcher))


def command(
    launcher: str | Sequence[str], config: str, nproc: int, words: Sequence[str], ranks_per_node: int | None = None
) -> list[str]:
    """The command that trains a config on `nproc` ranks; `words` are settings.

    With `ranks_per_node` srun takes as few nodes as hold the ranks.
    """
    words_of_launcher = [word.replace("{nproc}", str(nproc)).replace("{python}", sys.executable)
                         for word in starter(launcher).words]  # fmt: skip
    nodes = ["--nodes", str(-(-nproc // ranks_per_node))] if launcher == "srun" and ranks_per_node else []
    first = [*words_of_launcher[:1], *nodes, *words_of_launcher[1:]]
    local = ["--nproc", str(nproc)] if launcher == "local" else []
    return [*first, "train", config, *local, *words]


Ending = Literal["exited", "timeout", "interrupted"]


def run(
    words: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    timeout_s: float,
    stop: signal.Signals,
    interruption: Interruption,
    look: Callable[[], None],
) -> tuple[Ending, int]:
    """Run a command to its end, its output behind what is in `log`; how it ended and its exit code.

    `look` is called every `LOOK_S` seconds. A command that takes longer than `timeout_s`, or that somebody interrupts, is
    sent `stop`, and killed where that takes longer than `STOP_S`. Nothing of its process group is left. Raises OSError
    where the command cannot be started.
    """
    ending: Ending = "exited"
    with log.open("ab") as output:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=dict(environment),
            start_new_session=True, preexec_fn=partial(die_with_parent, os.getpid()),
        )  # fmt: skip
    deadline = time.monotonic() + timeout_s
    try:
        while process.poll() is None:
            if interruption.requested:
                ending = "interrupted"
            elif time.monotonic() >= deadline:
                ending = "timeout"
            if ending != "exited":
                _end(process, stop)
                break
            look()
            time.sleep(LOOK_S)
    finally:
        _kill(process)
    return ending, process.returncode


def _end(process: subprocess.Popen, stop: signal.Signals) -> None:
    """Ask a command to stop and wait as long as it may take."""
    process.send_signal(stop)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)


def _kill(process: subprocess.Popen) -> None:
    """End whatever is left of a command: itself, what it has started, and their process group."""
    children = []
    if process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(process.pid).children(recursive=True)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()
