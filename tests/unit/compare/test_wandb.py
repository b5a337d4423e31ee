"""The comparison in Weights & Biases, really written offline; a failure of W&B costs nothing but a line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from disttrain.compare import wandb as sink
from disttrain.compare.reading import of_runs
from disttrain.compare.report import write
from disttrain.config.schema import Config, LogConfig
from tests.offline_wandb import written
from tests.unit.compare import made_up
from tests.unit.compare.made_up import records, step

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import sys
from pathlib import Path
from disttrain.compare.reading import of_folders
from disttrain.compare.report import write
from disttrain.compare.wandb import publish
from disttrain.config.schema import Config, LogConfig
folder = Path(sys.argv[1])
comparison = of_folders([folder / "a", folder / "b"])
write(comparison, folder)
publish(comparison, Config(log=LogConfig(wandb=True, wandb_group="mine")), folder)
"""


def runs(folder: Path) -> list[Path]:
    return [made_up.write(folder / name, records(name, [step(n, seconds, 2.0) for n in (1, 2, 3)]))
            for name, seconds in (("a", 0.5), ("b", 0.25))]  # fmt: skip


def test_a_table_and_the_files(tmp_path: Path) -> None:
    runs(tmp_path)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
                          env={**kept, "WANDB_MODE": "offline"}, timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0 and "failed" not in done.stderr, done.stderr
    (ours,) = written(tmp_path)
    assert ours.run.run_group == "mine" and ours.run.job_type == "comparison"
    assert ours.run.run_id == (tmp_path / "wandb_id").read_text().strip()
    kinds = {kind: files for _, kind, files in ours.artifacts}
    assert {"report.html", "report.md", "report.png", "strategies.csv", "runs.csv"} == set(kinds[sink.ARTIFACT_TYPE])
    logged = {key: value for _, row in ours.rows for key, value in row.items()}
    assert (logged["strategies_type"], logged["strategiesnrows"]) == ("table-file", 2), logged


def test_a_failure_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    comparison = of_runs(runs(tmp_path))
    write(comparison, tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    sink.publish(comparison, Config(log=LogConfig(wandb=True)), tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("disttrain: W&B failed (") and str(tmp_path) in line
