"""One run that changes its ranks and its layout again and again is the run of one process that nobody disturbed."""

import hashlib
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from disttrain import data, trainer
from disttrain.assembly import Session
from disttrain.config.load import with_values
from disttrain.config.schema import Config
from disttrain.engines.native import NativeEngine
from disttrain.interruption import Interruption
from disttrain.launch import RankInfo
from disttrain.mesh import build_mesh
from disttrain.metrics import FlopsPerSequence
from disttrain.parallel.collectives import Traffic
from disttrain.parallel.groups import make_groups
from disttrain.recorder import Recorder
from tests.parallel.test_data_parallel import config_for
from tests.ranks import gathered, run_ranks

BATCH, STEPS = 12, 10

PHASES: list[tuple[int, int, dict]] = [
    (2, 1, {}),
    (4, 4, {"parallel.tensor": 2}),
    (5, 2, {"parallel.zero": 2}),
    (7, 3, {"parallel.zero": 1, "train.micro_batch_size": 2}),
    (10, 2, {"parallel.pipeline": 2, "train.micro_batch_size": 3}),
]
"""The step until which each part of the run goes, its ranks, and its layout."""


@dataclass
class Followed:
    """What one rank did: losses by step, and what it read as (step, sample number, what was in it)."""

    data_rank: int
    losses: dict[int, float] = field(default_factory=dict)
    read: list[tuple[int, int, str]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def follow(rank: int, config: Config, world: int, prepared: data.Prepared, until: int) -> Followed:
    """Train with the real loop, from the newest checkpoint of the run, until somebody asks to stop after a step."""
    mesh = build_mesh(config.parallel, world)
    groups = make_groups(mesh, rank, "cpu", Traffic())
    engine, interruption = NativeEngine(config, groups, torch.device("cpu"), "fp64"), Interruption()
    info = RankInfo("env", rank, world, rank, world, 0, 1, "127.0.0.1", 0)
    session = Session(config, config, info, mesh, groups, torch.device("cpu"), data.open_data(config, prepared), engine,
                      1, FlopsPerSequence(1.0, 1.0, 1.0, 1.0, 8), "cpu", None)  # fmt: skip
    found, step_of_engine = Followed(session.data_rank), engine.step

    def step(micro_batches, number: int, learning_rate: float):
        for batch in micro_batches:
            for row, sample in enumerate(batch["samples"]):
                inside = b"".join(batch[key][row].tobytes() for key in sorted(batch) if key != "samples")
                found.read.append((number, int(sample), hashlib.sha256(inside).hexdigest()))
        result = step_of_engine(micro_batches, number, learning_rate)
        found.losses[number] = sum(float(loss.sum / loss.count) for loss in result.losses.values())
        if number == until:
            interruption.signal = signal.SIGTERM
        return result

    engine.step = step
    recorder = Recorder(session, None)
    trainer.train(session, recorder, interruption, trainer.restore(session, recorder))
    found.weights = gathered(engine, "weight")
    return found


def config_of(family: str, folder: Path) -> Config:
    lines = (" ".join(f"{word * (number % 7 + 1)}" for word in ("one", "two", "three")) for number in range(400))
    (folder / "corpus.txt").write_text("\n".join(lines))
    return with_values(config_for(family), {
        "data.corpus": "text", "data.path": str(folder / "corpus.txt"), "data.document": "line", "model.dropout": 0.1,
        "data.cache_dir": str(folder / "cache"), "data.sequence_length": 32, "model.max_positions": 32,
        "model.vocab_size": 264, "train.steps": STEPS, "train.global_batch_size": BATCH, "run.dir": str(folder),
        "optim.warmup_steps": 3, "data.workers": 1, "train.eval_sequences": 4,
    })  # fmt: skip


@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_a_run_that_changes_its_layout_reads_and_learns_the_same(tmp_path: Path, family: str) -> None:
    config = config_of(family, tmp_path)
    prepared = data.prepare(config)
    (alone,) = run_ranks(follow, 1, with_values(config, {"run.name": "alone"}), 1, prepared, STEPS)
    assert [sample for _, sample, _ in alone.read] == list(range(BATCH * STEPS))
    assert len({inside for *_, inside in alone.read}) > BATCH * STEPS // 2  # and they are not all the same sequence

    losses, read, weights = {}, [], {}
    for until, world, layout in PHASES:
        ranks = run_ranks(follow, world, with_values(config, layout), world, prepared, until)
        by_data_rank: dict[int, list] = {}
        for rank in ranks:
            assert rank.losses == pytest.approx(ranks[0].losses, rel=1e-12)
            assert by_data_rank.setdefault(rank.data_rank, rank.read) == rank.read  # ranks that share a sequence
        assert not losses.keys() & ranks[0].losses.keys()
        losses |= ranks[0].losses
        read += sorted(row for rows in by_data_rank.values() for row in rows)
        weights = ranks[0].weights
    assert read == alone.read  # every position once, in the same order, with the same tokens, masks and targets
    assert list(losses) == list(range(1, STEPS + 1))
    assert losses == pytest.approx(alone.losses, rel=1e-10)
    for name, weight in alone.weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-10, atol=1e-10, msg=name)
