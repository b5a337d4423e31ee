"""`disttrain measure`: bytes on disk, parameters, seconds of a forward pass and scores of models, side by side."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from disttrain import hardware
from disttrain.config.problems import Problem, RefusedInput
from disttrain.data import open_data
from disttrain.model_compression.evaluation import held_out_scores
from disttrain.model_compression.folder import Opened, open_folder
from disttrain.tasks.trained import Trained

Score = Callable[[Trained], Mapping[str, float]]
"""Numbers by name of a model, for example those of a task."""
WARM_UP = 3
"""Passes before any counts."""


@dataclass(frozen=True)
class Latency:
    """Seconds of a forward pass over a whole batch, head included."""

    batch: int
    """Sequences."""
    median: float
    low: float
    """The tenth part of the passes was faster."""
    high: float
    """The tenth part was slower."""
    ratio: float
    """To the first model: the median over rounds, each of which times every model."""


@dataclass(frozen=True)
class Row:
    """One model."""

    folder: str
    method: str
    nbytes: int
    parameters: int
    zeros: float
    """Share of the elements of matrices that are exactly zero."""
    latencies: list[Latency]
    scores: dict[str, float]


@dataclass(frozen=True)
class Table:
    """All models, and how they were measured."""

    rows: list[Row]
    sequence_length: int
    threads: int
    repeats: int
    torch: str
    device: str


def measure(
    folders: Sequence[Path],
    score: Score = held_out_scores,
    batches: Sequence[int] = (1, 32),
    sequence_length: int | None = None,
    repeats: int = 20,
    threads: int | None = None,
) -> Table:
    """Measure each model, on the CPU, in float32 but for fp16 and bf16 ones; the first is what others are compared with.

    Every round times one pass of every model for every batch size, so that a slow spell of the machine meets them all.
    Sequences are held-out ones, cut to `sequence_length`. Raises RefusedInput, everything at once, for folders without a
    model and for lengths that one of them cannot take.
    """
    opened = _opened(folders)
    length = sequence_length or min(found.trained.config.data.sequence_length for found in opened)
    problems = [
        Problem(
            (f"--sequence-length {length}", str(folder)), f"its sequences have {most} tokens", f"use {most} or less"
        )
        for folder, found in zip(folders, opened, strict=True)
        if length > (most := found.trained.config.data.sequence_length)
    ]
    if problems:
        raise RefusedInput(problems)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        times = _times([found.trained for found in opened], batches, length, repeats)
        rows = [
            Row(
                str(folder),
                found.method,
                found.nbytes,
                found.parameters,
                found.zeros,
                found_times,
                dict(score(found.trained)),
            )
            for folder, found, found_times in zip(folders, opened, times, strict=True)
        ]
        return Table(rows, length, torch.get_num_threads(), repeats, torch.__version__, hardware.cpu_name())
    finally:
        torch.set_num_threads(before)


def _opened(folders: Sequence[Path]) -> list[Opened]:
    found, problems = [], []
    for folder in folders:
        try:
            found.append(open_folder(folder))
        except RefusedInput as refused:
            problems += refused.problems
    if problems:
        raise RefusedInput(problems)
    return found


def _times(models: Sequence[Trained], batches: Sequence[int], length: int, repeats: int) -> list[list[Latency]]:
    """Of each model, for each batch size."""
    inputs = [[_batch(trained, size, length) for size in batches] for trained in models]
    seconds = np.zeros((len(models), len(batches), repeats))
    with torch.inference_mode():
        for number in range(-WARM_UP, repeats):
            for at, trained in enumerate(models):
                for column, batch in enumerate(inputs[at]):
                    began = time.perf_counter()
                    trained.model.forward_batch(batch)
                    if number >= 0:
                        seconds[at, column, number] = time.perf_counter() - began
    return [[_latency(seconds[at, column], seconds[0, column], size) for column, size in enumerate(batches)]
            for at in range(len(models))]  # fmt: skip


def _latency(seconds: np.ndarray, first: np.ndarray, size: int) -> Latency:
    low, high = (float(bound) for bound in np.quantile(seconds, [0.1, 0.9]))
    return Latency(size, float(np.median(seconds)), low, high, statistics.median((seconds / first).tolist()))


def _batch(trained: Trained, size: int, length: int) -> dict[str, Tensor]:
    """The first held-out sequences, again and again where there are too few."""
    data = open_data(trained.config, trained.prepared)
    there = min(size, data.held_out_sequences)
    batch = {name: np.resize(array, (size, *array.shape[1:])) for name, array in data.held_out_batch(0, there).items()}
    cut = {name: array[:, :length] if array.ndim > 1 else array for name, array in batch.items()}
    return trained.model.prepare_batch(
        {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in cut.items()}
    )


def as_json(table: Table) -> dict:
    """Everything, with units in the names: see the docstrings of `Row` and `Latency`; seconds and bytes."""
    return asdict(table)
