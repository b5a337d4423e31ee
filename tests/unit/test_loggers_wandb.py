"""Weights & Biases, really run offline; its own transaction log is read back."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from disttrain.config.checks import validate
from disttrain.config.load import load
from disttrain.config.problems import RefusedInput
from disttrain.loggers import wandb as sink_module
from tests.offline_wandb import written

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys
from pathlib import Path
from disttrain.config.schema import Config, LogConfig, RunConfig
from disttrain.loggers import open_loggers
folder, first, last, resumed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
config = Config(run=RunConfig(name="named"), log=LogConfig(console="none", wandb=True))
header = {"name": "named", "config": config.model_dump(mode="json"), "world_size": int(sys.argv[5])}
with open_loggers(config, folder, header, None if resumed == "new" else int(resumed)) as loggers:
    for n in range(first, last + 1):
        loggers.write({"kind": "step", "step": n, "loss": first + 1 / n, "mfu_causal": None})
        if n % 2 == 0:
            loggers.write({"kind": "eval", "step": n, "eval_loss": float(n)})
    if sys.argv[6] == "ends":
        loggers.write({"kind": "summary", "step": last, "stop_reason": "steps", "loss": 0.5})
"""


def train(folder, first, last, resumed, ranks=2, ends="ends"):
    """One process of a run; W&B names its folder by the second, so two must not start in the same one."""
    began = int(time.time())
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    words = [str(word) for word in (folder, first, last, resumed, ranks, ends)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        cwd=ROOT,
        env={**kept, "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stderr
    time.sleep(max(0.0, began + 1.05 - time.time()))


def test_one_run_with_our_steps_continues_under_its_id_without_a_step_twice(tmp_path):
    train(tmp_path, 1, 5, "new", ends="killed")
    train(tmp_path, 4, 7, 3)  # rolled back to 3: steps 4 and 5 are done again
    first, second = written(tmp_path)
    kept = (tmp_path / "wandb_id").read_text().strip()
    assert first.run.run_id == second.run.run_id == kept and len(kept) == 8
    assert [step for step, _ in first.rows + second.rows] == [1, 2, 3, 4, 5, 6, 7]
    assert first.rows[1] == (2, {"train/loss": 1.5, "eval/eval_loss": 2.0})
    assert second.rows[0] == (6, {"train/loss": 4 + 1 / 6, "eval/eval_loss": 6.0})
    assert first.config["model"]["layers"] == 4 and first.config["header"]["world_size"] == 2
    assert second.config["run"]["name"] == "named"
    assert (first.exit_code, second.exit_code) == (1, 0)  # without a summary the run is marked as failed


def test_a_rollback_alerts_and_sends_no_step_twice(tmp_path, monkeypatch):
    back = "loggers.event('rolled_back', 'back', step=n, from_step=n, to_step=2)"
    again = "[loggers.write({'kind': 'step', 'step': m, 'loss': 9.0}) for m in range(3, n + 3)]"
    program = PROGRAM.replace("    if sys.argv[6]", f"    {back}; {again}\n    if sys.argv[6]")
    monkeypatch.setattr(sys.modules[__name__], "PROGRAM", program)
    train(tmp_path, 1, 5, "new")
    (process,) = written(tmp_path)
    assert [(step, row["train/loss"] == 9.0) for step, row in process.rows] == [(n, n > 5) for n in range(1, 8)]
    assert process.alerts == [("rolled_back", "step 5: back")]


def test_a_key_in_the_environment_is_not_written_anywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_WORD", "xyzzy-0123456789")
    secret = "0123456789abcdef0123456789abcdef01234567"
    program = PROGRAM.replace("import sys", f"import os, sys; os.environ['WANDB_API_KEY'] = {secret!r}", 1)
    env = {**os.environ, "WANDB_MODE": "offline"}
    words = [str(tmp_path), "1", "2", "new", "1", "ends"]
    subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, env=env, check=True, capture_output=True)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) > 3
    for path in files:
        content = path.read_bytes()
        assert secret.encode() not in content and b"xyzzy-0123456789" not in content, path


def labelled(folder, log="", **environ):
    """W&B's record of a short run with these settings and variables."""
    program = PROGRAM.replace("wandb=True", f"wandb=True, {log}")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "SLURM_"))}
    words = [str(folder), "1", "1", "new", "1", "ends"]
    env = {**kept, "WANDB_MODE": "offline", **environ}
    subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, env=env, check=True, timeout=120)
    (process,) = written(folder)
    return process.run


def test_settings_label_the_run_and_win_over_variables(tmp_path):
    ours = "wandb_project='p', wandb_entity='e', wandb_group='g', wandb_tags=['a', 'b'], wandb_notes='n'"
    run = labelled(tmp_path, ours, WANDB_PROJECT="x", WANDB_ENTITY="x", WANDB_RUN_GROUP="x", WANDB_TAGS="x",
                   WANDB_NOTES="x", SLURM_ARRAY_JOB_ID="7")  # fmt: skip
    assert (run.project, run.entity, run.run_group, run.notes, run.display_name) == ("p", "e", "g", "n", "named")
    assert list(run.tags) == ["a", "b"]


def test_variables_of_wandb_hold_where_nothing_is_set(tmp_path):
    run = labelled(tmp_path, WANDB_PROJECT="p", WANDB_ENTITY="e", WANDB_RUN_GROUP="g", WANDB_TAGS="a,b",
                   WANDB_NOTES="n", WANDB_NAME="m", WANDB_RUN_ID="mine", SLURM_ARRAY_JOB_ID="7")  # fmt: skip
    assert (run.project, run.entity, run.run_group, run.notes, run.display_name) == ("p", "e", "g", "n", "m")
    assert list(run.tags) == ["a", "b"] and run.run_id == "mine"


def test_the_tasks_of_a_slurm_array_are_one_group(tmp_path):
    assert labelled(tmp_path, SLURM_ARRAY_JOB_ID="4242").run_group == "slurm_array_4242"


def test_every_setting_of_wandb_is_refused_without_it_and_bad_names_always():
    given = {"project": "p", "entity": "e", "group": "g", "tags": "[a]", "notes": "n", "mode": "offline"}
    words = [f"log.wandb_{key}={value}" for key, value in given.items()]
    problems = validate(load(None, ["train.steps=1", *words]), 1)
    assert sorted(p.settings[0].split("=")[0] for p in problems) == sorted(f"log.wandb_{key}" for key in given)
    assert all(p.fix.endswith("log.wandb=true") for p in problems)
    assert validate(load(None, ["train.steps=1", "log.wandb=true", *words]), 1) == []
    for bad in ("log.wandb_project=a/b", "log.wandb_group=''", "log.wandb_tags=['']", "log.wandb_tags=a"):
        with pytest.raises(RefusedInput):
            load(None, ["log.wandb=true", bad])


def test_a_service_that_dies_in_the_middle_is_reported_and_training_goes_on(tmp_path):
    kill = """
        if n == 3:
            import psutil
            services = [p for p in psutil.Process().children(recursive=True) if "wandb-core" in p.name()]
            assert services
            [service.kill() for service in services]
            psutil.wait_procs(services, timeout=30)
"""
    before, middle, after = PROGRAM.partition("        if n % 2 == 0")
    program = before.rstrip() + kill + middle + after
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), "1", "6", "new", "1", "ends"], cwd=ROOT,
        env={**kept, "WANDB_MODE": "offline"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "disttrain: wandb failed and is left out from now on" in done.stderr
    assert "what was logged is on the disk: wandb sync" in done.stderr
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kinds.count("step") == 6 and kinds.count("event") == 1 and kinds[-1] in ("summary", "event")


def test_numbers_that_are_none_reach_wandb_as_what_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PROGRAM", PROGRAM.replace("first + 1 / n", "float('nan')"))
    train(tmp_path, 1, 2, "new")
    (process,) = written(tmp_path)
    assert math.isnan(process.rows[0][1]["train/loss"]) and process.exit_code == 0


def test_wandb_can_be_switched_off_by_its_own_variable(tmp_path):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), "1", "2", "new", "1", "ends"], cwd=ROOT,
        env={**kept, "WANDB_MODE": "disabled"}, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert written(tmp_path) == [] and "failed" not in done.stderr and "wandb sync" not in done.stdout


def test_the_id_is_made_once_and_an_empty_file_is_no_id(tmp_path):
    first, known = sink_module.id_of(tmp_path)
    assert not known and sink_module.id_of(tmp_path) == (first, True)
    (tmp_path / "wandb_id").write_text("")
    second, known = sink_module.id_of(tmp_path)
    assert not known and second != first


@pytest.mark.parametrize("mode", ["online", None])
def test_no_login_is_reported_and_training_goes_on(tmp_path, mode):
    program = PROGRAM.replace("wandb=True", f"wandb=True, wandb_mode={mode!r}")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    env = {**kept, "HOME": str(tmp_path / "home"), "NETRC": str(tmp_path / "netrc")}
    words = [str(tmp_path), "1", "2", "new", "1", "ends"]
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "disttrain: wandb failed and is left out from now on" in done.stderr
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["kind"] for r in written] == ["header", "event", "step", "step", "eval", "summary"]
    assert written[1]["details"] == {"sink": "wandb"}
