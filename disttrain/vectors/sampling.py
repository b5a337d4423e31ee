"""What word2vec predicts from what: subsampling, dynamic windows and noise words (numpy; no torch).

Mikolov et al. 2013a, "Efficient estimation of word representations in vector space", section 3; 2013b, "Distributed
representations of words and phrases and their compositionality", sections 2.2 and 2.3. All of it is a pure function of the
seed, the epoch and the number of the batch, so that training goes on exactly where it stopped.

Shapes: N words that subsampling keeps, B words of a batch, W window, V vocabulary, K noise words.
"""

from dataclasses import dataclass

import numpy as np

from disttrain.vectors.corpus import Corpus


@dataclass(frozen=True)
class Epoch:
    """The text of one epoch and the order in which its words are taken."""

    tokens: np.ndarray
    """int32 [N]: numbers of the words that are kept."""
    lines: np.ndarray
    """int32 [N]: the line each stands in."""
    order: np.ndarray
    """int64 [N]: a permutation of the places 0 to N - 1."""

    def batches(self, size: int) -> int:
        """How many batches of `size` words there are; the last may be smaller."""
        return -(-len(self.tokens) // size)

    def places(self, number: int, size: int) -> np.ndarray:
        """int64 [B]: the places in the text of batch `number`'s words."""
        return self.order[number * size : (number + 1) * size]


def keep_probability(counts: np.ndarray, subsample: float) -> np.ndarray:
    """float64 [V]: min(1, sqrt(subsample / f)) for words of relative frequency f (2013b, equation 5); 1 at subsample 0."""
    if subsample == 0:
        return np.ones(len(counts))
    return np.minimum(1.0, np.sqrt(subsample * counts.sum() / counts))


def generator_of(seed: int, *place: int) -> np.random.Generator:
    """Random numbers that depend on the seed and a place in training, such as (epoch, batch), and on nothing else."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=place))


def make_epoch(corpus: Corpus, subsample: float, seed: int, number: int) -> Epoch:
    """Drop frequent words at random and shuffle the rest; windows reach over what is dropped, as in the authors' program."""
    generator = generator_of(seed, number)
    probability = keep_probability(corpus.counts, subsample)
    kept = generator.random(len(corpus.tokens)) < probability[corpus.tokens]
    tokens = corpus.tokens[kept]
    return Epoch(tokens, corpus.lines[kept], generator.permutation(len(tokens)))


def neighbours(epoch: Epoch, places: np.ndarray, window: int, generator: np.random.Generator) -> np.ndarray:
    """int64 [B, 2 W]: the words around each place, within a reach drawn from 1 to `window` and within the line; else -1."""
    reach = generator.integers(1, window + 1, (len(places), 1))
    offsets = np.concatenate((np.arange(-window, 0), np.arange(1, window + 1)))
    at = places[:, None] + offsets
    inside = (np.abs(offsets) <= reach) & (at >= 0) & (at < len(epoch.tokens))
    at = at.clip(0, len(epoch.tokens) - 1)
    inside &= epoch.lines[at] == epoch.lines[places, None]
    return np.where(inside, epoch.tokens[at], -1).astype(np.int64)


def noise_distribution(counts: np.ndarray, power: float) -> np.ndarray:
    """float64 [V]: cumulative probabilities of noise words, in proportion to count ^ power (2013b, section 2.2)."""
    cumulative = np.cumsum(counts.astype(np.float64) ** power)
    return cumulative / cumulative[-1]


def noise(cumulative: np.ndarray, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """int64 of a shape: words drawn from a cumulative distribution."""
    return np.searchsorted(cumulative, generator.random(shape), side="right").clip(max=len(cumulative) - 1)
