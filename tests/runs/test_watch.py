"""Runs with planted faults: NaN in one rank's gradient, an exploding loss, a slow rank; and what `watch` does about them."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from disttrain import checkpoint, data
from disttrain.config.schema import Config
from disttrain.metrics import unknown_keys
from disttrain.optim import learning_rate
from tests.parallel.test_data_parallel import make_engine
from tests.ranks import gathered, run_ranks
from tests.runs.conftest import Workplace

ROOT = Path(__file__).resolve().parents[2]
STEPS, SEQUENCES, LENGTH = 12, 8, 32


@pytest.fixture
def faulty(workplace: Workplace) -> Workplace:
    shutil.copy(ROOT / "tests/faults/faulty.py", workplace.folder)
    return workplace


def words(options: str, *more: str) -> list[str]:
    model = ["model.source=faulty.py:Faulty", f"model.options={{{options}}}", "model.layers=2"]
    return ["train", "run.yaml", *model, "precision=fp64", *more]


def events(workplace: Workplace, name: str) -> list[dict[str, Any]]:
    return [record for record in workplace.records("run", "event") if record["event"] == name]


def trained(rank: int, folder: Path, config: Config, batches: dict[int, int]) -> dict[str, torch.Tensor]:
    """The weights of one process that trains these steps on these batches of the data, without a trainer."""
    os.chdir(folder)
    engine, corpus = make_engine(config, rank, 1), data.open_data(config, data.prepare(config))
    for step, batch in batches.items():
        engine.step(list(corpus.micro_batches(batch, 0, 1)), step, learning_rate(config.optim, step, STEPS))
    return gathered(engine, "weight")


def hold_to(workplace: Workplace, batches: dict[int, int]) -> None:
    """The run's last weights are those of training on these batches, by step."""
    config = dict(workplace.records("run", "header")[0]["config"])
    config |= {"parallel": {}, "watch": {}, "model": {**config["model"], "source": None, "options": {}}}
    config["train"] = {**config["train"], "micro_batch_size": SEQUENCES}
    (expected,) = run_ranks(trained, 1, workplace.folder, Config.model_validate(config), batches)
    got = checkpoint.read(workplace.folder / "runs/run/checkpoints" / f"step_{STEPS:08d}")
    for name, weight in expected.items():
        torch.testing.assert_close(got[f"model.{name}"], weight, rtol=1e-10, atol=1e-10)


def test_a_rolled_back_run_is_one_without_the_batches_that_did_harm(faulty: Workplace) -> None:
    """NaN on one of four ranks; killed between the rollback and the next checkpoint; goes on on two, in another layout."""
    back = words("nan_from: 5, nan_to: 5, die_once_at: 8", "watch.on_nonfinite=rollback")
    faulty.run(*back, "--nproc", "4", "parallel.tensor=2", code=1)
    assert [r["step"] for r in faulty.records("run", "step")] == [1, 2, 3, 4, 5, 6, 5, 6]
    (told,) = events(faulty, "rolled_back")
    assert told["details"] == {"from_step": 6, "to_step": 4, "first_batch": 4, "last_batch": 5, "batches": 2,
                               "tokens": 2 * SEQUENCES * LENGTH, "rollbacks": 1}  # fmt: skip
    assert events(faulty, "not_finite")[0]["step"] == 6
    done = faulty.run(*back, "--nproc", "2", "parallel.pipeline=2", "train.micro_batch_size=4")
    assert "from step 6 to 4, batches 4 to 5 left out" in done.stdout
    assert len(events(faulty, "rolled_back")) == 1
    last = faulty.records("run", "step")[-1]
    assert (last["step"], last["tokens_seen"]) == (STEPS, STEPS * SEQUENCES * LENGTH)
    assert all(unknown_keys(record) == [] for kind in ("step", "event") for record in faulty.records("run", kind))
    hold_to(faulty, {step: step - 1 if step <= 4 else step + 1 for step in range(1, STEPS + 1)})


def test_a_skipped_update_is_skipped_by_all(faulty: Workplace) -> None:
    faulty.run(
        *words("nan_from: 5, nan_to: 5", "watch.on_nonfinite=skip"), "--nproc", "4", "parallel.tensor=2", "log.every=4"
    )
    (told,) = events(faulty, "update_skipped")
    assert (told["step"], told["details"]) == (6, {"in_a_row": 1})
    assert faulty.records("run", "step")[-1]["skipped_steps"] == 1
    hold_to(faulty, {step: step - 1 for step in range(1, STEPS + 1) if step != 6})


def test_a_run_that_cannot_be_helped_stops(faulty: Workplace) -> None:
    done = faulty.run(*words("nan_from: 2", "watch.on_nonfinite=skip", "watch.max_skips=3"), "--nproc", "2", code=1)
    assert "the update of step 6 is skipped, 4 in a row" in done.stderr
    done = faulty.run(*words("nan_from: 5", "run.name=stop"), "--nproc", "2", code=1)
    assert "the gradient norm nan at step 6: lower optim.lr" in done.stderr
    assert [r["event"] for r in faulty.records("stop", "event")][-1] == "not_finite"


def test_an_exploding_loss_is_told_and_rolled_back_to_the_start(faulty: Workplace) -> None:
    """The first checkpoint would come later."""
    more = ["--nproc", "2", "train.steps=22", "train.eval_every=0", "optim.lr=1e-3", "checkpoint.every=22"]
    done = faulty.run(*words("explodes_at: 20", "watch.on_spike=rollback"), *more)
    (told,) = events(faulty, "loss_spike")
    assert told["step"] == 21 and "the loss spiked to" in done.stdout
    assert "loss spikes" in done.stdout and "at step 21" in done.stdout
    (back,) = events(faulty, "rolled_back")
    assert (back["details"]["to_step"], back["details"]["batches"]) == (0, 21)
    curve = [r["step"] for r in faulty.records("run", "step")]
    assert curve == [*range(1, 22), *range(1, 23)]
    assert faulty.records("run", "summary")[-1]["tokens_seen"] == 22 * SEQUENCES * LENGTH


def test_a_slow_rank_is_named_with_the_cause(faulty: Workplace) -> None:
    """It sleeps while it reads, and a little in its forward passes."""
    more = ["train.steps=33", "train.eval_every=0", "checkpoint.every=0", "--nproc", "2"]
    done = faulty.run(*words("data_sleeps: 0.12, forward_sleeps: 0.02", *more))
    (told,) = events(faulty, "slow_rank")
    assert (told["details"]["rank"], told["details"]["cause"]) == (1, "data")
    assert told["details"]["own_seconds"] > 0.14 and "slow ranks" in done.stdout
    last = faulty.records("run", "step")[-1]
    assert last["own_seconds_max_rank"] == 1
    assert last["own_seconds_max"] > 0.14
