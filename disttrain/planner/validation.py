"""Predictions beside what really happens: a seeded sample of layouts, trained for a few steps on this machine.

The runs are those of `disttrain train`, one after the other, repeats interleaved, so that a slow spell of the machine
meets all layouts. On a CPU, where torch reports no peak, the bytes of live tensors are counted in a run of their own
(`disttrain.rehearsal.live`). Imports no torch before it counts.
"""

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from disttrain.config.load import dump, with_values
from disttrain.config.schema import Config
from disttrain.planner import space
from disttrain.planner.prediction import Prediction, Predictor
from disttrain.planner.speeds import Speeds
from disttrain.verify.layouts import Layout

STEPS = 13
"""Of a run; the first three are its warm-up, and in no average."""
REPEATS = 3
MEASURED = "measured.jsonl"
"""A line for each run that is done."""
Say = Callable[[str], None]


class Trained(NamedTuple):
    """One layout, predicted and trained."""

    predicted: Prediction
    step_seconds: tuple[float, ...]
    """Mean of each repeat."""
    peak_bytes: int
    """Of tensors, on the rank that holds most."""
    failed: str | None = None
    """Why it could not be trained; then the rest means nothing."""

    @property
    def seconds(self) -> float:
        """Median of the repeats."""
        return statistics.median(self.step_seconds)

    @property
    def spread(self) -> float:
        """(Slowest - fastest) / median of the repeats."""
        return (max(self.step_seconds) - min(self.step_seconds)) / self.seconds

    @property
    def time_error(self) -> float:
        """(Predicted - measured) / measured."""
        return self.predicted.step_seconds / self.seconds - 1

    @property
    def memory_error(self) -> float:
        """The same of the peak, without what the device's runtime holds."""
        memory = self.predicted.memory
        return (memory.total - memory.runtime) / self.peak_bytes - 1


class Validation(NamedTuple):
    """All of a sample; the planner's choice is the first one."""

    trained: list[Trained]
    seed: int
    legal: int
    """Layouts that were drawn from: all that fit."""

    @property
    def good(self) -> list[Trained]:
        """Those that could be trained."""
        return [one for one in self.trained if one.failed is None]

    @property
    def regret(self) -> float | None:
        """How much longer a step of the planner's choice takes than the shortest measured one, as a share of that; None if
        it could not be trained."""
        if self.trained[0].failed is not None:
            return None
        return self.trained[0].seconds / min(one.seconds for one in self.good) - 1

    @property
    def in_order(self) -> float | None:
        """Share of the pairs of layouts that are predicted in the order in which they were measured."""
        pairs = [(a, b) for at, a in enumerate(self.good) for b in self.good[at + 1 :]]
        right = [(a.seconds < b.seconds) == (a.predicted.step_seconds < b.predicted.step_seconds) for a, b in pairs]
        return statistics.mean(right) if right else None


def drawn(
    config: Config, world: int, speeds: Speeds, memory_bytes: float, count: int, seed: int
) -> tuple[list[Prediction], int]:
    """The fastest layout by prediction, half of the others from the fastest quarter, the rest from all others; and how many
    fit. A layout that is merely another name for one that was drawn (the same seconds and bytes) is left out."""
    predictor = Predictor(config, world, speeds)
    fitting = [one for one in map(predictor.of, space.layouts(config, world)) if one.memory.total <= memory_bytes]
    legal = [one for one in fitting if not one.layout.problems(config)]
    legal.sort(key=lambda one: (one.step_seconds, one.layout.name))
    if not legal:
        return [], 0
    unlike = list({(one.step_seconds, one.memory.total): one for one in reversed(legal)}.values())[::-1]
    quarter, generator = max(1, len(unlike) // 4), random.Random(seed)
    near, far = unlike[1:quarter], unlike[quarter:]
    half = min(len(near), count // 2)
    chosen = generator.sample(near, half) + generator.sample(far, min(len(far), count - 1 - half))
    return [unlike[0], *chosen], len(legal)


def validate(
    given: Config, config: Config, world: int, speeds: Speeds, memory_bytes: float, count: int, seed: int, folder: Path,
    say: Say, repeats: int = REPEATS,
) -> Validation:  # fmt: skip
    """Draw, train and count. `given` is the config as the user has it, `config` with its vocabulary.

    Runs are made in `folder` and removed; what each took stays there (`MEASURED`), so that a validation that was interrupted
    goes on with the same folder. The caller removes it.
    """
    predictions, legal = drawn(config, world, speeds, memory_bytes, count, seed)
    seconds: dict[Layout, list[float]] = {one.layout: [] for one in predictions}
    peaks: dict[Layout, int] = {}
    failed: dict[Layout, str] = {}
    known = _measured(folder)
    if known:
        say(f"{len(known)} runs were measured before: these are not made again")
    for repeat in range(repeats):
        for one in predictions:
            if one.layout in failed:
                continue
            found = known.get((one.layout.name, repeat))
            if found is None:
                say(f"repeat {repeat + 1} of {repeats}: {one.layout.name}")
                found = _train(given, one.layout, speeds, folder)
                _keep(folder, one.layout.name, repeat, found)
            if isinstance(found, str):
                failed[one.layout] = found
                continue
            seconds[one.layout].append(found["mean_step_seconds"])
            if found["peak_allocated_bytes_max"] is not None:
                peaks[one.layout] = max(peaks.get(one.layout, 0), found["peak_allocated_bytes_max"])
    counted = [one.layout for one in predictions if one.layout not in failed and one.layout not in peaks]
    if counted:
        say("counting the bytes of live tensors")
        peaks |= _counted(config, counted, speeds)
    trained = [
        Trained(one, tuple(seconds[one.layout]), peaks.get(one.layout, 0), failed.get(one.layout))
        for one in predictions
    ]
    return Validation(trained, seed, legal)


def _measured(folder: Path) -> dict[tuple[str, int], Any]:
    """What earlier runs gave, by layout and repeat; a line that was cut off is removed."""
    path = folder / MEASURED
    if not path.exists():
        return {}
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    path.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
    rows = [json.loads(line) for line in whole.splitlines()]
    return {(row["layout"], row["repeat"]): row["found"] for row in rows}


def _keep(folder: Path, layout: str, repeat: int, found: dict[str, Any] | str) -> None:
    """Write it down; a failure is tried again by the next command."""
    if not isinstance(found, str):
        found = {key: found[key] for key in ("mean_step_seconds", "peak_allocated_bytes_max")}
        with (folder / MEASURED).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"layout": layout, "repeat": repeat, "found": found}) + "\n")


def _train(given: Config, layout: Layout, speeds: Speeds, folder: Path) -> dict[str, Any] | str:
    """The summary of an ordinary run of a few steps, or the line that it failed with."""
    laid_out = with_values(layout.applied(given), {
        "precision": speeds.precision, "run.device": "cuda" if speeds.accelerator else "cpu",
        "run.name": "validation", "run.dir": str(folder / "runs"),
        "train.steps": STEPS, "train.tokens": None, "train.seconds": None, "train.target_loss": None,
        "train.eval_every": 0, "train.eval_sequences": given.train.global_batch_size,
        "optim.warmup_steps": min(given.optim.warmup_steps, STEPS),
        "checkpoint": type(given.checkpoint)(resume="never"), "log": type(given.log)(console="none"),
    })  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "validation.yaml"
    path.write_text(dump(laid_out), encoding="utf-8")
    words = [sys.executable, "-m", "disttrain", "train", str(path), "--nproc", str(layout.world)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ})
    summary = folder / "runs/validation/summary.json"
    try:
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no word"]
            return f"exit code {done.returncode}: {lines[-1]}"
        return json.loads(summary.read_text(encoding="utf-8"))
    finally:
        shutil.rmtree(folder / "runs", ignore_errors=True)


def _counted(config: Config, layouts: Sequence[Layout], speeds: Speeds) -> dict[Layout, int]:
    """Live bytes of the rank of each layout that holds most, in real steps on random tokens."""
    from disttrain.rehearsal.trace import count_here
    from disttrain.verify.ranks import Ranks

    found = {}
    config = with_values(config, {"precision": speeds.precision})
    with Ranks(count_here) as ranks:
        for layout in layouts:
            lives = ranks.run(layout.world, layout.applied(config), timeout_s=3600)
            found[layout] = max(live.total for live in lives)
    return found
