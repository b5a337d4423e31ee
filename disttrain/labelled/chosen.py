"""Which examples a config trains on and which it holds out. No torch."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from disttrain.config.problems import Problem, RefusedInput
from disttrain.config.schema import Config
from disttrain.config.settings import setting
from disttrain.labelled import splits
from disttrain.labelled.cleaning import clean_splits
from disttrain.labelled.examples import Example, Question, Sentences
from disttrain.labelled.hub import read_hub
from disttrain.labelled.reading import file_of, known_set, read

Examples = tuple[Example, ...]


def split_names(config: Config) -> tuple[str, str | None]:
    """The split that is trained on, and the one that is evaluated; None where it is a part of the same one."""
    task, chosen = config.task, known_set(config.task.set or "")
    train = task.train_split or chosen.splits[0]
    others = [name for name in chosen.splits if name != train]
    return train, task.test_split or (others[0] if others and task.folds is None else None)


def chosen_examples(config: Config) -> tuple[Examples, Examples]:
    """Training and held-out examples, cleaned. Raises RefusedInput for unknown splits, bad files and empty parts."""
    task, chosen = config.task, known_set(config.task.set or "")
    if task.folds is not None and task.test_split is not None:
        raise RefusedInput([Problem((setting(config, "task.folds"), setting(config, "task.test_split")),
                                    "folds are parts of what is trained on", "remove one of them")])  # fmt: skip
    train, test = split_names(config)
    rows = _read(config, train)
    if test is not None:
        held_out = _read(config, test)
    else:
        kept, held = _parts(config, rows)
        rows, held_out = tuple(rows[i] for i in kept), tuple(rows[i] for i in held)
    if task.max_examples is not None and task.max_examples < len(rows):
        drawn = np.random.default_rng((config.run.seed, 5)).permutation(len(rows))[: task.max_examples]
        rows = tuple(rows[i] for i in np.sort(drawn))
    cleaned = clean_splits(config.cleaning, chosen.kind, {"train": rows, "held_out": held_out})
    return cleaned["train"].examples, cleaned["held_out"].examples


def _read(config: Config, split: str) -> Examples:
    task = config.task
    if task.source == "hub":
        return read_hub(task.set or "", split, task.path).examples
    return read(task.set or "", task.path or "", split).examples


def _parts(config: Config, rows: Examples) -> splits.Rows:
    """By folds or by share; questions go by articles, and classes keep their proportion."""
    task, seed = config.task, config.run.seed
    if isinstance(rows[0], Question):
        questions = [one for one in rows if isinstance(one, Question)]
        return splits.by_article(questions, 1 / task.folds if task.folds else task.held_out_fraction, seed)
    labels = _classes(rows)
    if task.folds is None:
        return splits.dev_from_train(len(rows), task.held_out_fraction, seed, labels)
    if labels is None:
        return splits.folds(len(rows), task.folds, seed)[task.fold]
    return splits.stratified_folds(labels, task.folds, seed)[task.fold]


def _classes(rows: Sequence[Example]) -> list[str] | None:
    labels = [one.label for one in rows if isinstance(one, Sentences)]
    return [str(label) for label in labels] if labels and all(isinstance(label, str) for label in labels) else None


def sources(config: Config) -> list[list[object]]:
    """Name, size and time of every file that is read: prepared examples are of these. Empty for the hub."""
    task = config.task
    if task.source == "hub":
        return []
    chosen, found = known_set(task.set or ""), []
    for split in {name for name in split_names(config) if name is not None}:
        path = file_of(chosen, Path(task.path or "").expanduser(), split)
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        found += [[str(file), os.stat(file).st_size, os.stat(file).st_mtime_ns] for file in files]
    return sorted(found, key=str)
