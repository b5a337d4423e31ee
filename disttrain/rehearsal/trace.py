"""One rank's training steps without numbers: what it would send, to whom, from which line."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup
from torch.testing._internal.distributed.fake_pg import FakeStore

from disttrain import engines
from disttrain.config.checks import total_steps
from disttrain.config.load import with_values
from disttrain.config.schema import Config, Precision
from disttrain.engines import Batch
from disttrain.mesh import Mesh, build_mesh
from disttrain.parallel.collectives import Traffic
from disttrain.parallel.groups import make_groups
from disttrain.parallel.meeting import count_groups_from_zero
from disttrain.rehearsal.fakes import Recorder
from disttrain.rehearsal.records import Trace
from disttrain.verify.batches import micro_batches, random_batch


def steps(config: Config) -> tuple[int, ...]:
    """Numbers of the steps that are rehearsed; the last one is what every step is like. There is a first one before it where
    DDP orders its buckets, a codec warms up, or workers meet later (all of them after the last step of the run)."""
    coded, apart = config.compression.codec != "none", config.outer.method != "none"
    if not coded and not apart and (config.parallel.zero or config.parallel.pipeline > 1):
        return (1,)
    usual = config.compression.warmup_steps + 2
    return 1, max(usual, total_steps(config) or 0) if apart else usual


def trace(config: Config, world_size: int, rank: int) -> Trace:
    """What this rank calls while its engine is built, takes the steps of `steps` and evaluates, as on a CPU.

    Needs `model.vocab_size`, and a process without a process group; leaves none behind. The tokens are random, and only
    the user's own model has dropout. Nothing is sent and no floating number computed, so that the time does not depend on
    the width of the model, nor the memory on its size.
    """
    precision: Precision = "bf16" if config.precision == "auto" else config.precision
    mesh, device = build_mesh(config.parallel, world_size), torch.device("cpu")
    config = with_values(config, {
        "run.device": "cpu", "precision": precision, "run.compile": False,
        "train.micro_batch_size": config.train.micro_batch_size or config.train.global_batch_size // mesh.data_ranks,
    })  # fmt: skip
    if config.model.source is None:  # no message depends on it
        config = with_values(config, {"model.dropout": 0.0})
    with _alone(world_size, rank, config.run.timeout_s), Recorder(rank) as recorder:
        engine = engines.build(config, make_groups(mesh, rank, "cpu", Traffic()), device, precision)
        for step in steps(config):
            recorder.phase = f"step {step}"
            engine.traffic()
            engine.step(batches_of(config, mesh, rank, step), step, config.optim.lr)
            recorder.trace.handed_bytes = engine.traffic().handed
        recorder.phase = "evaluation"
        engine.evaluate(batches_of(config, mesh, rank, 0))
        engine.close()
    return recorder.trace


def batches_of(config: Config, mesh: Mesh, rank: int, step: int) -> list[Batch]:
    """A rank's micro-batches of a step, 0 for the evaluation; only one of a first step, where there are no stages."""
    at, rehearsed = mesh.data_rank(rank), steps(config)
    share = config.train.global_batch_size // mesh.data_ranks
    rows = random_batch(with_values(config, {"train.global_batch_size": share}), (config.run.seed, step, at))
    numbers = np.arange(at * share, (at + 1) * share, dtype=np.int64)
    batches = micro_batches({**rows, "samples": numbers}, 0, 1, config.train.micro_batch_size)
    return batches[:1] if step in rehearsed[:-1] and mesh.pipeline == 1 else batches


@contextmanager
def _alone(world_size: int, rank: int, timeout_s: float) -> Iterator[None]:
    """A process group in which the others are only imagined."""
    count_groups_from_zero()
    options = FakeProcessGroup.Options()  # pyright: ignore[reportCallIssue]
    options._timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size, pg_options=options)
    try:
        yield
    finally:
        dist.destroy_process_group()
