"""Precision, recall and F1 of entities, as conlleval and WNUT-17's script count them. All are fractions, not percent.

What an entity is, in IOB1, IOB2 and BIOES, `disttrain.labelled.tags.chunks` says.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from disttrain.labelled.tags import chunks

Tags = Sequence[Sequence[str]]
"""The tags of every sentence."""


def entity_scores(predictions: Tags, references: Tags) -> dict[str, float]:
    """precision correct / found, recall correct / true and f1, their harmonic mean, over all sentences; 0 for 0 / 0.

    An entity is correct when its type and both its ends are those of a true one (Tjong Kim Sang and De Meulder 2003,
    section 2.4). Raises ValueError when two sentences have different lengths.
    """
    return _summed(_counts(predictions, references).values())


def entity_scores_by_type(predictions: Tags, references: Tags) -> dict[str, dict[str, float]]:
    """The same three for the entities of each type, in the order of the alphabet."""
    return {kind: _summed([count]) for kind, count in sorted(_counts(predictions, references).items())}


def surface_scores(words: Sequence[Sequence[str]], predictions: Tags, references: Tags) -> dict[str, float]:
    """surface_precision, surface_recall and surface_f1 over distinct pairs of an entity's words and type; 0 for 0 / 0.

    A pair is correct when an entity of it is, at its place (Derczynski et al. 2017, section 5.2, and its script).
    """
    found: set[object] = set()
    true: set[object] = set()
    correct: set[object] = set()
    for sentence, said, truth in zip(words, predictions, references, strict=True):
        _check(said, truth)
        here, there = set(chunks(said)), set(chunks(truth))
        for group, places in ((found, here), (true, there), (correct, here & there)):
            group |= {(tuple(sentence[one.start : one.stop]), one.type) for one in places}
    three = _three(len(correct), len(found), len(true))
    return {f"surface_{name}": value for name, value in three.items()}


def _counts(predictions: Tags, references: Tags) -> dict[str, Counter[str]]:
    """correct, found and true entities of each type."""
    counts: dict[str, Counter[str]] = {}
    for said, truth in zip(predictions, references, strict=True):
        _check(said, truth)
        here, there = set(chunks(said)), set(chunks(truth))
        for name, group in (("found", here), ("true", there), ("correct", here & there)):
            for one in group:
                counts.setdefault(one.type, Counter())[name] += 1
    return counts


def _check(said: Sequence[str], truth: Sequence[str]) -> None:
    if len(said) != len(truth):
        raise ValueError(f"a sentence of {len(truth)} tags has {len(said)} predicted ones")


def _summed(counts: Iterable[Counter[str]]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for count in counts:
        total += count
    return _three(total["correct"], total["found"], total["true"])


def _three(correct: int, found: int, true: int) -> dict[str, float]:
    precision, recall = correct / found if found else 0.0, correct / true if true else 0.0
    f1 = 2 * precision * recall / (precision + recall) if correct else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}
