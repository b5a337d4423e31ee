"""Training texts with some words replaced: by synonyms, by words of nearby embeddings, or by any word (no torch).

Words are ids of a vocabulary of V words. What replaces which word is a table, however it was made. Which words of a text
are replaced, and by what, is a pure function of (seed, sample number): it does not depend on ranks, workers or resume.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from disttrain.config.problems import Problem, RefusedInput

_ROWS = 1024
"""Words whose neighbours are looked for at once."""


@dataclass(frozen=True)
class Replacements:
    """For each word id the ids that may replace it, as a run of `choices`; rows may share a run."""

    starts: np.ndarray
    """int64 [V]: where a word's run begins."""
    counts: np.ndarray
    """int64 [V]: how long it is; 0: the word is never replaced."""
    choices: np.ndarray
    """int64 [n]."""

    def of(self, word: int) -> np.ndarray:
        """The ids that may replace a word."""
        return self.choices[self.starts[word] : self.starts[word] + self.counts[word]]


def replace_words(words: np.ndarray, replacements: Replacements, rate: float, seed: int, sample: int) -> np.ndarray:
    """A copy of a text, int64 [n] (any shape), with words replaced; each with probability `rate`, on its own.

    A word's replacement is drawn evenly from its candidates; a word without any stays (Wei and Zou 2019, synonym
    replacement, who draw a fixed number of words). `sample` is the number of the sample in the run, so that a text that
    comes again is changed in another way. Raises ValueError for a rate outside 0 to 1.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate={rate} is outside 0 to 1")
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, sample))))
    chance, choice = rng.random((2, *words.shape))
    counts = replacements.counts[words]
    chosen = (chance < rate) & (counts > 0)
    places = replacements.starts[words] + np.minimum((choice * counts).astype(np.int64), np.maximum(counts - 1, 0))
    changed = words.copy()
    changed[chosen] = replacements.choices[places[chosen]]
    return changed


def any_word(vocab_size: int, specials: Iterable[int] = ()) -> Replacements:
    """Every word may become every other one, itself included; special ids neither change nor appear."""
    counts = np.full(vocab_size, vocab_size, np.int64)
    counts[list(specials)] = 0
    choices = np.flatnonzero(counts)
    counts[choices] = len(choices)
    return Replacements(np.zeros(vocab_size, np.int64), counts, choices)


def table(candidates: Mapping[int, Iterable[int]], vocab_size: int) -> Replacements:
    """Candidates of each word as a table."""
    runs = [np.fromiter(candidates.get(word, ()), np.int64) for word in range(vocab_size)]
    counts = np.array([len(run) for run in runs], np.int64)
    return Replacements(np.cumsum(counts) - counts, counts, np.concatenate([*runs, np.empty(0, np.int64)]))


def nearest_words(vectors: np.ndarray, neighbours: int, specials: Iterable[int] = ()) -> Replacements:
    """The `neighbours` words whose vectors [V, D] have the largest cosine with a word's own (Wang and Yang 2015).

    Special ids and words with a vector of zeros neither change nor appear. Of equal cosines the lower id is nearer. Raises
    ValueError where there are fewer other words than neighbours.
    """
    lengths = np.linalg.norm(vectors, axis=1)
    usable = lengths > 0
    usable[list(specials)] = False
    ids = np.flatnonzero(usable)
    if not 1 <= neighbours < len(ids):
        raise ValueError(f"{len(ids)} words with a vector have no {neighbours} others as neighbours")
    unit = vectors[ids] / lengths[ids, None]
    found = np.empty((len(ids), neighbours), np.int64)
    for start in range(0, len(ids), _ROWS):
        cosines = unit[start : start + _ROWS] @ unit.T
        rows = np.arange(len(cosines))
        cosines[rows, start + rows] = -np.inf
        found[start : start + _ROWS] = np.argsort(-cosines, axis=1, kind="stable")[:, :neighbours]
    counts, starts = np.zeros(len(vectors), np.int64), np.zeros(len(vectors), np.int64)
    counts[ids], starts[ids] = neighbours, neighbours * np.arange(len(ids))
    return Replacements(starts, counts, ids[found].reshape(-1))


def read_synonyms(path: Path, ids: Mapping[str, int], vocab_size: int, setting: str) -> Replacements:
    """The table of a file with a word and its synonyms on each line, UTF-8, separated by tabs or blanks.

    Words that `ids` does not know are left out, and a word that comes on several lines has the synonyms of all. Empty
    lines do not count. `setting` names the file in a refusal, for example "data.synonyms". Raises RefusedInput for a file
    that cannot be read, for lines with one word only, and where no synonym is left.
    """
    named = f"{setting}={path}"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RefusedInput([Problem((named,), f"the file cannot be read: {reason}", "check the path")]) from error
    candidates: dict[int, dict[int, None]] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        word, *synonyms = line.split() or [""]
        if word and not synonyms:
            problems.append(
                Problem((named, f"line {number}"), f"{word!r} has no synonyms", "add some, or drop the line")
            )
        if word in ids:
            known = {ids[s]: None for s in synonyms if s in ids and s != word}
            candidates.setdefault(ids[word], {}).update(known)
    if not problems and not any(candidates.values()):
        problems.append(Problem((named,), "no word of the vocabulary has a synonym in it there",
                                "give synonyms of words in the training texts"))  # fmt: skip
    if problems:
        raise RefusedInput(problems)
    return table(candidates, vocab_size)
