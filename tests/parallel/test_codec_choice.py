"""What `compression.codec=auto` rehearses and takes, and that a run goes on after it has chosen anew."""

from dataclasses import dataclass

import pytest
import torch

from disttrain import codec_choice
from disttrain.codec_choice import Candidate, Choice, RehearsedLink, Speed
from disttrain.config.load import with_values
from disttrain.config.schema import Config, GradientCodec
from tests.chosen import chosen
from tests.parallel.test_data_parallel import config_for, global_batch, make_engine
from tests.parallel.test_grad_compression import LAYOUTS, advance
from tests.ranks import run_ranks

CPU = torch.device("cpu")
SLOW, FAST = Speed(1e-3, 2e4), Speed(1e-5, 1e12)
ALL: list[GradientCodec] = ["bf16", "int8", "int4", "sign", "topk", "randomk", "powersgd"]


def config_of(**values) -> Config:
    return config_for(
        "gpt", **{"precision": "fp32", "compression.codec": "auto", "compression.min_elements": 100, **values}
    )


def choice_of(rank: int, config: Config, world: int, speed: Speed | None) -> Choice:
    """What is chosen on a link of this speed, or as it is."""
    plain = with_values(config, {"compression.codec": "none"})
    groups = make_engine(plain, rank, world).groups
    if speed is not None:
        codec_choice.measure = lambda group, device: speed
    share = config.train.global_batch_size // groups.mesh.data_ranks
    start, size = groups.mesh.data_rank(rank) * share, config.train.micro_batch_size or share
    batch = global_batch("gpt", 1)
    batches = [{k: v[i : i + size] for k, v in batch.items()} for i in range(start, start + share, size)]
    return codec_choice.choose(config, groups, CPU, "fp32", batches)


def sent_in_a_step(rank: int, config: Config, world: int) -> float:
    """Bytes that left this rank in a step."""
    engine = make_engine(config, rank, world)
    advance(engine, config, rank, range(1, 2))
    engine.traffic()
    advance(engine, config, rank, range(2, 3))
    return engine.traffic().on_wire


@pytest.mark.parametrize("layout", chosen(["dp2.mb2", "dp2"], 2))
def test_rehearsed_bytes_are_sent(layout: str) -> None:
    world, values = LAYOUTS[layout]
    choices = run_ranks(choice_of, world, config_of(**{"compression.candidates": ALL, **values}), world, SLOW)
    for number, codec in enumerate(["none", *ALL]):
        sent = run_ranks(sent_in_a_step, world, config_of(**{**values, "compression.codec": codec}), world)
        for rank, choice in enumerate(choices):
            candidate = choice.candidates[number]
            assert candidate.codec == codec
            assert candidate.wire_bytes == pytest.approx(
                sent[rank], rel=0.03, abs=200
            )  # loss, tokens and norm travel, too


@pytest.mark.parametrize("layout", chosen(["dp4.zero2.rep2.mb1", "tp2.dp2"], 2))
def test_a_slow_link_gets_a_codec_and_a_fast_one_none(layout: str) -> None:
    world, values = LAYOUTS[layout]
    slow = run_ranks(choice_of, world, config_of(**values), world, SLOW)
    assert len({choice.best.codec for choice in slow}) == 1  # all ranks take the same
    assert slow[0].best.codec in ("int4", "powersgd")
    none = slow[0].candidates[0]
    assert not none.rehearsed  # that would take its time
    assert none.step_s == none.work_s + none.link_s
    assert slow[0].best.step_s >= slow[0].best.link_s
    fast = run_ranks(choice_of, world, config_of(**values), world, FAST)
    assert all(choice.candidates[0].link_s < 1e-3 for choice in fast)
    assert set(slow[0].axes) >= {"data"} | {name for name in ("tensor", "pipeline") if f"parallel.{name}" in values}


def test_the_state_of_the_run_is_not_touched() -> None:
    for before, after in run_ranks(with_and_without, 2, config_of(), 2):
        assert before == after


def with_and_without(rank: int, config: Config, world: int) -> tuple:
    torch.manual_seed(5)
    before = torch.get_rng_state().tolist(), 0
    groups = make_engine(with_values(config, {"compression.codec": "none"}), rank, world).groups
    batch = {k: v[4 * rank : 4 * rank + 4] for k, v in global_batch("gpt", 1).items()}
    codec_choice.choose(config, groups, CPU, "fp32", [batch])
    return before, (torch.get_rng_state().tolist(), groups.world.traffic.take().on_wire)


@dataclass
class Clock:
    """Time that passes while it is slept, or worked."""

    now: float = 100.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_work_and_link_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(codec_choice, "time", clock)
    link = RehearsedLink(2, 0, Speed(0.001, 1e6), CPU)
    link.reset(waits=True)
    first = link.exchange(torch.zeros(2, 100_000))  # 400 kB leave, 800 kB are exchanged
    clock.now += 0.3  # of work
    second = link.exchange(torch.zeros(2, 50_000))  # waits for the first to be gone
    first()
    assert clock.now == pytest.approx(100 + 0.4 + 2 * 0.001)
    second()
    assert clock.now == pytest.approx(100 + 0.6 + 0.001)
    assert link.wire_bytes == 600_000
    assert link.seconds == pytest.approx(0.6 + 2 * 0.001)  # both are on their way at once
    link.reset(waits=False)
    link.sum(torch.zeros(10))
    assert clock.now == pytest.approx(100.601)


def of_steps(**steps: float) -> Choice:
    candidates = [Candidate(codec, 1e6, 0.1, s, s, True) for codec, s in steps.items()]  # pyright: ignore
    return Choice(2, Speed(2e-3, 1e7), {"data": Speed(2e-3, 1e7)}, candidates, 0.02, 1.0)


def test_the_first_that_is_as_fast_is_taken_and_said() -> None:
    assert of_steps(none=1.0, bf16=0.6, int8=0.51, powersgd=0.5).best.codec == "int8"
    assert of_steps(none=1.02, bf16=1.0).best.codec == "none"
    assert of_steps(none=0.8, int8=0.3).reason == (
        "gradient codec int8: with 80 Mbit/s and 2 ms between 2 ranks, 0.3 s a step, 0.8 s without a codec"
    )
    assert "your link is fast enough (80 Mbit/s" in of_steps(none=0.3, int8=0.3).reason


def test_a_link_has_changed_when_it_is_seen_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([0.02, 0.05, 0.03, 0.05, 0.06, 0.009, 0.009])
    monkeypatch.setattr(codec_choice, "glance", lambda *_: next(found))

    class Anybody:
        coded = staticmethod(lambda zero: None)

    choice = of_steps(none=1.0)
    heard = [codec_choice.changed(choice, Anybody(), 0, CPU) for _ in range(4)]  # pyright: ignore[reportArgumentType]
    assert heard == [False, False, True, True]
