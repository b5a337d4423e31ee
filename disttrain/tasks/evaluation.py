"""`disttrain evaluate`: a trained model's loss and official scores on any split, in this one process."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from disttrain import inputs
from disttrain.config.schema import Config
from disttrain.data import Data
from disttrain.labelled.chosen import chosen_examples
from disttrain.labelled.loading import LabelledData
from disttrain.models import Model, TaskModel
from disttrain.scores.judging import judge
from disttrain.tasks.trained import load_trained

BATCH = 32
"""Sequences that are computed at once."""


def evaluate(folder: Path, split: str | None = None, path: str | None = None) -> dict[str, float]:
    """Loss, shares of right predictions and official scores of a run's newest good checkpoint, on its own held-out examples
    or on another split of its set, of files in another folder if `path` names one. Raises RefusedInput."""
    changed = {"task.test_split": split, "task.folds": None} if split else {}
    trained = load_trained(folder, {**changed, **({"task.path": path} if path else {})})
    return scores_of(trained.config, trained.model, inputs.open_data(trained.config, trained.prepared))


def scores_of(
    config: Config, model: Model, data: Data | LabelledData, sequences: int | None = None
) -> dict[str, float]:
    """The same of a model that is in memory, on its device; `sequences` are at most taken of the held-out ones."""
    count = min(sequences or data.held_out_sequences, data.held_out_sequences)
    device = next(model.parameters()).device
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    predicted: dict[int, Mapping[str, np.ndarray]] = {}
    with torch.no_grad():
        for first, batch in batches(data, count, device):
            batch = model.prepare_batch(batch)
            logits: Any = model.forward_batch(batch)
            for name, (total, of) in model.scores_of(logits, batch).items():
                sums[name] = sums.get(name, 0.0) + float(total)
                counts[name] = counts.get(name, 0.0) + float(of)
            if isinstance(model, TaskModel):
                found = model.predictions_of(logits, batch)
                for row in range(len(batch["tokens"])):
                    predicted[first + row] = {name: tensor[row].cpu().numpy() for name, tensor in found.items()}
    means = {name: sums[name] / max(counts[name], 1.0) for name in sums}
    losses = {name: mean for name, mean in means.items() if not name.endswith("_accuracy")}
    record = {"eval_loss": sum(losses.values()), **{n: m for n, m in means.items() if n not in losses}}
    if isinstance(data, LabelledData):
        official = judge(config, data.tokenizer, chosen_examples(config)[1], predicted)
        record |= {f"score_{name}": value for name, value in official.items()}
    return record


def batches(data: Data | LabelledData, count: int, device: torch.device) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Held-out batches as tensors, each with the number of its first sequence."""
    for first in range(0, count, BATCH):
        batch = data.held_out_batch(first, min(BATCH, count - first))
        yield first, {name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in batch.items()}
