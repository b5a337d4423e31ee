"""The rehearsals of all ranks that differ, a few at a time in processes of their own."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from disttrain.config.schema import Config
from disttrain.failures import unwrapped
from disttrain.hang import stacks
from disttrain.hang.observer import raised_at
from disttrain.mesh import Mesh, build_mesh
from disttrain.rehearsal.records import Trace
from disttrain.rehearsal.trace import trace

FEW = 8
"""Ranks that are not worth a process: the first one in it takes several times as long as the next."""


def ranks_that_differ(mesh: Mesh) -> list[int]:
    """All ranks but those that only read other sequences: of the replicas, and of what ZeRO shards over, the first two and
    the last one."""
    kept = {axis: {0, 1, getattr(mesh, axis) - 1} for axis in ("replicate", "shard")}
    return [
        rank for rank in range(mesh.world_size)
        if all(mesh.coordinates(rank)[axis] in places for axis, places in kept.items())
    ]  # fmt: skip


def ranks_that_hold_most(mesh: Mesh) -> list[int]:
    """One of each pipeline rank: parts that are not even are largest on the first ranks of an axis."""
    return [
        rank for rank in range(mesh.world_size)
        if all(at == 0 for axis, at in mesh.coordinates(rank).items() if axis != "pipeline")
    ]  # fmt: skip


def rehearse(config: Config, world_size: int) -> list[Trace]:
    """The traces of all ranks that differ, by rank, with the live bytes of those that hold most."""
    ranks = ranks_that_differ(build_mesh(config.parallel, world_size))
    processes = min(len(ranks) // FEW, len(os.sched_getaffinity(0)))
    if processes < 2:
        return [_rehearse(config, world_size, rank) for rank in ranks]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        return list(pool.map(partial(_rehearse, config, world_size), ranks))


def _rehearse(config: Config, world_size: int, rank: int) -> Trace:
    try:
        return trace(
            config, world_size, rank, count=rank in ranks_that_hold_most(build_mesh(config.parallel, world_size))
        )
    except Exception as raised:
        error = unwrapped(raised)
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        if isinstance(error, DynamicOutputShapeException | DataDependentOutputException):
            text = f"what {error.func} gives depends on values, which a rehearsal does not have"
        return Trace(rank, error=text, at=stacks.place(raised_at(error)))
