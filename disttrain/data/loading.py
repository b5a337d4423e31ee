"""Batches of a run: a pure function of (seed, sample number), whoever asks, in whatever order."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from disttrain.config.schema import Config, TrainConfig
from disttrain.data import bert, gpt
from disttrain.data.order import Blend, permute, quotas
from disttrain.data.preparation import Prepared
from disttrain.data.shards import Split, TokenSet, read_index
from disttrain.data.tokenizer import Tokenizer, load_tokenizer

Batch = dict[str, np.ndarray]

# purposes of the run's random numbers, so that no two share a stream
_ORDER, _BLEND, _SEQUENCE = 1, 2, 3
_HELD_OUT_SEED = 0


class UnknownToken(RuntimeError):
    """A token was read that the tokenizer does not have: a shard is damaged."""


def shares(train: TrainConfig, step: int, data_rank: int, data_ranks: int) -> Iterator[tuple[int, int]]:
    """First sample and size of each micro-batch of one data rank in one step; see `Data.micro_batches`."""
    total = train.global_batch_size
    size = train.micro_batch_size or total // data_ranks
    if not 0 <= data_rank < data_ranks or size == 0 or total % (size * data_ranks):
        raise ValueError(f"{total} sequences cannot be split into micro-batches of {size} on {data_ranks} ranks")
    for number in range(total // (size * data_ranks)):
        yield step * total + (number * data_ranks + data_rank) * size, size


@dataclass(frozen=True)
class _Stream:
    """The samples of one split of all sources."""

    sets: tuple[TokenSet, ...]
    counts: tuple[int, ...]
    """Sequences of each set."""
    blend: Blend
    seed: tuple[int, ...]

    def sequences_of(self, samples: np.ndarray) -> list[tuple[TokenSet, int, tuple[int, ...]]]:
        """Token set, sequence number and key for random numbers of each sample number (int64 [n])."""
        source, position = self.blend.locate(samples)
        found: list[tuple[TokenSet, int, tuple[int, ...]]] = [(self.sets[0], 0, ())] * len(samples)
        epoch = position // np.asarray(self.counts)[source]
        for s, e in sorted(set(zip(source.tolist(), epoch.tolist(), strict=True))):
            rows = np.flatnonzero((source == s) & (epoch == e))
            number = permute(position[rows] % self.counts[s], self.counts[s], (*self.seed, _ORDER, s, e))
            for row, n in zip(rows.tolist(), number.tolist(), strict=True):
                found[row] = (self.sets[s], n, (*self.seed, _SEQUENCE, s, e, n))
        return found


@dataclass(frozen=True)
class Data:
    """Opened data of a run. Sample i of a run is the same on any number of ranks."""

    config: Config
    tokenizer: Tokenizer
    train_sequences: int
    """Different training sequences; over one source, an epoch."""
    held_out_sequences: int
    """Held-out sequences. With a blend: as many as keep its shares without meeting any twice."""
    _train: _Stream
    _held_out: _Stream

    @property
    def vocab_size(self) -> int:
        """Entries of the tokenizer: one more than the largest id."""
        return self.tokenizer.vocab_size

    def train_batch(self, first_sample: int, count: int) -> Batch:
        """Samples first_sample .. first_sample + count of the run, in rows. Epochs follow one another without end.

        `samples` int64 [count] are their numbers in the run, on which dropout depends.
        """
        samples = np.arange(first_sample, first_sample + count)
        return self._batch(self._train, samples) | {"samples": samples}

    def held_out_batch(self, first: int, count: int) -> Batch:
        """Held-out sequences first .. first + count, in an order that is the same for every seed.

        Raises IndexError beyond held_out_sequences.
        """
        if first < 0 or first + count > self.held_out_sequences:
            raise IndexError(f"held-out sequences {first}..{first + count} of {self.held_out_sequences}")
        return self._batch(self._held_out, np.arange(first, first + count))

    def micro_batches(self, step: int, data_rank: int, data_ranks: int) -> Iterator[Batch]:
        """The micro-batches of one data rank in one optimizer step (0-based).

        Of the step's positions 0 .. global_batch_size, micro-batch m of rank r takes (m * data_ranks + r) * size up
        to `size` further, where size is train.micro_batch_size or all at once. Raises ValueError when the global
        batch does not divide.
        """
        for first, size in shares(self.config.train, step, data_rank, data_ranks):
            yield self.train_batch(first, size)

    def _batch(self, stream: _Stream, samples: np.ndarray) -> Batch:
        found, data = stream.sequences_of(samples), self.config.data
        if self.config.model.family == "gpt":
            batch = gpt.batch([(tokens, number) for tokens, number, _ in found], data.sequence_length)
        else:
            recipe = bert.recipe(
                self.tokenizer, data.sequence_length, data.mlm_probability, data.short_sequence_probability
            )
            batch = bert.batch(found, recipe)
        self._require_known(batch, [tokens.index.folder for tokens, _, _ in found])
        return batch

    def _require_known(self, batch: Batch, folders: list[Path]) -> None:
        """Raises UnknownToken where a row, of the folder given for it, has an id that the tokenizer does not have.

        A model would fail with it inside its embedding, on a GPU without a word of where; parts of a vocabulary take it.
        """
        highest = np.maximum(batch["tokens"], batch["targets"]).max(axis=1)
        row = int(highest.argmax())
        if highest[row] >= self.vocab_size:
            raise UnknownToken(
                f"{folders[row]} holds id {highest[row]}, which is no token of the tokenizer, whose {self.vocab_size} ids "
                "end before it: the folder is damaged. Delete it and it is prepared again, or copy it again where it is "
                "data.path; `disttrain data prepare --verify` reads every checksum"
            )


def open_data(config: Config, prepared: Prepared) -> Data:
    """Open prepared data: reads the indexes and the tokenizer; tokens are mapped when they are first asked for.

    Raises RefusedInput when the prepared files are gone or damaged.
    """
    train = _sets(config, prepared.train, "train")
    held_out = _sets(config, prepared.held_out, "held_out")
    seed = config.run.seed
    parts = quotas([weight for _, weight in prepared.train])
    shares = _in_proportion(held_out[1], [weight for _, weight in prepared.held_out])
    return Data(
        config=config,
        tokenizer=load_tokenizer(prepared.tokenizer),
        train_sequences=sum(train[1]),
        held_out_sequences=sum(shares),
        _train=_Stream(*train, Blend(tuple(parts), (seed, _BLEND)), (seed,)),
        _held_out=_Stream(*held_out, Blend(tuple(shares), (_HELD_OUT_SEED, _BLEND)), (_HELD_OUT_SEED,)),
    )


def _in_proportion(counts: tuple[int, ...], weights: list[float]) -> list[int]:
    """The most sequences of each source that keep the weights' proportion without repeating any."""
    scarce = min(range(len(counts)), key=lambda i: counts[i] / weights[i])
    return [min(n, int(counts[scarce] * w / weights[scarce] + 1e-9)) for n, w in zip(counts, weights, strict=True)]


def _sets(config: Config, folders: tuple[tuple[Path, float], ...],
          split: Split) -> tuple[tuple[TokenSet, ...], tuple[int, ...]]:  # fmt: skip
    sets = tuple(TokenSet(read_index(folder), split) for folder, _ in folders)
    length = config.data.sequence_length
    if config.model.family == "gpt":
        return sets, tuple(gpt.sequences(tokens.tokens, length) for tokens in sets)
    return sets, tuple(bert.sequences(tokens, length) for tokens in sets)
