"""Word replacement: what may replace what, how often, and that it depends on (seed, sample) alone."""

from pathlib import Path

import numpy as np
import pytest

from disttrain.config.problems import RefusedInput
from disttrain.data.augmenting import any_word, nearest_words, read_synonyms, replace_words, table

V = 20


def text(length: int = 4000) -> np.ndarray:
    return np.random.default_rng(0).integers(0, V, length)


def test_a_table_by_hand() -> None:
    found = table({1: [4, 5], 3: [7]}, 8)
    assert [found.of(word).tolist() for word in range(8)] == [[], [4, 5], [], [7], [], [], [], []]
    words = np.array([1, 2, 3, 3, 0])
    changed = replace_words(words, found, 1.0, seed=0, sample=0)
    assert changed[0] in (4, 5) and changed[1:].tolist() == [2, 7, 7, 0]
    assert words.tolist() == [1, 2, 3, 3, 0]
    assert replace_words(words, table({}, 8), 1.0, 0, 0).tolist() == words.tolist()


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.7, 1.0])
def test_rate_and_evenness(rate: float) -> None:
    """Words shifted by 1 to 4, so that every replacement shows: within 4 deviations of what independent draws give."""
    found = table({word: [(word + shift) % V for shift in (1, 2, 3, 4)] for word in range(V)}, V)
    words = text()
    shifts = (replace_words(words, found, rate, 3, 5) - words) % V
    counts = np.bincount(shifts, minlength=5)
    assert len(counts) == 5
    for count, share in zip(counts, [1 - rate, *[rate / 4] * 4], strict=True):
        assert abs(count - share * len(words)) <= 4 * np.sqrt(len(words) * share * (1 - share))


def test_pure_function_of_seed_and_sample() -> None:
    """The last numbers are part of the format: a resumed run must draw what the interrupted one would have."""
    words, found = text(200), any_word(V)
    first = replace_words(words, found, 0.5, 1, 2)
    assert np.array_equal(first, replace_words(words, found, 0.5, 1, 2))
    assert not np.array_equal(first, replace_words(words, found, 0.5, 1, 3))
    assert not np.array_equal(first, replace_words(words, found, 0.5, 2, 2))
    assert replace_words(np.arange(8), found, 0.5, 0, 0).tolist() == [0, 1, 15, 9, 4, 19, 6, 3]


def test_specials_neither_change_nor_appear() -> None:
    words = text()
    changed = replace_words(words, any_word(V, specials=[0, 7]), 1.0, 0, 0)
    special = np.isin(words, [0, 7])
    assert np.array_equal(changed[special], words[special]) and not np.isin(changed[~special], [0, 7]).any()
    assert set(changed[~special]) == set(range(V)) - {0, 7}
    assert replace_words(words.reshape(40, 100), any_word(V), 0.3, 0, 0).shape == (40, 100)


def test_nearest_words() -> None:
    """Against all cosines written out; a word is not its own neighbour, nor is a special or a zero."""
    vectors = np.random.default_rng(1).normal(size=(V, 5))
    vectors[4] = 0
    vectors[9] = 3 * vectors[2]
    found = nearest_words(vectors, 3, specials=[6])
    others = [w for w in range(V) if w not in (4, 6)]
    for word in range(V):
        cosines = {o: vectors[word] @ vectors[o] / np.linalg.norm(vectors[word]) / np.linalg.norm(vectors[o])
                   for o in others if o != word and word in others}  # fmt: skip
        assert found.of(word).tolist() == sorted(cosines, key=lambda o: -cosines[o])[:3]
    assert found.of(2)[0] == 9 and found.of(9)[0] == 2
    with pytest.raises(ValueError, match="others as neighbours"):
        nearest_words(vectors, 19)


def test_synonyms_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "synonyms.txt"
    path.write_text("good\tgreat fine unheard\n\nfilm movie\nlost found\ngood nice good\n")
    ids = {word: i for i, word in enumerate(["good", "great", "fine", "nice", "film", "movie", "found"])}
    found = read_synonyms(path, ids, 8, "data.synonyms")
    assert found.of(0).tolist() == [1, 2, 3] and found.of(4).tolist() == [5]
    assert found.counts.tolist() == [3, 0, 0, 0, 1, 0, 0, 0]


def test_what_is_wrong_with_a_file_is_said_at_once(tmp_path: Path) -> None:
    path = tmp_path / "synonyms.txt"
    path.write_text("good great\nalone\nfilm movie\nlonely\n")
    with pytest.raises(RefusedInput) as refused:
        read_synonyms(path, {"good": 0, "great": 1}, 2, "data.synonyms")
    assert [p.settings for p in refused.value.problems] == [
        (f"data.synonyms={path}", "line 2"),
        (f"data.synonyms={path}", "line 4"),
    ]
    path.write_text("film movie\n")
    with pytest.raises(RefusedInput, match="no word of the vocabulary"):
        read_synonyms(path, {"good": 0, "movie": 1}, 2, "data.synonyms")
    path.write_bytes(b"caf\xe9 bar\n")
    with pytest.raises(RefusedInput, match="not UTF-8"):
        read_synonyms(path, {}, 2, "data.synonyms")
    with pytest.raises(RefusedInput, match="No such file"):
        read_synonyms(tmp_path / "absent", {}, 2, "data.synonyms")


def test_a_rate_outside_0_to_1_is_refused() -> None:
    with pytest.raises(ValueError, match="rate"):
        replace_words(text(3), any_word(V), 1.5, 0, 0)
