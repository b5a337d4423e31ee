"""One rank's training steps without numbers: what it would send, to whom, from which line."""

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

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
from disttrain.rehearsal.fakes import Recorder, shards_stay
from disttrain.rehearsal.live import CUDA_BLOCK_BYTES, Ledger, counting, follow
from disttrain.rehearsal.records import LiveBytes, Trace
from disttrain.verify.batches import IGNORED, micro_batches, random_batch

COUNTED = "a step"
"""Name of the step whose peak is told."""


def steps(config: Config) -> tuple[int, ...]:
    """Numbers of the steps that are rehearsed; the last one is what every step is like. There is a first one before it where
    DDP orders its buckets, a codec warms up, or workers meet later (all of them after the last step of the run)."""
    coded, apart = config.compression.codec != "none", config.outer.method != "none"
    if not coded and not apart and (config.parallel.zero or config.parallel.pipeline > 1):
        return (1,)
    usual = config.compression.warmup_steps + 2
    return 1, max(usual, total_steps(config) or 0) if apart else usual


def trace(config: Config, world_size: int, rank: int, count: bool = False) -> Trace:
    """What this rank calls while its engine is built, takes the steps of `steps` and evaluates, as on a CPU.

    Needs `model.vocab_size`, and a process without a process group; leaves none behind. The tokens are random. Nothing is
    sent and no floating number computed, so that the time does not depend on the width of the model, nor the memory on
    its size. With `count` the bytes of live tensors are counted, over one more step than is written down.
    """
    mesh = build_mesh(config.parallel, world_size)
    config = rehearsed(config, mesh)
    if config.model.source is None and not count:  # no message depends on it
        config = with_values(config, {"model.dropout": 0.0})
    with ExitStack() as stack:
        stack.enter_context(_alone(world_size, rank, config.run.timeout_s))
        stack.enter_context(shards_stay())
        recorder = stack.enter_context(Recorder(rank))
        ledger = stack.enter_context(counting()) if count else None

        def begin(phase: str, written: bool) -> None:
            recorder.phase = phase if written else ""

        recorder.trace.handed_bytes, recorder.trace.live = walk(config, mesh, rank, ledger, begin)
    return recorder.trace


def walk(
    config: Config, mesh: Mesh, rank: int, ledger: Ledger | None, begin: Callable[[str, bool], None] | None = None,
    device_type: str = "cpu",
) -> tuple[int, LiveBytes | None]:  # fmt: skip
    """Build the engine of a `rehearsed` config, take its steps and evaluate, under whatever process group there is: what the
    last step handed over, and the peak that the ledger has seen. `begin` hears of each phase, and whether it is more than a
    count."""
    begin = begin or (lambda phase, written: None)
    precision: Any = config.precision
    device = torch.device(device_type, torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")
    groups = make_groups(mesh, rank, device_type, Traffic())
    engine: Any = engines.build(config, groups, device, precision)
    numbers, handed = steps(config), 0
    if ledger is not None:
        follow(ledger, engine)
        numbers = *numbers, numbers[-1]  # moments, and what else the first steps make, are there from its beginning

    for at, step in enumerate(numbers):
        name, written = f"step {step}", at < len(steps(config))
        begin(name, written)
        if ledger is not None:
            gc.collect()
            ledger.begin(name if written else COUNTED, "forward")
        engine.traffic()
        engine.step(batches_of(config, mesh, rank, step), step, config.optim.lr)
        handed = engine.traffic().handed
    begin("evaluation", True)
    if ledger is not None:
        ledger.begin("evaluation", "forward")
    engine.evaluate(batches_of(config, mesh, rank, 0))
    engine.close()
    return handed, None if ledger is None else ledger.peak((COUNTED, "evaluation"))


def count_here(rank: int, config: Config, device_type: str = "cpu") -> LiveBytes:
    """The same peak of a real rank of the world that is up, with real tensors and messages; on a GPU in the blocks of its
    allocator."""
    mesh = build_mesh(config.parallel, dist.get_world_size())
    with counting(device_type, CUDA_BLOCK_BYTES if device_type == "cuda" else 1) as ledger:
        _, live = walk(rehearsed(config, mesh), mesh, rank, ledger, device_type=device_type)
    assert live is not None
    return live


def rehearsed(config: Config, mesh: Mesh) -> Config:
    """The config on a CPU, its blocks not compiled, with what is open decided."""
    share = config.train.global_batch_size // mesh.data_ranks
    precision: Precision = "bf16" if config.precision == "auto" else config.precision
    return with_values(config, {
        "run.device": "cpu", "precision": precision, "run.compile": False,
        "train.micro_batch_size": config.train.micro_batch_size or share,
    })  # fmt: skip


def batches_of(config: Config, mesh: Mesh, rank: int, step: int) -> list[Batch]:
    """A rank's micro-batches of a step, 0 for the evaluation; only one of a first step, where there are no stages."""
    at, rehearsed = mesh.data_rank(rank), steps(config)
    share = config.train.global_batch_size // mesh.data_ranks
    rows = random_batch(with_values(config, {"train.global_batch_size": share}), (config.run.seed, step, at))
    if config.model.family == "bert":  # memory goes by how many are predicted
        masked = np.random.default_rng((config.run.seed, step, at)).random(rows["targets"].shape)
        masked[:, 0] = 0
        rows = {**rows, "targets": np.where(masked < config.data.mlm_probability, rows["targets"], IGNORED)}
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
