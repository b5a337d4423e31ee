"""Subsampling, windows and noise words: by hand, by frequency, and as functions of (seed, epoch, batch) alone."""

from pathlib import Path

import numpy as np
import pytest

from disttrain.vectors.sampling import (
    Epoch,
    generator_of,
    keep_probability,
    make_epoch,
    neighbours,
    noise,
    noise_distribution,
)
from tests.unit.vectors.made import corpus_of


def test_keep_probability_by_hand() -> None:
    # of 100 words 64 + 32 + 4: f = 0.64, 0.32, 0.04 at t = 0.16
    kept = keep_probability(np.array([64, 32, 4]), 0.16)
    assert kept == pytest.approx([0.5, np.sqrt(0.5), 1.0], rel=1e-15)
    assert keep_probability(np.array([64, 32, 4]), 0.0).tolist() == [1, 1, 1]


def test_an_epoch_drops_frequent_words_as_often_as_it_should(tmp_path: Path) -> None:
    _, corpus = corpus_of(tmp_path, ("x " * 9 + "y\n") * 2000)
    epoch = make_epoch(corpus, 0.1, seed=3, number=0)
    x, y = np.bincount(epoch.tokens)
    assert y == 2000 * 1
    assert x == pytest.approx(18000 * np.sqrt(0.1 / 0.9), abs=5 * np.sqrt(18000) / 2)
    assert sorted(epoch.order) == list(range(x + y))
    assert np.all(np.diff(epoch.lines) >= 0)


def test_epochs_differ_and_repeat(tmp_path: Path) -> None:
    _, corpus = corpus_of(tmp_path, "a b c d e f g h\n" * 50)
    first, again, other, seeded = (make_epoch(corpus, 0.05, s, n) for s, n in ((1, 0), (1, 0), (1, 1), (2, 0)))
    np.testing.assert_array_equal(first.order, again.order)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert first.tokens.tolist() != other.tokens.tolist() != seeded.tokens.tolist() != first.tokens.tolist()
    draws = {generator_of(1, *place).random() for place in ((0,), (0, 0), (0, 1), (1,), (1, 0))}
    assert len(draws) == 5


def test_every_word_is_in_one_batch() -> None:
    epoch = Epoch(np.arange(10), np.zeros(10), np.random.default_rng(0).permutation(10))
    assert epoch.batches(4) == 3
    places = np.concatenate([epoch.places(number, 4) for number in range(3)])
    assert sorted(places) == list(range(10))


def test_neighbours_by_hand_at_full_reach() -> None:
    # two lines, "0 1 2" and "3 4", with a window of 1: its reach can only be 1
    epoch = Epoch(np.arange(5, dtype=np.int32), np.array([0, 0, 0, 1, 1]), np.arange(5))
    found = neighbours(epoch, np.array([0, 1, 2, 3, 4]), 1, np.random.default_rng(0))
    assert found.tolist() == [[-1, 1], [0, 2], [1, -1], [-1, 4], [3, -1]]


def test_reach_is_uniform() -> None:
    epoch = Epoch(np.arange(100, dtype=np.int32), np.zeros(100), np.arange(100))
    found = neighbours(epoch, np.full(30_000, 50), 3, np.random.default_rng(0))
    assert found[0].tolist() in ([-1, -1, 49, 51, -1, -1], [-1, 48, 49, 51, 52, -1], [47, 48, 49, 51, 52, 53])
    assert (found >= 0).mean(0) == pytest.approx([1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3], abs=0.01)
    np.testing.assert_array_equal(found[:, :3] >= 0, found[:, :2:-1] >= 0)


def test_noise_follows_counts_to_the_power() -> None:
    cumulative = noise_distribution(np.array([81, 16, 1]), 0.75)
    assert cumulative == pytest.approx([27 / 36, 35 / 36, 1.0], rel=1e-15)
    drawn = noise(cumulative, (200, 180), np.random.default_rng(0))
    assert drawn.shape == (200, 180)
    assert np.bincount(drawn.ravel()) / drawn.size == pytest.approx([27 / 36, 8 / 36, 1 / 36], abs=0.01)
