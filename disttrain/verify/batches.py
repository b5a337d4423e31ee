"""The batches of a verification: the user's own data, with very different numbers of targets in each sequence.

No torch. Rows are handed out as `Data.micro_batches` does it: micro-batch m of data rank r takes rows
(m * data_ranks + r) * size and up to `size` further ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from disttrain.config.problems import Problem, RefusedInput
from disttrain.config.schema import Config
from disttrain.data import Data
from disttrain.labelled.loading import LabelledData

Batch = Mapping[str, np.ndarray]

GLOBAL_BATCH = 16
"""Sequences of a step: two micro-batches for each of 8 data ranks, enough for every schedule on fewer."""
IGNORED = -100


@dataclass(frozen=True)
class Batches:
    """All batches of a verification; every array has one row for each sequence."""

    train: tuple[Batch, ...]
    """Global batch of each step; `samples` int64 [B] numbers the sequences over the run."""
    held_out: Batch
    source: str
    """Where they are from, for the certificate."""


def from_data(config: Config, data: Data | LabelledData, steps: int) -> Batches:
    """Batches of the run's own data. Raises RefusedInput when there are too few held-out sequences."""
    size = config.train.global_batch_size
    if data.held_out_sequences < size:
        settings = (f"held-out sequences {data.held_out_sequences}",)
        raise RefusedInput([Problem(settings, f"verify evaluates {size} held-out sequences",
                                    "raise data.held_out_fraction or shorten data.sequence_length")])  # fmt: skip
    train = [data.train_batch(step * size, size) for step in range(steps)]
    source = f"{config.task.set or config.data.corpus or 'blend'}, {config.data.tokenizer}"
    return Batches(
        tuple(_prepared(batch, step, config.run.seed) for step, batch in enumerate(train)),
        _numbered(data.held_out_batch(0, size), 0),
        source,
    )


def synthetic(config: Config, steps: int) -> Batches:
    """Random tokens, for a model without data. Raises ValueError when the vocabulary is still open."""
    made = [random_batch(config, (config.run.seed, step)) for step in range(steps + 1)]
    train = tuple(_prepared(batch, step, config.run.seed) for step, batch in enumerate(made[:steps]))
    return Batches(train, _numbered(made[steps], 0), "random tokens")


def micro_batches(batch: Batch, data_rank: int, data_ranks: int, size: int | None) -> list[Batch]:
    """One data rank's micro-batches of a global batch. Raises ValueError when the rows do not divide."""
    rows = len(batch["tokens"])
    size = size or rows // data_ranks
    if rows % (size * data_ranks):
        raise ValueError(f"{rows} sequences cannot be split into micro-batches of {size} on {data_ranks} ranks")
    starts = range(data_rank * size, rows, data_ranks * size)
    return [{name: array[start : start + size] for name, array in batch.items()} for start in starts]


def _prepared(batch: Batch, step: int, seed: int) -> Batch:
    """Fewer targets, unevenly: from every target of a sequence down to a fifth of them, and none in one sequence.

    A mean over ranks or micro-batches of their own means then differs from the mean over targets.
    """
    targets = batch["targets"]
    rows = len(targets)
    rng = np.random.default_rng((seed, 11, step))
    share = rng.permutation(np.linspace(0.2, 1.0, rows))
    shape = (rows, 1) if "answerable" in batch else targets.shape  # both ends of an answer, or none
    kept = rng.random(shape) < share.reshape(rows, *[1] * (targets.ndim - 1))
    if targets.ndim > 1:
        kept[:, shape[1] // 3] = True
    kept[rng.integers(rows)] = False
    return _numbered({**batch, "targets": np.where(kept, targets, IGNORED)}, step * rows)


def _numbered(batch: Batch, first: int) -> Batch:
    return {**batch, "samples": np.arange(first, first + len(batch["tokens"]), dtype=np.int64)}


def random_batch(config: Config, seed: Sequence[int]) -> Batch:
    """A global batch of random tokens. Raises ValueError when the vocabulary is still open."""
    if config.model.vocab_size is None:
        raise ValueError("model.vocab_size is not resolved yet")
    rng = np.random.default_rng(seed)
    shape = (config.train.global_batch_size, config.data.sequence_length)
    batch = {
        "tokens": rng.integers(0, config.model.vocab_size, shape),
        "targets": rng.integers(0, config.model.vocab_size, shape),
    }
    if config.model.family != "bert":
        return batch
    lengths = rng.integers(shape[1] // 3, shape[1] + 1, shape[0])[:, None]
    places = np.arange(shape[1])[None]
    return {
        **batch,
        "targets": np.where(places < lengths, batch["targets"], IGNORED),
        "attention_mask": places < lengths,
        "token_types": (places >= lengths // 2).astype(np.int64),
        "next_sentence": rng.integers(0, 2, shape[0]),
    }
