"""Held-out scores and calibration batches of a model in this one process, on the batches of training's own evaluation."""

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from disttrain.data import open_data
from disttrain.metrics.records import perplexity
from disttrain.tasks.trained import Trained

SEQUENCES = 16
"""Of a batch."""


@torch.no_grad()
def held_out_scores(trained: Trained, sequences: int | None = None) -> dict[str, float]:
    """`eval_loss` (nats, summed over objectives), `perplexity` of the token objective, and a BERT's accuracies.

    Over the held-out sequences of a run's evaluation, or the first so many of all; each sum is divided once, as in
    training. Equal to the run's own evaluation where that is in fp32, up to the order of sums.
    """
    wanted = trained.config.train.eval_sequences if sequences is None else sequences
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    for batch in held_out_batches(trained, wanted):
        for name, (sum_, count) in trained.model.scores(batch).items():
            sums[name] = sums.get(name, 0.0) + float(sum_)
            counts[name] = counts.get(name, 0.0) + float(count)
    means = {name: sums[name] / max(counts[name], 1.0) for name in sums}
    losses = {name: mean for name, mean in means.items() if not name.endswith("_accuracy")}
    found = {"eval_loss": sum(losses.values()), "perplexity": perplexity(losses) or math.nan}
    return found | {name: mean for name, mean in means.items() if name not in losses}


def held_out_batches(trained: Trained, sequences: int | None, size: int = SEQUENCES) -> Iterator[dict[str, Tensor]]:
    """The first so many held-out sequences (all where None is given), in batches; the order is that of every evaluation."""
    data = open_data(trained.config, trained.prepared)
    count = min(sequences or data.held_out_sequences, data.held_out_sequences)
    for first in range(0, count, size):
        yield _tensors(trained, data.held_out_batch(first, min(size, count - first)))


def training_batches(trained: Trained, batches: int, size: int = SEQUENCES) -> Iterator[dict[str, Tensor]]:
    """The first so many batches of a run's training sequences, without dropout."""
    data = open_data(trained.config, trained.prepared)
    for number in range(batches):
        batch = data.train_batch(number * size, size)
        yield _tensors(trained, {name: value for name, value in batch.items() if name != "samples"})


def _tensors(trained: Trained, batch: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return trained.model.prepare_batch({name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in batch.items()})
