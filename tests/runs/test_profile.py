"""Profiles of whole runs: what they leave, that the seconds add up, what counts in averages, and how they end early."""

import gzip
import json
import signal
from pathlib import Path

import pytest

from disttrain.metrics import unknown_keys
from disttrain.profiling.seconds import AXES, ROWS
from tests.runs.conftest import Workplace
from tests.runs.test_train import wait_for_step

SHORT = ("train", "run.yaml", "train.eval_every=0", "checkpoint.every=0")


def table_of(workplace: Workplace, name: str = "run") -> dict:
    return json.loads((workplace.folder / "runs" / name / "trace" / "step_seconds.json").read_text())


def trace_of(workplace: Workplace, rank: int, name: str = "run") -> list[dict]:
    with gzip.open(workplace.folder / "runs" / name / "trace" / f"rank_{rank:04d}.json.gz") as file:
        return json.load(file)["traceEvents"]


def check_sums(found: dict) -> None:
    """Kinds add up to the step, for every rank and for the mean; what is waited for is a part of what is on its way."""
    for rank in found["ranks"]:
        assert set(rank["rows"]) == set(ROWS)
        assert sum(rank["rows"].values()) == pytest.approx(rank["step_seconds"], rel=1e-6)
        assert all(seconds >= 0 for seconds in rank["rows"].values())
        assert all(rank["on_the_way"][axis] >= rank["rows"][f"exposed {axis}"] - 1e-9 for axis in AXES)
    assert sum(found["seconds_mean"].values()) == pytest.approx(found["step_seconds_mean"], rel=1e-6)


def events(workplace: Workplace, *names: str) -> list[str]:
    return [r["message"] for r in workplace.records("run", "event") if r["event"] in names]


def test_a_profile_of_two_ranks(workplace: Workplace) -> None:
    """Steps 4 to 7 are looked at: the first for its memory. Their records stand alone although log.every is 5."""
    done = workplace.run(*SHORT, "--nproc", "2", "--profile", "log.every=5")
    folder = workplace.folder / "runs" / "run" / "trace"
    names = {"step_seconds.json"}
    names |= {f"rank_000{rank}.json.gz" for rank in (0, 1)} | {f"memory_rank_000{rank}.png" for rank in (0, 1)}
    assert {path.name for path in folder.iterdir()} == names
    found = table_of(workplace)
    assert (found["steps"], found["complete"], len(found["ranks"])) == ([5, 6, 7], True, 2)
    check_sums(found)
    assert min(rank["rows"][kind] for rank in found["ranks"] for kind in ("forward", "backward", "optimizer")) > 0
    assert found["on_the_way_seconds_mean"]["data"] > 0
    assert all(found["on_the_way_seconds_mean"][axis] == 0 for axis in ("tensor", "sequence", "context", "pipeline"))
    for rank in found["ranks"]:  # weights, two moments, and gradients as long as DDP's buckets
        held = rank["memory"]["bytes"]
        assert held["optimizer"] == pytest.approx(2 * held["weights"], rel=0.01)
        assert held["gradients"] == pytest.approx(held["weights"], rel=0.01)
        assert held["activations"] > 0
    for name in ("step 6", "data", "forward micro-batch 0", "backward micro-batch 0"):
        assert f"disttrain.{name}" in {event["name"] for event in trace_of(workplace, 1)}
    assert "data gloo:all_reduce" in {event["name"] for event in trace_of(workplace, 0) if event["ph"] == "b"}
    steps = workplace.records("run", "step")
    assert [(r["step"], r["interval_steps"], r["profiled"]) for r in steps] == [
        (3, 3, False), (4, 1, True), (5, 1, True), (6, 1, True), (7, 1, True), (10, 3, False), (12, 2, False),
    ]  # fmt: skip
    (summary,) = workplace.records("run", "summary")
    assert summary["measured_steps"] == 5
    assert summary["profiling_seconds"] > 0
    assert all(unknown_keys(r) == [] for kind in ("header", "step", "summary") for r in workplace.records("run", kind))
    assert events(workplace, "profiled") == ["profiled steps 5 to 7: runs/run/trace"]
    assert "a step by kind, steps 5 to 7" in done.stdout and "exposed: data" in done.stdout
    assert "profil" not in done.stderr  # torch has much to say of it
    assert "a step by kind, steps 5 to 7" in workplace.run("report", "runs/run").stdout


def test_the_weights_do_not_depend_on_being_looked_at(workplace: Workplace) -> None:
    words = ("--nproc", "2", "compression.codec=int8", "parallel.zero=1", "checkpoint.every=4", "train.eval_every=6")
    workplace.run("train", "run.yaml", *words)
    workplace.run("train", "run.yaml", *words, "run.name=seen", "--profile-steps", "6:7", "profile.ranks=[1]")
    assert workplace.curve("seen") == workplace.curve("run")
    assert workplace.evaluations("seen") == workplace.evaluations("run")
    names = {path.name for path in (workplace.folder / "runs" / "seen" / "trace").iterdir()}
    assert names == {"step_seconds.json", "rank_0001.json.gz", "memory_rank_0001.png"}
    found = table_of(workplace, "seen")
    assert (found["steps"], len(found["ranks"])) == ([6, 7], 2)
    check_sums(found)


@pytest.mark.slow
def test_axes_are_told_apart(workplace: Workplace) -> None:
    """Tensor and sequence parallelism, two stages, and context parallelism with FSDP2 (whose collectives torch calls)."""
    base = (*SHORT, "model.layers=2", "train.steps=3", "--profile-steps", "3:3", "train.micro_batch_size=2",
            "train.global_batch_size=4", "train.eval_sequences=2")  # fmt: skip
    workplace.run(*base, "--nproc", "4", "parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2")
    found = table_of(workplace)
    check_sums(found)
    ways = found["on_the_way_seconds_mean"]
    assert min(ways[axis] for axis in ("tensor", "sequence", "pipeline", "world")) > 0
    assert ways["context"] == 0
    assert {"disttrain.forward stage 1 micro-batch 1"} <= {event["name"] for event in trace_of(workplace, 2)}
    workplace.run(*base, "--nproc", "2", "parallel.context=2", "parallel.zero=3", "run.name=context")
    found = table_of(workplace, "context")
    check_sums(found)
    ways = found["on_the_way_seconds_mean"]
    assert min(ways[axis] for axis in ("context", "data", "world")) > 0
    assert ways["pipeline"] == ways["tensor"] == 0
    assert all(rank["memory"]["bytes"]["gathered weights"] > 0 for rank in found["ranks"])


def test_ctrl_c_leaves_what_there_is_and_a_resume_takes_its_own(workplace: Workplace) -> None:
    words = ("train", "run.yaml", "train.steps=4000", "train.eval_every=0", "checkpoint.every=0")
    process = workplace.start(*words, "--profile-steps", "10:4000")
    wait_for_step(workplace, process, 14)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    last = workplace.records("run", "step")[-1]["step"]
    found = table_of(workplace)
    assert (found["steps"], found["complete"]) == (list(range(10, last + 1)), False)
    check_sums(found)
    assert events(workplace, "profiled") == [f"profiled steps 10 to {last}: runs/run/trace"]
    for words, message in (
        (("--profile-steps", "2:3"), "no profile: steps 2 to 3 are not of this process, which began later"),
        (("--profile",), None),
    ):
        workplace.run(
            "train", "run.yaml", f"train.steps={last + 6}", "train.eval_every=0", "checkpoint.every=0", *words
        )
        if message is None:
            break
        assert events(workplace, "not_profiled")[-1] == message
        assert table_of(workplace) == found  # the one that is there stays
        last += 6
    assert table_of(workplace)["steps"] == [last + 4, last + 5, last + 6]


def test_what_cannot_be_profiled_is_refused_or_said(workplace: Workplace) -> None:
    refused = workplace.run(*SHORT, "--profile-steps", "11:13", "profile.ranks=[3]", code=2)
    assert "the run ends before these steps are over" in refused.stderr
    assert "there is no rank 3" in refused.stderr
    assert "give the first and the last step" in workplace.run(*SHORT, "--profile-steps", "11", code=2).stderr
    assert not Path(workplace.folder / "runs").exists()
    (workplace.folder / "runs" / "run").mkdir(parents=True)
    (workplace.folder / "runs" / "run" / "trace").write_text("in the way")
    workplace.run(*SHORT, "train.steps=4", "--profile")
    assert "the profile is not whole: rank 0: FileExistsError" in events(workplace, "profile_failed")[0]
    workplace.run(*SHORT, "run.name=short", "train.steps=1", "optim.warmup_steps=1", "--profile")
    (short,) = [r for r in workplace.records("short", "event") if r["event"] == "not_profiled"]
    assert short["message"] == "no profile: the run had too few steps left"
