"""Where one fault after the other strikes a small run of two ranks, beside a run that nobody disturbs."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from disttrain import checkpoint
from tests import warm
from tests.faults.job import (
    EVERY,
    PATIENCE_S,
    Job,
    WentWrong,
    last_step,
    newest,
    records,
    start,
    start_under,
    write_corpus,
)

STEPS, HIT = 24, 7
"""Length of a run, and the step after which it is hit: two steps after a checkpoint."""
SETTINGS = {
    "run": {"device": "cpu"},
    "model": {"family": "gpt", "layers": 1, "hidden_size": 32, "heads": 2, "max_positions": 32, "dropout": 0.1,
              "source": "faulty.py:Faulty"},
    "data": {"corpus": "text", "path": "corpus.txt", "tokenizer": "bytes", "sequence_length": 32, "cache_dir": "cache"},
    "train": {"steps": STEPS, "global_batch_size": 8, "eval_every": 0, "eval_sequences": 8},
    "optim": {"lr": 1.0e-3, "warmup_steps": 2},
    "precision": "fp32", "checkpoint": {"every": EVERY}, "log": {"console": "plain"},
}  # fmt: skip
SLOWLY = "sleeps: 0.05"
EXACTLY = "the same command resumed it exactly"


@dataclass
class Row:
    """What became of a run that was hit."""

    noticed: str
    """By what one sees it."""
    seconds: float | None
    """From the fault until then; None where it is the next start that sees it."""
    exit_code: int | str
    """Of the job that was hit; empty where others hold it."""
    gave: str
    """What the run then gave."""
    again: int | None = None
    """Steps that were done again; None where the run did not go back."""


class Place:
    """A folder with a corpus, hit.yaml and the undisturbed run."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "hit.yaml").write_text(yaml.safe_dump(SETTINGS))
        write_corpus(folder / "corpus.txt")
        shutil.copy(Path(__file__).with_name("faulty.py"), folder)
        self.ends(start(folder, ranks=2, name="alone"), 0)

    def command(self, *words: str) -> str:
        """What a command prints. Raises WentWrong where it fails."""
        done = warm.run(words, self.folder, os.environ, PATIENCE_S)
        if done.returncode:
            raise WentWrong(done.stdout + done.stderr)
        return done.stdout

    def start(self, name: str, *words: str, options: str = SLOWLY, launcher: list[str] | None = None) -> Job:
        """Start a run on two ranks, with these options of the faulty model."""
        (self.folder / "struck").unlink(missing_ok=True)
        words = (f"model.options={{{options}}}", *words)
        if launcher is None:
            return start(self.folder, *words, ranks=2, name=name)
        return start_under(launcher, self.folder, *words, name=name)

    def reached(self, name: str, *words: str, step: int = HIT, launcher: list[str] | None = None) -> Job:
        """Start a run, and wait until it has recorded a step."""
        job = self.start(name, *words, launcher=launcher)
        try:
            self.wait(job, lambda: last_step(job.run) >= step, PATIENCE_S)
        except BaseException:
            job.kill()
            raise
        return job

    def wait(self, job: Job, happened: Callable[[], bool], limit_s: float) -> float:
        """Wait until something has happened; when that was, seconds since 1970. Raises WentWrong."""
        deadline = time.time() + limit_s
        while not happened():
            alive = job.process.is_alive()
            if time.time() > deadline or not (alive or happened()):
                raise WentWrong(f"{job.name} {'did not get there' if alive else 'has ended'}:\n{job.said}")
            time.sleep(0.01)
        return time.time()

    def says(self, job: Job, words: str, limit_s: float = PATIENCE_S) -> float:
        """Wait until it has printed something; when that was."""
        return self.wait(job, lambda: words in " ".join(job.said.split()), limit_s)

    def ends(self, job: Job, code: int, limit_s: float = PATIENCE_S) -> None:
        """Wait for its end with an exit code, without a traceback. Raises WentWrong."""
        try:
            found = job.ended(limit_s)
        finally:
            job.kill()
        if found != code:
            raise WentWrong(f"{job.name}: exit code {found}, not {code}:\n{job.said}")
        if "Traceback" in job.said:
            raise WentWrong(f"{job.name}: a traceback:\n{job.said}")

    def lost(self, job: Job) -> int:
        """Recorded steps that the next start will do again."""
        good = newest(job.run)
        return last_step(job.run) - (checkpoint.step_of(good) if good else 0)

    def resumes(self, name: str, *words: str) -> str:
        """Start it again; it must end as the undisturbed run did, bit for bit. Raises WentWrong."""
        self.ends(self.start(name, *words), 0)
        self.is_exact(name)
        return EXACTLY

    def is_exact(self, name: str) -> None:
        """Raises WentWrong where a run is not the undisturbed one, bit for bit."""
        ours, theirs = (curve(self.folder / "runs" / run) for run in (name, "alone"))
        if ours != theirs:
            raise WentWrong(f"{name} is another run than the undisturbed one:\n{ours}\n{theirs}")
        last = checkpoint.path_of(self.folder / "runs" / name / "checkpoints", STEPS)
        weights, undisturbed = (
            checkpoint.read(last),
            checkpoint.read(self.folder / "runs/alone/checkpoints" / last.name),
        )
        if not all(weights[key].equal(value) for key, value in undisturbed.items()):
            raise WentWrong(f"{name} has other weights than the undisturbed run")

    def since_struck(self, when: float) -> float:
        """Seconds since the model did what its options say."""
        return when - os.stat(self.folder / "struck").st_mtime


def curve(run: Path) -> list[tuple[Any, ...]]:
    """What must not depend on interruptions."""
    keys = ("step", "loss", "grad_norm", "learning_rate", "tokens_seen")
    return [tuple(record[key] for key in keys) for record in records(run, "step")]


def event(job: Job, name: str) -> dict[str, Any]:
    """The first event of a name. Raises WentWrong where there is none."""
    for record in records(job.run, "event"):
        if record["event"] == name:
            return record
    raise WentWrong(f"{job.name}: no event {name}:\n{job.said}")
