"""Run a function on several ranks: forked processes, gloo, a file store; no ports, no retries."""

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120) -> list[Any]:
    """Call ``fn(rank, *args)`` on every rank of a gloo world; return what each gave, in order of rank.

    Raises RuntimeError with the traceback of the first rank that failed, or on a time-out.
    """
    context = get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(fn, rank, world_size, folder, timeout_s, args), daemon=False)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout_s
        while any(p.is_alive() for p in processes) and time.monotonic() < deadline:
            if any(p.exitcode not in (None, 0) for p in processes):
                deadline = min(deadline, time.monotonic() + 2)
            time.sleep(0.01)
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
        outcomes = [_read(os.path.join(folder, f"rank{rank}")) for rank in range(world_size)]
    for rank, outcome in enumerate(outcomes):
        if isinstance(outcome, str):
            raise RuntimeError(f"rank {rank} of {world_size} failed:\n{outcome}")
    for rank, outcome in enumerate(outcomes):
        if outcome is None:
            raise RuntimeError(f"rank {rank} of {world_size} gave no result (exit code {processes[rank].exitcode})")
    return [outcome[0] for outcome in outcomes]  # type: ignore[index]


def _rank(fn: Callable, rank: int, world_size: int, folder: str, timeout_s: float, args: tuple) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(os.path.join(folder, "store"), world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        outcome: Any = (fn(rank, *args),)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        outcome = traceback.format_exc()
    with open(os.path.join(folder, f"rank{rank}.part"), "wb") as file:
        pickle.dump(outcome, file)
    os.rename(os.path.join(folder, f"rank{rank}.part"), os.path.join(folder, f"rank{rank}"))
    os._exit(0 if isinstance(outcome, tuple) else 1)


def _read(path: str) -> tuple | str | None:
    if not os.path.exists(path):
        return None
    with open(path, "rb") as file:
        return pickle.load(file)
