"""Weights & Biases through the real command: the right numbers once, resume, offline upload, sweeps, no network."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from disttrain import preflight
from disttrain.config.load import all_keys, load
from tests.offline_wandb import written
from tests.runs.conftest import SETTINGS, Workplace
from tests.runs.test_train import wait_for_step

ROOT = Path(__file__).parents[2]
KEY = "0123456789abcdef0123456789abcdef01234567"
PIPELINE = ("model.layers=2", "parallel.pipeline=2", "train.micro_batch_size=2", "--nproc", "2")


@pytest.fixture(autouse=True)
def no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def upload_command(workplace: Workplace, output: str) -> str:
    """The command that the run named at its end, on the terminal and in its records."""
    (message,) = {e["message"] for e in workplace.records("run", "event") if "wandb sync" in e["message"]}
    assert message in output
    return message.split("upload with: ")[1]


def listed(command: str) -> str:
    """What that command would upload."""
    words = [sys.executable, "-m", "wandb", *shlex.split(command)[1:], "--dry-run"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout + done.stderr


def test_one_run_holds_the_numbers_of_all_ranks_and_the_report(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is known to the last stage alone, and the most memory is on whichever rank; rank 0 writes."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    done = workplace.run("train", "run.yaml", *PIPELINE, "log.wandb=true", "log.wandb_group=several",
                         "log.wandb_tags=[a, b]")  # fmt: skip
    folder = workplace.folder / "runs/run"
    (ours,) = written(folder)
    assert (ours.run.project, ours.run.run_group, list(ours.run.tags)) == ("disttrain", "several", ["a", "b"])
    assert ours.exit_code == 0
    steps = {r["step"]: r for r in workplace.records("run", "step")}
    rows = {step: values for step, values in ours.rows if "train/loss" in values}
    assert sorted(rows) == sorted(steps) == list(range(1, 13))
    for step, values in rows.items():
        trained = {key.removeprefix("train/"): value for key, value in values.items() if key.startswith("train/")}
        assert len(trained) > 20 and trained == {key: steps[step][key] for key in trained}
    assert {row["host_rss_bytes_max_rank"] for row in steps.values()} <= {0, 1}
    workplace.run("train", "run.yaml", "run.name=alone", "model.layers=2")
    alone = [r["loss"] for r in workplace.records("alone", "step")]
    assert [values["train/loss"] for values in rows.values()] == pytest.approx(alone, rel=1e-4)
    assert ours.summary["summary/stop_reason"] == "steps"
    assert ours.config["parallel"]["pipeline"] == 2

    ((name, kind, files),) = ours.artifacts
    assert (name, kind) == (f"report-{ours.run.run_id}", "disttrain-run")
    assert sorted(files) == ["config.yaml", "loss_curve.png", "metrics.jsonl", "summary.json"]
    for file in ("config.yaml", "loss_curve.png", "summary.json"):
        assert files[file].read_bytes() == (folder / file).read_bytes()
        assert files[file].is_relative_to(folder / "wandb")
    assert "Would sync 1 run(s)" in listed(upload_command(workplace, done.stdout))
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        assert KEY.encode() not in path.read_bytes(), path
    assert KEY not in done.stdout + done.stderr


def test_a_requeued_run_is_one_run_and_its_folders_are_uploaded_together(workplace: Workplace) -> None:
    long = ("train", "run.yaml", "--nproc", "2", "log.wandb=true", "train.eval_every=0", "checkpoint.every=0")
    process = workplace.start(*long, "train.steps=100000")
    wait_for_step(workplace, process, 5)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)
    assert process.returncode == 130, output
    reached = workplace.records("run", "step")[-1]["step"]
    assert "Would sync 1 run(s)" in listed(upload_command(workplace, output))
    done = workplace.run(*long, f"train.steps={reached + 3}")
    first, second = written(workplace.folder / "runs/run")
    assert first.run.run_id == second.run.run_id
    steps = [step for part in (first, second) for step, values in part.rows if "train/loss" in values]
    assert steps == list(range(1, reached + 4))
    assert (first.exit_code, second.exit_code) == (130, 0)
    assert (len(first.artifacts), len(second.artifacts)) == (0, 1)  # the final report only
    assert "Would sync 2 run(s)" in listed(upload_command(workplace, done.stdout))


def test_a_server_that_never_answers_delays_the_run_and_no_more(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
        began = time.monotonic()
        done = workplace.run("train", "run.yaml", "log.wandb=true", "log.wandb_mode=online")
        assert time.monotonic() - began < 120
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("disttrain:")]
    assert "wandb failed and is left out from now on" in line and "use log.wandb_mode=offline" in line
    assert len(workplace.records("run", "step")) == 12
    (event,) = [e for e in workplace.records("run", "event") if e["event"] == "sink_failed"]
    assert event["details"] == {"sink": "wandb"} and KEY not in done.stderr + event["message"]


def test_a_report_that_cannot_be_drawn_does_not_make_the_training_a_failure(workplace: Workplace) -> None:
    (workplace.folder / "runs/run/loss_curve.png").mkdir(parents=True)
    done = workplace.run("train", "run.yaml")
    (event,) = [e for e in workplace.records("run", "event") if e["event"] == "report_failed"]
    assert "IsADirectoryError" in event["message"] and "disttrain report runs/run" in event["message"]
    assert event["message"] in done.stdout
    assert (workplace.folder / "runs/run/summary.json").exists()


SWEEP = yaml.safe_load((ROOT / "configs/wandb_sweep.yaml").read_text())

AGENT = """
import json, os, queue, sys
from wandb.wandb_agent import Agent
agent = Agent(None, queue.Queue(), sweep_id="sw33p")
agent._sweep_command = json.loads(sys.argv[1])  # as the server sends it back
os.environ.update(WANDB_SWEEP_ID="sw33p", WANDB_DIR=os.getcwd(), WANDB_PROJECT="searches")
for trial in json.loads(sys.argv[2]):
    agent._command_run(trial)
    print("exit code", agent._run_processes[trial["run_id"]].wait())
"""
"""The real agent's way to start a trial; what is missing is the server that proposes the settings."""


def test_a_sweep_gives_every_trial_its_settings_and_folder_and_joins_the_agents_run(workplace: Workplace) -> None:
    (workplace.folder / "configs").mkdir()
    (workplace.folder / "configs/gpt_tiny.yaml").write_text(yaml.safe_dump(SETTINGS))
    program = workplace.folder / "bin/disttrain"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m disttrain "$@"\n')
    program.chmod(0o755)
    rates = {"one1": 0.001, "two2": 0.02}
    trials = [
        {"run_id": run_id, "program": SWEEP["program"],
         "args": {"optim.lr": {"value": rate}, "optim.weight_decay": {"value": 0.0}, "optim.beta2": {"value": 0.99}}}
        for run_id, rate in rates.items()
    ]  # fmt: skip
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-c", AGENT, json.dumps(SWEEP["command"]), json.dumps(trials)], cwd=workplace.folder,
        env={**workplace.environment, "PATH": path}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout.count("exit code 0") == 2, done.stdout + done.stderr
    for run_id, rate in rates.items():
        (trial,) = written(workplace.folder / f"runs/sweep-{run_id}")
        assert (trial.run.run_id, trial.run.sweep_id, trial.run.project) == (run_id, "sw33p", "searches")
        assert trial.config["optim"]["lr"] == trial.config["optim.lr"] == rate
        assert trial.config["optim"]["beta2"] == 0.99
        assert SWEEP["metric"]["name"] in trial.rows[-1][1]


def test_every_value_of_the_sweep_is_a_good_setting() -> None:
    (file,) = re.findall(r"configs/\S+\.yaml", " ".join(SWEEP["command"]))
    for key, choice in SWEEP["parameters"].items():
        assert key in all_keys()
        values = choice.get("values") or [choice["min"], choice["max"]]
        for value in values:
            config = load(ROOT / file, [f"{key}={value}", "log.wandb=true"])
            assert preflight.problems(config, 1) == []
