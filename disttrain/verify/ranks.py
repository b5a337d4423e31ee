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
from contextlib import suppress
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from disttrain.interruption import die_with_parent
from disttrain.parallel.meeting import count_groups_from_zero

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
    with Ranks(lambda rank: fn(rank, *args)) as ranks:
        return ranks.run(world_size, timeout_s=timeout_s)


class Ranks:
    """Processes that wait to be the ranks of one world after another, which spares forking and first times.

    They call ``fn(rank, *args)`` of a function that reached them through the fork, with everything that it knows.
    """

    def __init__(self, fn: Callable[..., Any]):
        self._fn = fn
        self._workers: list[tuple[BaseProcess, Connection]] = []

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, world_size: int, *args: Any, timeout_s: float) -> list[Any]:
        """What each rank of a world gave, in order of rank. `args` are pickled. Raises RanksFailed as `run_ranks` does;
        the processes are other ones after that."""
        self._start(world_size)
        workers = self._workers[:world_size]
        with tempfile.TemporaryDirectory(prefix="disttrain-ranks-") as name:
            folder = Path(name)
            try:
                for rank, (_, connection) in enumerate(workers):
                    connection.send((rank, world_size, folder, timeout_s, args))
                waiting = _wait(workers, folder, timeout_s)
                outcomes = [_read(folder / f"rank{rank}") for rank in range(world_size)]
                if waiting or any(outcome is None or outcome[0] for outcome in outcomes):
                    self.close()  # waits for exit codes
            except BaseException:
                self.close()
                raise
        failed = sorted((o[0], rank, o[1]) for rank, o in enumerate(outcomes) if o is not None and o[0] > 0)
        died = {
            rank: workers[rank][0].exitcode or 0
            for rank, outcome in enumerate(outcomes)
            if outcome is None and rank not in waiting
        }
        if failed or died or waiting:
            raise RanksFailed(world_size, {rank: text for _, rank, text in failed}, died, waiting)
        return [outcome[1] for outcome in outcomes if outcome is not None]

    def close(self) -> None:
        """End them."""
        for process, connection in self._workers:
            if process.is_alive():
                process.kill()
            process.join()
            connection.close()
        self._workers = []

    def _start(self, world_size: int) -> None:
        context = get_context("fork")
        while len(self._workers) < world_size:
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(self._fn, theirs, os.getpid()))
            process.start()
            theirs.close()
            self._workers.append((process, ours))


def _wait(workers: Sequence[tuple[BaseProcess, Connection]], folder: Path, timeout_s: float) -> dict[int, str]:
    """Wait for the ranks; of those that have not returned in time, where each was."""
    deadline, failed = time.monotonic() + timeout_s, False
    pending = dict(enumerate(workers))
    while pending and (patience := deadline - time.monotonic()) > 0:
        wait([end for process, connection in pending.values() for end in (connection, process.sentinel)], patience)
        for rank, (process, connection) in list(pending.items()):
            if connection.poll():
                with suppress(EOFError):
                    connection.recv()
                    del pending[rank]
            if rank in pending and not process.is_alive():
                del pending[rank]
                failed = True
        if failed:
            failed, deadline = False, min(deadline, time.monotonic() + AFTER_A_FAILURE_S)
    for process, _ in pending.values():
        os.kill(process.pid or 0, signal.SIGUSR1)  # writes its stack
    if pending:
        time.sleep(0.2)
    return {rank: _place(folder / f"stack{rank}") for rank in pending}


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


def _worker(fn: Callable, tasks: Connection, parent: int) -> None:
    """Be a rank, as often as it is asked for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(os, "SCHED_BATCH"):  # with more ranks than cores: a rank that wakes up does not interrupt another one
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    torch.set_num_threads(1)
    gc.freeze()  # what the parent holds is no garbage: collections in a rank need not look at it
    count_groups_from_zero()
    with suppress(EOFError):
        die_with_parent(parent)
        while _rank(fn, *tasks.recv()):
            tasks.send(True)
    os._exit(1)  # after a failure: its connections end, so that the others notice


def _rank(fn: Callable, rank: int, world_size: int, folder: Path, timeout_s: float, args: tuple) -> bool:
    """Call it and write what it gave, or the traceback; whether it returned."""
    with open(folder / f"stack{rank}", "w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
        started = time.monotonic()
        try:
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
        faulthandler.unregister(signal.SIGUSR1)
    return not outcome[0]


def _read(path: Path) -> tuple[float, Any] | None:
    """(0, result) of a rank, (seconds until it failed, traceback), or None when it left nothing."""
    if not path.exists():
        return None
    with open(path, "rb") as file:
        return pickle.load(file)
