"""Runs of a comparison: their order, what failures do, going on, and stopping. The runs are made up by a small command."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from disttrain.compare import launching, outcomes, runner
from disttrain.compare.plan import Plan, Task
from disttrain.compare.progress import Terminal
from disttrain.interruption import Interruption
from tests.unit.compare.conftest import Place


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "LOOK_S", 0.01)


def go(plan: Plan, interruption: Interruption | None = None) -> tuple[bool, str]:
    """Whether it came to its end, and what the terminal showed."""
    console = Console(width=200, force_terminal=False)
    with console.capture() as capture, Terminal(plan, plan.tasks, console) as terminal:
        ended = runner.run_all(plan, plan.tasks, terminal, interruption or Interruption())
    return ended, capture.get()


def order(place: Place) -> list[str]:
    return (place.folder / "order.txt").read_text().split()


def test_every_strategy_once_then_again_and_a_second_call_does_nothing(place: Place) -> None:
    plan = place.plan({"a": None, "b": {"env": {"X": "1"}}})
    ended, shown = go(plan)
    assert ended and order(place) == ["a-1", "b-1", "a-2", "b-2"]
    assert "1/4  a-1     200 tokens/s  loss 1.0000   300 MiB  took " in shown
    assert not (plan.folder / "runs/a-1/checkpoints").exists()  # of a run that is done
    ended, shown = go(plan)
    assert ended and order(place) == ["a-1", "b-1", "a-2", "b-2"] and shown.count("done before") == 4


def test_checkpoints_may_be_kept(place: Place) -> None:
    go(plan := place.plan({"a": None}, repeats=1, keep_checkpoints=True))
    assert (plan.folder / "runs/a-1/checkpoints/step_00000004").is_dir()


def test_a_failure_stops_nothing_but_its_own_repeats_and_is_tried_again(place: Place) -> None:
    lr = {name: {"settings": {"optim.lr": rate}} for name, rate in (("bad", 0.1), ("oom", 0.2), ("no", 0.3))}
    plan = place.plan({**lr, "a": None})
    ended, shown = go(plan)
    assert ended and order(place) == ["bad-1", "oom-1", "no-1", "a-1", "a-2"]
    assert "bad-1  failed: exit code 1: disttrain: it broke" in shown and "bad-2  not tried" in shown
    found = {name: outcomes.read(plan.folder, Task(name, 1)) for name in ("bad", "oom", "no", "a")}
    assert {name: outcome.state for name, outcome in found.items() if outcome} == {
        "bad": "failed", "oom": "out of memory", "no": "refused", "a": "done"}  # fmt: skip
    assert found["no"] and found["no"].reason == "they differ (a=1, b=2; make them equal)"
    assert "it broke" in (plan.folder / "logs/bad-1.log").read_text()
    go(plan)
    assert order(place)[5:] == ["bad-1", "oom-1", "no-1", "bad-2"]
    again = outcomes.read(plan.folder, Task("bad", 1))
    assert again and again.state == "done"


def test_a_run_that_takes_too_long_is_stopped(place: Place) -> None:
    plan = place.plan({"slow": {"settings": {"optim.lr": 0.4}, "timeout_s": 1.0}, "a": None}, repeats=1)
    ended, shown = go(plan)
    assert ended and "slow-1  timed out: not done after 1 s (timeout_s)" in shown
    assert order(place) == ["slow-1", "a-1"] and not outcomes.done(plan.folder / "runs/slow-1")


def test_a_launcher_that_cannot_be_started_is_a_failure(place: Place) -> None:
    (place.folder / "odd").write_bytes(b"\x00")
    (place.folder / "odd").chmod(0o755)
    plan = place.plan({"odd": {"launcher": [str(place.folder / "odd"), "{nproc}"]}, "a": None}, repeats=1)
    ended, shown = go(plan)
    assert ended and "odd cannot be started: Exec format error" in shown and order(place) == ["a-1"]


def test_a_refused_strategy_is_not_started(place: Place) -> None:
    plan = place.plan({"three": {"nproc": 3, "optional": True}, "a": None}, repeats=1)
    go(plan)
    assert order(place) == ["a-1"]


def test_an_interruption_ends_the_run_and_the_same_command_goes_on(place: Place) -> None:
    plan = place.plan({"a": None, "slow": {"settings": {"optim.lr": 0.4}}, "b": None}, repeats=1)
    interruption = Interruption()

    def when_it_runs() -> None:
        while not (plan.folder / "runs/slow-1/metrics.jsonl").exists():
            time.sleep(0.01)
        interruption.signal = signal.SIGTERM

    threading.Thread(target=when_it_runs).start()
    ended, _ = go(plan, interruption)
    assert not ended and order(place) == ["a-1", "slow-1"]
    outcome = outcomes.read(plan.folder, Task("slow", 1))
    assert outcome and outcome.state == "interrupted"
    go(plan, interruption)  # asked to stop before anything began
    assert order(place) == ["a-1", "slow-1"]


def test_nothing_of_a_command_is_left(tmp_path: Path) -> None:
    """A command that does not hear, and what it has started, are killed."""
    script = "trap '' TERM; sleep 100 & echo $! > child; touch ready; wait; wait"
    stop = Interruption()

    def when_ready() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        stop.signal = signal.SIGTERM

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(launching, "STOP_S", 0.2)
        threading.Thread(target=when_ready).start()
        ending, code = launching.run(["bash", "-c", script], os.environ, tmp_path / "log", 60.0, signal.SIGTERM, stop,
                                     lambda: None)  # fmt: skip
    assert (ending, code) == ("interrupted", -signal.SIGKILL)
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 10
    while _lives(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _lives(child)


def _lives(pid: int) -> bool:
    """Whether a process is there and no zombie that nobody has buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    "ending, code, said, state, reason",
    [
        ("interrupted", 130, "", "interrupted", "the same command goes on"),
        ("timeout", 130, "", "timed out", "not done after 5 s"),
        ("exited", 1, "a\nRuntimeError: CUDA out of memory. Tried\nb", "out of memory", "CUDA out of memory. Tried"),
        ("exited", 1, "disttrain: rank 1 was killed by SIGKILL; the same", "killed", "the host's memory runs out"),
        ("exited", -9, "", "killed", "SIGKILL"),
        ("exited", 3, "one\ntwo\n\n", "failed", "exit code 3: two"),
        ("exited", 3, "", "failed", "it said nothing"),
        ("exited", 0, "odd", "failed", "not as it was configured: odd"),
    ],
)
def test_why_a_run_has_no_result(ending, code: int, said: str, state: str, reason: str) -> None:
    found = outcomes.judge(ending, code, False, said, 5.0)
    assert found[0] == state and reason in found[1]


def test_what_is_done(tmp_path: Path) -> None:
    assert not outcomes.done(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    for text, done in (('{"stop_reason": "interrupted"}', False), ("{", False), ('{"stop_reason": "time"}', True)):
        (tmp_path / "summary.json").write_text(text)
        assert outcomes.done(tmp_path) is done


def test_time_left_is_that_of_the_same_strategy_or_else_of_all(place: Place) -> None:
    plan = place.plan({"a": None, "b": None, "c": None}, repeats=1)
    terminal = Terminal(plan, plan.tasks, Console())
    assert terminal.seconds_left(0.0) is None
    command = ["x"]
    outcomes.save(plan.folder, outcomes.Outcome("b", 1, "done", "", 0, 30.0, command))
    outcomes.save(plan.folder, outcomes.Outcome("c", 1, "done", "", 0, 10.0, command))
    terminal = Terminal(plan, plan.tasks, Console())
    assert terminal.seconds_left(5.0) == (20 - 5) + 30 + 10


def test_the_live_display_tells_how_far_a_run_is(place: Place) -> None:
    plan = place.plan({"slow": {"settings": {"optim.lr": 0.4}, "timeout_s": 1.0}}, repeats=1)
    console = Console(width=100, force_terminal=True, color_system=None)
    with console.capture() as capture, Terminal(plan, plan.tasks, console) as terminal:
        runner.run_all(plan, plan.tasks, terminal, Interruption())
    shown = capture.get()
    assert "slow-1  repeat 1 of 1  step 1/4  loss 3.0000  200 tokens/s" in shown and "0 of 1 runs" in shown
