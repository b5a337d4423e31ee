"""`disttrain finetune` of several seeds or folds: one run each, one after the other, then the mean and its spread.

A run that is done is not done again, so the same command goes on after an interruption.
"""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from disttrain.config.problems import Problem, RefusedInput
from disttrain.config.schema import Config
from disttrain.config.settings import setting
from disttrain.folders import write_atomically
from disttrain.loggers.readable import CORRELATIONS
from disttrain.preflight import run_folder


@dataclass(frozen=True)
class Part:
    """One run of several."""

    name: str
    """Its run.name."""
    words: tuple[str, ...]
    """Settings of its own, as on the command line."""


def parts(config: Config, seeds: int, folds: bool) -> list[Part]:
    """The runs. Raises RefusedInput where there is nothing to repeat, and for what is not a task."""
    if config.task.set is None:
        raise RefusedInput([Problem(("task.set=null",), "there is no task to fine-tune for",
                                    "give task.set, or use disttrain train")])  # fmt: skip
    if folds and config.task.folds is None:
        raise RefusedInput([Problem(("--folds", "task.folds=null"), "nothing says how many folds there are",
                                    "give task.folds=10")])  # fmt: skip
    base, found = config.run.name, []
    for seed in range(config.run.seed, config.run.seed + seeds):
        for fold in range(config.task.folds or 1) if folds else [config.task.fold]:
            name = base + (f"_seed{seed}" if seeds > 1 else "") + (f"_fold{fold}" if folds else "")
            own = (f"run.seed={seed}",) if seeds > 1 else ()
            found.append(Part(name, (f"run.name={name}", *own, *((f"task.fold={fold}",) if folds else ()))))
    return found


def done(config: Config, part: Part) -> dict[str, Any] | None:
    """The summary of a run that has ended by itself; None where there is none."""
    path = run_folder(config).parent / part.name / "summary.json"
    try:
        summary = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return None if summary.get("stop_reason") in (None, "interrupted") else summary


def run_part(config_path: Path, words: Sequence[str], part: Part, nproc: int | None) -> int:
    """Train it in processes of its own; the exit code."""
    several = ["--nproc", str(nproc)] if nproc else []
    command = [sys.executable, "-m", "disttrain", "train", str(config_path), *words, *part.words, *several]
    return subprocess.run(command, check=False).returncode


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, 0 of a single value."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0


def collected(summaries: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean, deviation and values of the loss, of shares of right predictions and of official scores, by key."""
    keys = [k for k in summaries[0] if k == "eval_loss" or k.endswith("_accuracy") or k.startswith("score_")]
    found = {}
    for key in keys:
        values = [summary[key] for summary in summaries if isinstance(summary.get(key), int | float)]
        if values:
            mean, deviation = spread(values)
            found[key] = {"mean": mean, "deviation": deviation, "values": values}
    return found


def table(found: dict[str, dict[str, Any]]) -> Table:
    """Scores of all runs for a person."""
    drawn = Table(box=None, pad_edge=False)
    for column in ("score", "mean", "deviation", "lowest", "highest", "runs"):
        drawn.add_column(column, justify="left" if column == "score" else "right")
    for key, one in found.items():
        name = key.removeprefix("score_").replace("_", " ")
        plain = key == "eval_loss" or name in CORRELATIONS
        shown = [f"{v:.4f}" if plain else f"{v:.2%}" for v in (one["mean"], one["deviation"], min(one["values"]),
                                                               max(one["values"]))]  # fmt: skip
        drawn.add_row(name, *shown, str(len(one["values"])))
    return drawn


def write(config: Config, found: dict[str, dict[str, Any]], runs: Sequence[Part]) -> Path:
    """The same as JSON beside the runs' folders; the file."""
    path = run_folder(config).with_name(f"{config.run.name}_repeated.json")
    text = json.dumps({"task": setting(config, "task.set"), "runs": [p.name for p in runs], "scores": found}, indent=1)
    write_atomically(path, text)
    return path
