"""Run a function on several ranks: forked processes, gloo, a file store; no ports, no retries."""

import faulthandler
import gc
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from disttrain.interruption import die_with_parent

AFTER_A_FAILURE_S = 2.0
"""How long the other ranks may go on after one has failed: often they wait for it."""
_PACKAGE = str(Path(__file__).resolve().parent.parent) + os.sep


class RanksFailed(RuntimeError):
    """Some ranks raised, died or did not return in time."""

    def __init__(self, world_size: int, raised: dict[int, str], died: dict[int, int], waiting: dict[int, str]):
        self.raised = raised
        """Traceback of each rank that raised, the first one first."""
        self.died = died
        """Exit code of each rank that ended without a word; a signal is a negative number."""
        self.waiting = waiting
        """Ranks that were still running when time was up, or when another had failed, and where they were."""
        super().__init__(self._text(world_size))

    @property
    def hung(self) -> bool:
        """Whether nobody failed, and time was up all the same."""
        return not self.raised and not self.died

    def _text(self, world_size: int) -> str:
        where = "; ".join(f"rank {rank} was in {place}" for rank, place in self.waiting.items())
        if self.raised:
            rank, text = next(iter(self.raised.items()))
            return f"rank {rank} of {world_size} failed:\n{text}{where}"
        if self.died:
            codes = ", ".join(f"rank {rank} (exit code {code})" for rank, code in self.died.items())
            return f"of {world_size} ranks, these gave no result: {codes}. {where}"
        return f"of {world_size} ranks, these did not return in time: {', '.join(map(str, self.waiting))}. {where}"


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120) -> list[Any]:
    """Call ``fn(rank, *args)`` on every rank of a gloo world; return what each gave, in order of rank.

    Arguments reach the ranks through the fork, so large ones cost nothing. The caller must not have computed on
    several threads before. Raises RanksFailed when a rank raises, dies, or does not return within `timeout_s` seconds.
    """
    context = get_context("fork")
    with tempfile.TemporaryDirectory(prefix="disttrain-ranks-") as name:
        folder = Path(name)
        processes = [
            context.Process(target=_rank, args=(fn, rank, world_size, folder, os.getpid(), timeout_s, args))
            for rank in range(world_size)
        ]
        waiting: dict[int, str] = {}
        try:
            for process in processes:
                process.start()
            waiting = _wait(processes, folder, timeout_s)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        outcomes = [_read(folder / f"rank{rank}") for rank in range(world_size)]
    failed = sorted((o[0], rank, o[1]) for rank, o in enumerate(outcomes) if o is not None and o[0] > 0)
    died = {
        rank: processes[rank].exitcode or 0
        for rank, outcome in enumerate(outcomes)
        if outcome is None and rank not in waiting
    }
    if failed or died or waiting:
        raise RanksFailed(world_size, {rank: text for _, rank, text in failed}, died, waiting)
    return [outcome[1] for outcome in outcomes if outcome is not None]


def _wait(processes: Sequence[BaseProcess], folder: Path, timeout_s: float) -> dict[int, str]:
    """Wait for the ranks; of those that have not ended in time, where each was."""
    deadline, failed = time.monotonic() + timeout_s, False
    while any(p.is_alive() for p in processes) and time.monotonic() < deadline:
        if not failed and any(p.exitcode not in (None, 0) for p in processes):
            failed, deadline = True, min(deadline, time.monotonic() + AFTER_A_FAILURE_S)
        time.sleep(0.01)
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in late:
        os.kill(processes[rank].pid or 0, signal.SIGUSR1)  # writes its stack
    if late:
        time.sleep(0.2)
    return {rank: _place(folder / f"stack{rank}") for rank in late}


def _place(stack: Path) -> str:
    """The innermost frame of our own code in a stack that faulthandler wrote, and the frame that waits."""
    lines = [line.strip() for line in stack.read_text().splitlines()] if stack.exists() else []
    main = next((i for i, line in enumerate(lines) if line.startswith("Current thread")), None)
    if main is None:
        return "an unknown place"
    frames = [line.removeprefix("File ") for line in lines[main + 1 :] if line.startswith("File ")]
    own = next((frame for frame in frames if _PACKAGE in frame), None)
    waits = frames[0].rsplit(" in ", 1)[-1] if frames else "no Python code"
    return waits if own is None else f"{waits}, called from {own.rsplit(os.sep, 1)[-1].replace(chr(34), '')}"


def _rank(fn: Callable, rank: int, world_size: int, folder: Path, parent: int, timeout_s: float, args: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(os, "SCHED_BATCH"):  # with more ranks than cores: a rank that wakes up does not interrupt another one
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    torch.set_num_threads(1)
    gc.freeze()  # what the parent holds is no garbage: collections in a rank need not look at it
    with open(folder / f"stack{rank}", "w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
        started = time.monotonic()
        try:
            die_with_parent(parent)
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(str(folder / "store"), world_size),
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout_s + 30),  # the parent's patience ends first
            )
            outcome: tuple[float, Any] = (0.0, fn(rank, *args))
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:
            outcome = (time.monotonic() - started, traceback.format_exc())
        part = folder / f"rank{rank}.part"
        with open(part, "wb") as file:
            pickle.dump(outcome, file)
        part.rename(folder / f"rank{rank}")
    os._exit(1 if outcome[0] else 0)


def _read(path: Path) -> tuple[float, Any] | None:
    """(0, result) of a rank, (seconds until it failed, traceback), or None when it left nothing."""
    if not path.exists():
        return None
    with open(path, "rb") as file:
        return pickle.load(file)
