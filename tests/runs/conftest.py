"""A small corpus and config, and the real command on them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import warm

SETTINGS: dict[str, Any] = {
    "model": {"family": "gpt", "layers": 1, "hidden_size": 32, "heads": 2, "max_positions": 32, "dropout": 0.1},
    "data": {"corpus": "text", "path": "corpus", "tokenizer": "bytes", "sequence_length": 32, "cache_dir": "cache"},
    "train": {"steps": 12, "global_batch_size": 8, "eval_every": 6, "eval_sequences": 8},
    "optim": {"lr": 1.0e-2, "warmup_steps": 2},
    "precision": "fp32",
    "checkpoint": {"every": 4},
    "log": {"console": "plain"},
}


class Workplace:
    """A folder with a corpus and run.yaml, and the command to use there."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "corpus").mkdir()
        words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
        text = "\n".join(" ".join(words[(i * j + j) % 10] for j in range(1, 12)) for i in range(600))
        (folder / "corpus" / "text.txt").write_text(text)
        (folder / "run.yaml").write_text(yaml.safe_dump(SETTINGS))

    def command(self, *words: str) -> list[str]:
        """The disttrain command line."""
        return [sys.executable, "-m", "disttrain", *words]

    @property
    def environment(self) -> dict[str, str]:
        """One thread a rank, so that sums are added in the same order in every run."""
        return {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}

    def run(self, *words: str, code: int = 0) -> subprocess.CompletedProcess:
        """Run it to the end and hold it to its exit code."""
        done = warm.run(words, self.folder, self.environment, timeout_s=200)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def start(self, *words: str) -> warm.Running:
        """Start it in a process group of its own."""
        return warm.Running(words, self.folder, self.environment)

    def records(self, name: str, kind: str) -> list[dict]:
        """Records of a run."""
        path = self.folder / "runs" / name / "metrics.jsonl"
        if not path.exists():
            return []
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [record for record in map(json.loads, lines) if record["kind"] == kind]

    def curve(self, name: str) -> list[tuple]:
        """What must not depend on interruptions: step, loss, gradient norm, rate, tokens."""
        keys = ("step", "loss", "grad_norm", "learning_rate", "tokens_seen", "skipped_steps")
        return [tuple(record[key] for key in keys) for record in self.records(name, "step")]

    def evaluations(self, name: str) -> list[tuple]:
        """Step and held-out loss."""
        return [(record["step"], record["eval_loss"]) for record in self.records(name, "eval")]


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)
