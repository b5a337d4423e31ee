"""What is a spike, what follows it, what a rollback leaves out, and which rank is slow."""

import math

import pytest

from disttrain.config.checks import validate
from disttrain.config.load import load
from disttrain.config.watching import WatchConfig
from disttrain.metrics import RankReading
from disttrain.watch import Watch


def watched(losses: list[float], **settings) -> tuple[Watch, list]:
    watch = Watch(WatchConfig(**settings))
    return watch, [watch.judge(step, loss, 1.0, False) for step, loss in enumerate(losses, start=1)]


def noise(count: int, middle: float = 3.0) -> list[float]:
    """Around a middle, with a median absolute deviation of 0.1."""
    return [middle + 0.1 * (-1) ** n * (1 + 0.5 * math.sin(n)) for n in range(count)]


def test_a_spike_is_told_once_and_only_upwards_and_not_before_there_are_twenty() -> None:
    _, found = watched([*noise(19), 9.0, *noise(20), 9.0, 9.0, 3.0, 9.0, 0.1])
    assert [f.details["loss"] if f else None for f in found if f] == [9.0, 9.0]
    assert [n for n, f in enumerate(found, start=1) if f] == [41, 44]
    spike = found[40]
    assert (spike.event, spike.action) == ("loss_spike", "go_on")
    assert spike.details["median"] == pytest.approx(3.0, abs=0.1)
    assert spike.details["z"] == pytest.approx((9.0 - spike.details["median"]) / (1.4826 * 0.1), rel=0.3)


def test_falling_losses_and_new_heights_are_no_spikes_for_long() -> None:
    assert not any(watched([10 * 0.98**n for n in range(300)])[1])
    found = watched([*noise(60), *noise(60, 6.0)], window=40)[1]
    assert [n for n, f in enumerate(found, start=1) if f] == [61]
    assert not any(watched(noise(60) + [9.0], loss_z=None)[1])


@pytest.mark.parametrize(("loss", "norm", "skipped", "bad"), [
    (math.nan, 1.0, False, True), (3.0, math.inf, False, True), (3.0, math.inf, True, False), (math.inf, 1.0, True, True),
])  # fmt: skip
def test_numbers_that_are_none(loss: float, norm: float, skipped: bool, bad: bool) -> None:
    """A gradient that the loss scale left out is none of them."""
    found = Watch(WatchConfig()).judge(7, loss, norm, skipped)
    assert (found is not None) == bad
    if found is not None:
        assert (found.event, found.action) == ("not_finite", "stop")
        back = Watch(WatchConfig(on_nonfinite="rollback")).judge(7, loss, norm, skipped)
        assert back is not None and back.action == "rollback"


def test_more_skips_in_a_row_than_allowed_stop_the_run() -> None:
    watch = Watch(WatchConfig(on_nonfinite="skip", max_skips=2))
    actions = [f.action if (f := watch.skip(n, n != 3)) else None for n in range(1, 8)]
    assert actions == ["go_on", "go_on", None, "go_on", "go_on", "stop", "stop"]
    assert watch.judge(9, math.nan, math.nan, True) is None
    assert Watch(WatchConfig()).skip(1, True) is None  # the loss scale's


def test_rollbacks_leave_out_what_the_checkpoint_had_not_seen_and_are_counted() -> None:
    watch, _ = watched(noise(30), on_spike="rollback", max_rollbacks=2)
    saved = watch.state_dict()
    assert watch.position(30) == 30
    assert watch.judge(33, 50.0, 1.0, False).action == "rollback"  # type: ignore[union-attr]
    told = watch.roll_back(33, 30, saved, batch_tokens=256)
    assert told.details == {"from_step": 33, "to_step": 30, "first_batch": 30, "last_batch": 32, "batches": 3,
                            "tokens": 768, "rollbacks": 1}  # fmt: skip
    assert watch.position(30) == 33
    resumed = Watch(WatchConfig(on_spike="rollback", max_rollbacks=2))
    resumed.load_state_dict(watch.state_dict())
    assert resumed.judge(31, 50.0, 1.0, False).action == "rollback"  # type: ignore[union-attr]
    older = resumed.roll_back(31, 20, {}, 256)  # of before the first rollback: all from 20 to 33 is left out
    assert (older.details["first_batch"], older.details["last_batch"], resumed.position(20)) == (20, 33, 34)
    stopped = resumed._answer("loss_spike", "the loss spiked", {}, "rollback")
    assert stopped.action == "stop" and "after 2 rollbacks" in stopped.message


INTERVAL = {"warmup": False, "interval_steps": 10, "step_seconds": 1.0}


def test_a_rank_is_slow_when_it_is_so_three_times_and_is_told_once() -> None:
    watch = Watch(WatchConfig(slow_rank=1.5))
    usual = [RankReading(r, data_seconds=0.1, compute_seconds=3.0, host=f"h{r}") for r in range(3)]
    fast = RankReading(3, data_seconds=0.1, compute_seconds=3.5, host="h3")
    slow = RankReading(3, data_seconds=4.0, compute_seconds=3.5, host="h3")
    assert watch.slow_ranks([*usual, slow], {**INTERVAL, "warmup": True}) == []
    found = [watch.slow_ranks([*usual, last], INTERVAL) for last in (slow, slow, fast, slow, slow, slow, slow)]
    assert [len(some) for some in found] == [0, 0, 0, 0, 0, 1, 0]
    (told,) = found[5]
    assert "rank 3 on h3 is slow: 0.75 s a step by itself, its peers 0.31 s" in told.message
    assert (told.details["factor"], told.details["cause"], told.action) == (7.5 / 3.1, "data", "go_on")


def test_other_stages_are_no_peers_and_what_nobody_feels_is_not_told() -> None:
    watch = Watch(WatchConfig(slow_rank=1.5))
    stages = [RankReading(r, compute_seconds=1.0 + 5 * (r // 2), stage=r // 2) for r in range(4)]
    short = [RankReading(0, compute_seconds=0.1), RankReading(1, compute_seconds=0.9)]
    assert not any(watch.slow_ranks(readings, INTERVAL) for readings in (stages,) * 4 + (short,) * 4)


@pytest.mark.parametrize(("words", "settings"), [
    (["watch.on_spike=rollback", "checkpoint.every=0"], ("watch.on_spike=rollback", "checkpoint.every=0")),
    (["watch.on_nonfinite=rollback", "checkpoint.every=0"], ("watch.on_nonfinite=rollback", "checkpoint.every=0")),
    (["watch.max_rollbacks=5"], ("watch.max_rollbacks=5", "watch.on_spike=event")),
    (["watch.max_skips=5"], ("watch.max_skips=5", "watch.on_nonfinite=stop")),
    (["watch.loss_z=null", "watch.on_spike=stop"], ("watch.on_spike=stop", "watch.loss_z=null")),
    (["watch.loss_z=null", "watch.window=50"], ("watch.window=50", "watch.loss_z=null")),
    (["watch.on_nonfinite=skip", "precision=fp16"], ("watch.on_nonfinite=skip", "precision=fp16")),
    (["watch.slow_rank=2.0"], ("watch.slow_rank=2.0", "world size 1")),
])  # fmt: skip
def test_what_has_no_effect_is_refused(words: list[str], settings: tuple[str, ...]) -> None:
    assert settings in [problem.settings for problem in validate(load("configs/gpt_tiny.yaml", words), 1)]


def test_what_has_an_effect_is_not() -> None:
    words = ["watch.on_spike=rollback", "watch.max_rollbacks=5", "checkpoint.every=10", "watch.slow_rank=2.0"]
    assert validate(load("configs/gpt_tiny.yaml", words), 2) == []
