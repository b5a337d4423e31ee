"""`plan --validate`: which layouts are drawn, what is made of their runs, and a small real one."""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from disttrain.config.load import load
from disttrain.config.problems import RefusedInput
from disttrain.planner import config as planning
from disttrain.planner import speeds, validated, validation
from disttrain.planner.prediction import Prediction
from disttrain.planner.validation import Trained, Validation, drawn, validate
from tests import warm
from tests.planner.machines import GPU, config, cpu

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["data.cache_dir=cache", "data.max_bytes=200000"]


def predictions(count: int) -> list[Prediction]:
    """Of layouts of one small model, the fastest first."""
    return drawn(config(precision="fp32"), 4, cpu(), 8e9, count, seed=0)[0]


def trained(count: int, seconds: list[float], spread: float = 0.0) -> list[Trained]:
    """Such layouts, with what they took."""
    return [
        Trained(one, (s * (1 - spread / 2), s, s * (1 + spread / 2)), int(one.memory.total / 1.25))
        for one, s in zip(predictions(count), seconds, strict=True)
    ]


def test_errors_are_shares_of_what_was_measured() -> None:
    (one,) = trained(1, [2.0], spread=0.5)
    half = one._replace(predicted=one.predicted._replace(step_seconds=1.5))
    assert (half.seconds, half.spread, half.time_error) == (2.0, 0.5, -0.25)
    assert half.memory_error == pytest.approx(0.25, rel=1e-5)
    on_a_gpu = one.predicted.memory._replace(runtime=1e12)  # of which torch's allocator knows nothing
    assert one._replace(predicted=one.predicted._replace(memory=on_a_gpu)).memory_error == one.memory_error


def test_the_choice_is_judged_by_the_fastest_measured_one() -> None:
    found = Validation(trained(4, [1.0, 0.8, 2.0, 3.0]), seed=0, legal=9)
    assert found.regret == pytest.approx(0.25)
    assert found.in_order == pytest.approx(5 / 6)  # all pairs but the first two
    (first, *others) = found.trained
    assert Validation([first._replace(failed="no"), *others], 0, 9).regret is None
    assert Validation([first], 0, 9).in_order is None


def test_a_sample_is_drawn_near_the_best_and_elsewhere() -> None:
    settings = config(precision="fp32")
    everything, legal = drawn(settings, 4, cpu(), 8e9, 10_000, seed=1)
    seconds = [one.step_seconds for one in everything]
    some, same = drawn(settings, 4, cpu(), 8e9, 9, seed=1)
    assert same == legal and len(some) == 9 and some == drawn(settings, 4, cpu(), 8e9, 9, seed=1)[0]
    assert some[0].step_seconds == min(seconds) and len({one.layout for one in some}) == 9
    assert some != drawn(settings, 4, cpu(), 8e9, 9, seed=2)[0]
    near = sorted(seconds)[len(seconds) // 4 + 1]
    assert sum(one.step_seconds <= near for one in some) >= 5
    assert len({(one.step_seconds, one.memory.total) for one in everything}) == len(everything) <= legal
    assert drawn(settings, 4, cpu(), 1.0, 9, seed=1) == ([], 0)
    assert all(one.memory.total <= 20e6 for one in drawn(settings, 4, cpu(), 20e6, 50, seed=1)[0])


def test_the_tables_say_how_wrong_it_is(tmp_path: Path) -> None:
    good = trained(3, [1.0, 2.0, 3.0])
    found = Validation([*good[:2], good[2]._replace(failed="exit code 1: [out] of memory")], seed=5, legal=40)
    console = Console(width=200)
    with console.capture() as shown:
        console.print(validated.shown(found))
    for words in ("MiB counted", "exit code 1: [out] of memory", "3 of 40 layouts that fit", "seed 5",
                  "step time: off by", "memory: off by 25.0% in the median", "regret of the planner's first choice: 0.0%",
                  "100% of the pairs"):  # fmt: skip
        assert words in shown.get()
    page = tmp_path / "page.md"
    page.write_text(f"before\n{validated.BEGIN}\nyesterday\n{validated.END}\nafter\n")
    for _ in range(2):
        validated.write(page, validated.markdown(found, config(precision="fp32"), 4, cpu()))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "yesterday" not in text
    assert text.count("| layout |") == 1 and f"| {good[1].predicted.layout.name} |" in text
    alone = tmp_path / "alone.md"
    validated.write(alone, "table")
    assert alone.read_text() == "table"


def in_a_fork(words: Sequence[str], env: Mapping[str, str], **options: Any) -> CompletedProcess:
    """What a run does that is started as a fresh process."""
    assert list(words[:4]) == [sys.executable, "-m", "disttrain", "train"]
    return warm.run(words[3:], Path.cwd(), env, timeout_s=200)


def test_a_sample_is_trained_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(validation, "subprocess", SimpleNamespace(run=in_a_fork))
    given = load(ROOT / "configs/gpt_tiny.yaml", [
        *SMALL, "model.layers=2", "model.hidden_size=64", "model.heads=2", "train.micro_batch_size=null",
        "train.global_batch_size=4", "data.sequence_length=64", "model.max_positions=64", "precision=fp32",
    ])  # fmt: skip
    settings, said = planning.plannable(given), []
    found = validate(given, settings, 2, cpu(ranks_per_host=2), 8e9, 2, 3, tmp_path / "work", said.append, repeats=1)
    assert [one.failed for one in found.trained] == [None, None] and len(said) == 3
    for one in found.trained:
        assert one.seconds > 0 and len(one.step_seconds) == 1 and abs(one.memory_error) < 0.25, one
    assert not (tmp_path / "work/runs").exists()
    before, said = found, []  # the same again: what was measured is not measured again, but a line that was cut off is
    measured = tmp_path / "work" / validation.MEASURED
    measured.write_text(measured.read_text()[:-5])
    found = validate(given, settings, 2, cpu(ranks_per_host=2), 8e9, 2, 3, tmp_path / "work", said.append, repeats=1)
    assert (
        said[0] == "1 runs were measured before: these are not made again"
        and sum(words.startswith("repeat 1 of 1") for words in said) == 1
    )
    assert len(measured.read_text().splitlines()) == 2
    assert found.trained[0] == before.trained[0] and found.trained[1].seconds != before.trained[1].seconds
    shutil.rmtree(tmp_path / "work")
    broken = given.model_copy(update={"data": given.data.model_copy(update={"path": "nowhere", "corpus": None})})
    failed = validate(broken, settings, 2, cpu(ranks_per_host=2), 8e9, 1, 3, tmp_path / "work", said.append, repeats=2)
    assert failed.good == [] and "exit code 2" in str(failed.trained[0].failed) and failed.regret is None


def refused(given: Any, device: str, machine: speeds.Speeds, world: int) -> str:
    with pytest.raises(RefusedInput) as caught:
        planning.refuse_validation(given, device, machine, world)
    return " ".join(f"{problem.settings} {problem.message} {problem.fix}" for problem in caught.value.problems)


def test_only_what_this_machine_can_train_is_validated(tmp_path: Path) -> None:
    given = config(precision="fp32")
    assert "use --device measured" in refused(given, "h100-sxm", GPU, 4)
    assert "calibrate --nproc 16" in refused(given, "measured", cpu(), 16)
    planning.refuse_validation(given, "measured", cpu(), 8)
    words = ["plan", str(ROOT / "configs/gpt_tiny.yaml"), "--gpus", "2", "--device", "h100-sxm"]
    for option in (["--table", "t.md"], ["--sample", "3"]):
        done = warm.run([*words, *option], tmp_path, {**os.environ}, timeout_s=60)
        assert done.returncode == 2 and option[0] in done.stderr and "--validate only" in " ".join(done.stderr.split())
