"""What a labelled data set is made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sentences:
    """A sentence, or a pair of them, to classify or to score."""

    text: str
    second: str | None
    """The second text of a pair; None for a single sentence."""
    label: str | float | None
    """The class as the file spells it, the score of a regression, or None in a file without labels."""


@dataclass(frozen=True)
class Tagged:
    """A sentence of words, each with a tag."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    """IOB2 tags, one a word; empty in a file without tags."""


@dataclass(frozen=True)
class Question:
    """A question about a text, which its answers are parts of (Rajpurkar et al. 2016)."""

    id: str
    title: str
    """Title of the article."""
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]
    """Text of each annotator's answer and the character of the context at which it starts; empty without answers."""


Example = Sentences | Tagged | Question


@dataclass(frozen=True)
class Labelled:
    """One split of a data set."""

    name: str
    """Name in `disttrain.sets.SETS`."""
    split: str
    examples: tuple[Example, ...]
    """In the order of the file."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Rows of the file that are no examples, by reason."""
