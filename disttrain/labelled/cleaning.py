"""Cleaning of labelled examples, as the papers prepare theirs (Mei 2024, section V-A; Yao-Opt 2024, section 4.1).

The steps come in this order: segmentation, lower case, numbers, punctuation, rare words, length; then rows without text
or label, and equal rows, are removed. A step that does not fit the kind of examples is a problem, never left out.
"""

import importlib.util
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from disttrain.config.cleaning import CleaningConfig
from disttrain.config.problems import Problem, RefusedInput
from disttrain.labelled.examples import Example, Question, Sentences, Tagged
from disttrain.sets import Kind

NUMBER = "NUM"
UNKNOWN = "UNK"

_NUMBER = re.compile(r"(?<!\w)(?<!\d[.,])\d+(?:[.,]\d+)*(?!\w|[.,]\d)")
_TEXT_STEPS = ("segment", "lowercase", "numbers", "punctuation", "min_count", "max_words")
_FITS: dict[Kind, tuple[str, ...]] = {
    "classify": _TEXT_STEPS,
    "regress": _TEXT_STEPS,
    "tag": ("lowercase", "numbers", "min_count", "max_words"),
    "answer": (),
}
"""Text steps of each kind: a tag belongs to a word, and an answer to its characters."""


@dataclass(frozen=True)
class Cleaned:
    """Examples after cleaning."""

    examples: tuple[Example, ...]
    removed: Mapping[str, tuple[int, ...]]
    """Row numbers, from 0, of the examples that were removed, under missing and duplicates."""


def cleaning_problems(config: CleaningConfig, kind: Kind) -> list[Problem]:
    """Steps that are set and that this kind of examples cannot have, and a missing package."""
    steps = [name for name in _TEXT_STEPS if getattr(config, name) != CleaningConfig.model_fields[name].default]
    reasons = {"tag": "each word keeps its tag", "answer": "answers are places in the unchanged text"}
    problems = [Problem((f"{name}={getattr(config, name)}",), f"this step does not fit a {kind} set: {reasons[kind]}",
                        "remove the setting") for name in steps if name not in _FITS[kind]]  # fmt: skip
    if config.segment == "jieba" and importlib.util.find_spec("jieba") is None:
        problems.append(Problem(("segment=jieba",), "the package jieba is not installed",
                                "pip install 'disttrain[chinese]'"))  # fmt: skip
    return problems


def clean_splits(
    config: CleaningConfig, kind: Kind, splits: Mapping[str, Sequence[Example]], training: Iterable[str] = ("train",)
) -> dict[str, Cleaned]:
    """Every split cleaned. Which words are rare is learned from the training splits, and only these lose rows.

    An official score is over all rows of its split. Raises RefusedInput for the problems of `cleaning_problems`.
    """
    problems = cleaning_problems(config, kind)
    if problems:
        raise RefusedInput(problems)
    training = tuple(training)
    changed = {name: [with_text(one, lambda text: written(config, text)) for one in examples]
               for name, examples in splits.items()}  # fmt: skip
    if config.min_count > 1:
        known = frequent_words((one for name in training for one in changed[name]), config.min_count)
        changed = {name: [with_text(one, lambda text: without_rare(text, known)) for one in examples]
                   for name, examples in changed.items()}  # fmt: skip
    if config.max_words is not None:
        limit = config.max_words
        changed = {name: [shortened(one, limit) for one in examples] for name, examples in changed.items()}
    return {name: kept(config, examples) if name in training else Cleaned(tuple(examples), {})
            for name, examples in changed.items()}  # fmt: skip


def written(config: CleaningConfig, text: str) -> str:
    """A text after segmentation, lower case, numbers and punctuation."""
    if config.segment == "jieba":
        text = segmented(text)
    if config.lowercase:
        text = text.lower()
    if config.numbers == "map":
        text = _NUMBER.sub(NUMBER, text)
    if config.punctuation != "keep":
        apart = config.punctuation == "apart"
        text = _spaced("".join((f" {c} " if apart else " ") if _is_mark(c) else c for c in text))
    return text


def segmented(text: str) -> str:
    """The words that jieba finds in a text, with one space between them."""
    import jieba

    jieba.setLogLevel("WARNING")
    return _spaced(" ".join(jieba.lcut(text)))


def frequent_words(examples: Iterable[Example], min_count: int) -> frozenset[str]:
    """Words, between white space, that the examples have at least so often."""
    counts: Counter[str] = Counter()
    for example in examples:
        counts.update(words_of(example))
    return frozenset(word for word, count in counts.items() if count >= min_count)


def words_of(example: Example) -> list[str]:
    """Words, between white space, of all texts of an example."""
    if isinstance(example, Tagged):
        return list(example.words)
    if isinstance(example, Question):
        return [*example.question.split(), *example.context.split()]
    return [*example.text.split(), *(example.second or "").split()]


def without_rare(text: str, known: frozenset[str]) -> str:
    """The text with UNK in place of every word that is not known; white space becomes one space."""
    return " ".join(word if word in known else UNKNOWN for word in text.split())


def with_text(example: Example, change: Callable[[str], str]) -> Example:
    """The example with its texts, or each of its words, changed; a question stays as it is."""
    if isinstance(example, Sentences):
        return replace(example, text=change(example.text),
                       second=None if example.second is None else change(example.second))  # fmt: skip
    if isinstance(example, Tagged):
        return replace(example, words=tuple(map(change, example.words)))
    return example


def shortened(example: Example, limit: int) -> Example:
    """The example with the first words of each of its texts, and their tags."""
    if isinstance(example, Tagged):
        return Tagged(example.words[:limit], example.tags[:limit])
    return with_text(example, lambda text: text if len(text.split()) <= limit else " ".join(text.split()[:limit]))


def kept(config: CleaningConfig, examples: Sequence[Example]) -> Cleaned:
    """The examples that `missing` and `duplicates` keep, and the row numbers of the others."""
    found: list[Example] = []
    seen: set[object] = set()
    removed: dict[str, list[int]] = {"missing": [], "duplicates": []}
    for row, example in enumerate(examples):
        texts, label = _parts(example)
        key = texts if config.duplicates == "same_text" else (texts, label)
        if config.missing == "remove" and (label in (None, ()) or not all(text.strip() for text in texts)):
            removed["missing"].append(row)
        elif config.duplicates != "keep" and key in seen:
            removed["duplicates"].append(row)
        else:
            seen.add(key)
            found.append(example)
    return Cleaned(tuple(found), {reason: tuple(rows) for reason, rows in removed.items() if rows})


def _parts(example: Example) -> tuple[tuple[str, ...], object]:
    """The texts and the label by which rows are compared."""
    if isinstance(example, Tagged):
        return (" ".join(example.words),), example.tags
    if isinstance(example, Question):
        return (example.question, example.context), example.answers
    return (example.text,) if example.second is None else (example.text, example.second), example.label


@cache
def _is_mark(character: str) -> bool:
    """Whether it is a punctuation mark or a symbol (Unicode's categories P and S)."""
    return unicodedata.category(character)[0] in "PS"


def _spaced(text: str) -> str:
    return " ".join(text.split())
