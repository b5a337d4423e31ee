"""TensorBoard: what is written is what TensorBoard itself reads back."""

import math

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from disttrain.config.schema import Config, LogConfig
from disttrain.loggers import open_loggers

CONFIG = Config(log=LogConfig(console="none", tensorboard=True))


def step(n, loss):
    record = {"kind": "step", "step": n, "loss": loss, "tokens_seen": 10 * n, "mfu_causal": None, "warmup": False}
    return {**record, "train_seconds": 0.5}


def read(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def test_scalars_come_back_with_our_steps_and_only_numbers(tmp_path):
    with open_loggers(CONFIG, tmp_path, {"name": "a"}, None) as loggers:
        for n in (10, 20):
            loggers.write(step(n, 1 / n))
        loggers.write({"kind": "eval", "step": 20, "eval_loss": 0.25})
        loggers.event("checkpoint_saved", "saved", step=20)
        loggers.write(step(30, math.nan))
        loggers.write({"kind": "summary", "step": 30, "loss": 9.0})
    events = read(tmp_path)
    assert sorted(events.Tags()["scalars"]) == [
        "eval/eval_loss",
        "train/loss",
        "train/tokens_seen",
        "train/train_seconds",
    ]
    losses = events.Scalars("train/loss")
    assert [e.step for e in losses] == [10, 20, 30]
    assert [round(e.value, 6) for e in losses[:2]] == [0.1, 0.05] and math.isnan(losses[2].value)
    assert losses[0].wall_time > 1.6e9
    assert [(e.step, e.value) for e in events.Scalars("eval/eval_loss")] == [(20, 0.25)]


def test_steps_done_again_after_a_resume_replace_the_earlier_ones(tmp_path):
    for resumed, steps, loss in ((None, range(1, 8), 1.0), (4, range(5, 10), 2.0)):
        with open_loggers(CONFIG, tmp_path, {"name": "a"}, resumed) as loggers:
            for n in steps:
                loggers.write(step(n, loss))
    got = [(e.step, e.value) for e in read(tmp_path).Scalars("train/loss")]
    assert got == [(n, 1.0 if n <= 4 else 2.0) for n in range(1, 10)]


def test_steps_done_again_after_a_rollback_replace_the_earlier_ones(tmp_path):
    with open_loggers(CONFIG, tmp_path, {"name": "a"}, None) as loggers:
        for n in range(1, 8):
            loggers.write(step(n, 1.0))
        loggers.event("rolled_back", "back", step=7, from_step=7, to_step=4)
        for n in range(5, 10):
            loggers.write(step(n, 2.0))
    got = [(e.step, e.value) for e in read(tmp_path).Scalars("train/loss")]
    assert got == [(n, 1.0 if n <= 4 else 2.0) for n in range(1, 10)]
