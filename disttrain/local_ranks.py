"""Start local ranks: processes of this command that join one world on this host and end together.

Where there is no GPU they are forked, after torch was imported: importing takes seconds of each process otherwise. CUDA
does not survive a fork, so that next to GPUs each rank is a fresh Python process.
"""

import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from typing import Literal

import psutil
import torch
from torch.distributed import TCPStore

from disttrain.failures import INTERRUPTED, exit_code
from disttrain.interruption import SIGNALS, Interruption, die_with_parent
from disttrain.launch.launchers import LOCAL_RANKS
from disttrain.launch.master import LOOPBACK

GRACE_S = 30.0
"""How long the other ranks may take to end once one has failed; torchrun's figure."""

Method = Literal["fork", "spawn"]


def start(ranks: int, fn: Callable[[Interruption], int], interruption: Interruption | None, method: Method) -> int:
    """Call `fn` on `ranks` local ranks and wait; the exit code to end with, 0 where all of them gave 0.

    `fn` finds its rank in the environment, as under any launcher, and asks its argument whether to stop; with "spawn"
    it is pickled. It gives its exit code, or raises. Ctrl-C, SIGTERM and SIGUSR1 are passed on to the ranks,
    which save a checkpoint and end with 130; without an `interruption` there is nothing to save, the ranks are killed and
    KeyboardInterrupt is raised. When a rank fails the others are told to end, and killed after `GRACE_S`; those that are
    stopped are killed at once, and those whose peer was interrupted are left to end.
    """
    context = get_context("fork") if method == "fork" else get_context("spawn")
    port, known = context.Value("i", 0), context.Event()
    gc.freeze()  # what is imported is no garbage, and stays shared with the ranks as long as nobody writes to it
    processes = [
        context.Process(target=_rank, args=(fn, rank, ranks, os.getpid(), port, known)) for rank in range(ranks)
    ]

    def pass_on(number: int, frame: object = None) -> None:
        if interruption is None:
            raise KeyboardInterrupt
        for process in processes:
            if process.is_alive():
                os.kill(process.pid or 0, number)

    try:
        for process in processes:
            process.start()
        for number in SIGNALS:
            signal.signal(number, pass_on)
        if interruption and interruption.signal:  # it came before there was anybody to pass it on to
            pass_on(interruption.signal)
        store = TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)  # starts a thread: not before the fork
        port.value = store.port
        known.set()
        return _exit_code(_wait(processes))
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()


def method() -> Method:
    """How ranks can be started on this host; asks nothing of CUDA that would start it."""
    return "fork" if sys.platform == "linux" and not torch.cuda.device_count() else "spawn"


def _rank(fn: Callable[[Interruption], int], rank: int, ranks: int, parent: int, port, known) -> None:
    interruption = Interruption().listen()

    def run() -> int:
        die_with_parent(parent)
        known.wait()
        os.environ |= {
            LOCAL_RANKS: str(ranks),
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": LOOPBACK,
            "MASTER_PORT": str(port.value),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the parent has the store, no rank opens a port
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads did not survive the fork
        return fn(interruption)

    sys.exit(exit_code(run))


def _wait(processes: Sequence[BaseProcess]) -> dict[int, int]:
    """Wait for all ranks; the exit codes of those that failed on their own."""
    running, failed, deadline = dict(enumerate(processes)), {}, None
    while running:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        connection.wait([process.sentinel for process in running.values()], left)
        ended = {rank: process for rank, process in running.items() if not process.is_alive()}
        running = {rank: process for rank, process in running.items() if rank not in ended}
        codes = {rank: process.exitcode for rank, process in ended.items() if process.exitcode}
        if codes and deadline is None:
            failed, deadline = codes, time.monotonic() + GRACE_S
            for process in running.values():
                if _is_stopped(process):
                    process.kill()
                elif set(codes.values()) != {INTERRUPTED}:  # then all have agreed to stop: this one is about to end
                    process.terminate()
        elif deadline is not None and time.monotonic() >= deadline:
            for process in running.values():
                process.kill()
    return failed


def _is_stopped(process: BaseProcess) -> bool:
    """Whether somebody has sent it SIGSTOP: it hears no other signal but SIGKILL."""
    try:
        return psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def _exit_code(codes: dict[int, int]) -> int:
    """130 for an interruption, 2 for refused input, otherwise 1; says which ranks were killed."""
    for rank, code in sorted(codes.items()):
        if code < 0:
            name = signal.Signals(-code).name
            print(f"disttrain: rank {rank} was killed by {name}; the same command resumes the run", file=sys.stderr)
    return next((code for code in (INTERRUPTED, 2, 1) if code in codes.values()), 1 if codes else 0)
