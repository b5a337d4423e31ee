"""The rehearsals of all ranks that differ, a few at a time in processes of their own."""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial

from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from disttrain.config.load import with_values
from disttrain.config.schema import Config, ParallelConfig
from disttrain.costs import CHUNK_ELEMENTS
from disttrain.failures import unwrapped
from disttrain.hang import stacks
from disttrain.hang.observer import raised_at
from disttrain.memory import in_flight
from disttrain.mesh import Mesh, build_mesh
from disttrain.rehearsal.records import Trace
from disttrain.rehearsal.trace import trace
from disttrain.stages import virtual_stages

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


def count_most(config: Config, world_size: int, pipeline_rank: int, device_type: str) -> Trace:
    """The trace of the rank that holds most of a pipeline rank, with its live bytes.

    The step is no longer than it takes to hold as much: one of thousands of micro-batches is counted in the time of a few.
    """
    mesh = build_mesh(config.parallel, world_size)
    sequences = config.train.global_batch_size // mesh.data_ranks
    size = config.train.micro_batch_size or sequences
    count = micro_batches_that_fill(config.parallel, sequences // size)
    short = with_values(config, {"train.global_batch_size": mesh.data_ranks * size * count})
    with rows_widened_as_on(device_type):
        return _rehearse(short, world_size, ranks_that_hold_most(mesh)[pipeline_rank])


@contextmanager
def rows_widened_as_on(device_type: str) -> Iterator[None]:
    """Let the loss take as many rows of logits at once as on this kind of device, though they are on a CPU here."""
    here = CHUNK_ELEMENTS["cpu"]
    CHUNK_ELEMENTS["cpu"] = CHUNK_ELEMENTS[device_type]
    try:
        yield
    finally:
        CHUNK_ELEMENTS["cpu"] = here


def micro_batches_that_fill(parallel: ParallelConfig, there: int) -> int:
    """How many of a step's micro-batches fill every pipeline rank as all of them do, one following upon another.

    2 without a pipeline; with one, one more than it has ranks, or two rounds, where its schedule never holds more.
    """
    ranks = parallel.pipeline
    if ranks == 1:
        return min(there, 2)
    virtual = virtual_stages(parallel.schedule, parallel.virtual_stages)

    def held(count: int) -> list[tuple[int, int]]:
        return [in_flight(parallel.schedule, rank, ranks, virtual, count) for rank in range(ranks)]

    fewer = ranks + 1 if virtual == 1 else 2 * ranks
    whole_rounds = virtual == 1 or there % ranks == 0
    return fewer if whole_rounds and fewer < there and held(fewer) == held(there) else there


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
