"""Soft labels: what teachers think of a student's training examples, computed once and kept with them (Hinton et al. 2015).

A teacher reads the examples with its own vocabulary and length, so a BERT can teach a BiLSTM (Tang et al. 2019).
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from disttrain.checkpoint import MANIFEST, newest_good
from disttrain.config.problems import Problem, RefusedInput
from disttrain.config.schema import Config
from disttrain.config.settings import setting
from disttrain.data import Prepared
from disttrain.data.files import fingerprint, mapped, one_writer, sha256_file
from disttrain.labelled.arrays import encode
from disttrain.labelled.chosen import chosen_examples
from disttrain.labelled.examples import Example
from disttrain.models import TaskModel
from disttrain.models.distillation import soft_targets
from disttrain.tasks.trained import Trained, load_trained

BATCH = 64
"""Examples that a teacher looks at once."""
Report = Callable[[int, int], None]
"""Called with examples done and examples in all, those of all teachers."""


def with_soft_labels(config: Config, prepared: Prepared, report: Report | None = None) -> Prepared:
    """The same with the file of soft labels, which is made if it is not there; every process may call it.

    Raises RefusedInput for a teacher that is none, or of other labels.
    """
    if not config.distill.teachers:
        return prepared
    folder = prepared.train[0][0]
    path = folder / f"soft_{_identity(config)}.npy"
    with one_writer(folder):
        if not path.exists():
            soft = _soft_labels(config, mapped(folder / "train.targets.npy"), report)
            writing = path.with_suffix(".writing.npy")
            np.save(writing, soft)
            writing.replace(path)
    return replace(prepared, soft=path)


def _identity(config: Config) -> str:
    found = []
    for teacher in config.distill.teachers:
        newest, _ = newest_good(Path(teacher) / "checkpoints")
        if newest is None:
            raise RefusedInput([Problem((f"distill.teachers: {teacher}",), "there is no good checkpoint in it",
                                        "give the folder of a trained run")])  # fmt: skip
        found.append([str(Path(teacher).resolve()), newest.name, sha256_file(newest / MANIFEST)])
    return fingerprint([found, config.distill.weights, config.model.temperature])


def _soft_labels(config: Config, targets: np.ndarray, report: Report | None) -> np.ndarray:
    """float32 [N, C], or [N, S, C] of tags."""
    examples, _ = chosen_examples(config)
    teachers = [load_trained(Path(teacher)) for teacher in config.distill.teachers]
    total, logits = len(examples) * len(teachers), []
    for number, teacher in enumerate(teachers):
        logits.append(_logits(config, teacher, examples, targets, report, number * len(examples), total))
    return soft_targets(logits, config.model.temperature, config.distill.weights).float().numpy()


def _logits(
    config: Config, teacher: Trained, examples: tuple[Example, ...], targets: np.ndarray, report: Report | None,
    before: int, total: int,
) -> torch.Tensor:  # fmt: skip
    model, theirs = teacher.model, teacher.config
    name = f"distill.teachers: {theirs.run.name}"
    if (
        not isinstance(model, TaskModel)
        or theirs.task.set != config.task.set
        or theirs.model.labels != config.model.labels
    ):
        raise RefusedInput([Problem((name, setting(config, "task.set")), "the teacher was trained for other labels",
                                    f"give a run with task.set={config.task.set}")])  # fmt: skip
    arrays = encode(theirs, teacher.tokenizer, examples).arrays
    if arrays["targets"].shape != targets.shape or not np.array_equal(arrays["targets"] >= 0, targets >= 0):
        raise RefusedInput([Problem((name, setting(config, "data.sequence_length"), setting(config, "data.tokenizer")),
                                    "the teacher's tags are at other places than the student's",
                                    "use the tokenizer and the length of the teacher")])  # fmt: skip
    found = []
    with torch.no_grad():
        for first in range(0, len(examples), BATCH):
            batch = {n: torch.from_numpy(a[first : first + BATCH]) for n, a in arrays.items()}
            logits: Any = model.forward_batch({n: t.long() if t.dtype == torch.uint8 else t for n, t in batch.items()})
            found.append(logits.scores)
            if report is not None:
                report(before + min(first + BATCH, len(examples)), total)
    return torch.cat(found)
