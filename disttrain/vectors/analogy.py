"""What word vectors know: analogy questions by 3CosAdd, and nearest neighbours (numpy; no torch).

"a is to b as c is to ?" is answered by the word x that maximises cos(x, b - a + c), the three words themselves left out
(Mikolov et al. 2013a, section 4.1; named 3CosAdd by Levy and Goldberg 2014). Beside it stands what the neighbour of c alone
reaches, since that word is often the answer (Linzen 2016, "Issues in evaluating semantic spaces using word analogies").
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from disttrain.config.problems import Problem, RefusedInput
from disttrain.vectors.files import Vectors

SYNTACTIC = "gram"
"""How the names of the syntactic sections begin in word2vec's file; the other sections are semantic."""
AT_ONCE = 512
"""Questions whose similarities to all words are held at the same time."""

Question = tuple[str, str, str, str]


@dataclass(frozen=True)
class Section:
    """Questions of one kind."""

    name: str
    questions: tuple[Question, ...]
    """(a, b, c, the expected answer)."""


@dataclass(frozen=True)
class Score:
    """How many questions were answered."""

    name: str
    asked: int
    """Questions whose four words all have vectors."""
    left_out: int
    """The others."""
    right: int
    """By 3CosAdd."""
    right_without_a_and_b: int
    """By the nearest neighbour of c, in the same way."""

    @property
    def accuracy(self) -> float | None:
        """Share of the asked questions that are right; None where none was asked."""
        return self.right / self.asked if self.asked else None

    @property
    def accuracy_of_all(self) -> float | None:
        """Share of all questions, those left out being wrong; None where there are none."""
        return self.right / (self.asked + self.left_out) if self.asked + self.left_out else None


def read_questions(path: Path, lowercase: bool = False) -> list[Section]:
    """Read a file of sections, `: name`, with four words a line, which vectors of lower-cased text need in lower case.

    Raises RefusedInput with the first lines that are wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedInput([_problem(path, f"the questions cannot be read: {error}")]) from error
    sections: list[tuple[str, list[Question]]] = []
    problems = []
    for number, line in enumerate(lines, start=1):
        words = (line.lower() if lowercase else line).split()
        if line.startswith(":"):
            sections.append((line[1:].strip(), []))
        elif len(words) == 4 and sections:
            a, b, c, expected = words
            sections[-1][1].append((a, b, c, expected))
        elif words:
            what = (
                f"line {number} has {len(words)} words" if sections else f"line {number} stands before a section's name"
            )
            problems.append(_problem(path, what))
    if not problems and not any(questions for _, questions in sections):
        problems = [_problem(path, "there are no questions in it")]
    if problems:
        raise RefusedInput(problems[:5])
    return [Section(name, tuple(questions)) for name, questions in sections]


def _problem(path: Path, message: str) -> Problem:
    return Problem((f"questions={path}",), message, "give sections ': name' with four words a line, a b c d")


def normalised(values: np.ndarray) -> np.ndarray:
    """Rows [V, H] at length 1; a row of zeros stays."""
    length = np.linalg.norm(values, axis=1, keepdims=True)
    return values / np.where(length == 0, 1, length)


def answer(vectors: Vectors, sections: Sequence[Section]) -> list[Score]:
    """Answer every section; the totals `semantic`, `syntactic` and `total` stand behind them, where they are not empty."""
    numbers = {word: number for number, word in enumerate(vectors.words)}
    units = normalised(vectors.values)
    scores = [_answer_section(section, numbers, units) for section in sections]
    syntactic = [score for score in scores if score.name.startswith(SYNTACTIC)]
    semantic = [score for score in scores if not score.name.startswith(SYNTACTIC)]
    totals = {"semantic": semantic, "syntactic": syntactic, "total": scores}
    return scores + [_sum(name, part) for name, part in totals.items() if part]


def chance(vectors: Vectors) -> float:
    """The probability of being right by naming any word but the three of the question."""
    return 1 / max(1, len(vectors.words) - 3)


def neighbours(vectors: Vectors, word: str, count: int) -> list[tuple[str, float]]:
    """The `count` words with the greatest cosine to a word, and it; the greatest first. Raises KeyError if it is unknown."""
    if word not in vectors.words:
        raise KeyError(word)
    number = vectors.words.index(word)
    units = normalised(vectors.values)
    similarity = units @ units[number]
    similarity[number] = -np.inf
    nearest = np.argsort(-similarity, kind="stable")[: min(count, len(units) - 1)]
    return [(vectors.words[n], float(similarity[n])) for n in nearest]


def _answer_section(section: Section, numbers: dict[str, int], units: np.ndarray) -> Score:
    known = [
        [numbers[word] for word in question] for question in section.questions if all(w in numbers for w in question)
    ]
    right = right_alone = 0
    for start in range(0, len(known), AT_ONCE):
        a, b, c, expected = np.array(known[start : start + AT_ONCE]).T
        taken = (a, b, c)
        right += int((_nearest(units[b] - units[a] + units[c], taken, units) == expected).sum())
        right_alone += int((_nearest(units[c], taken, units) == expected).sum())
    return Score(section.name, len(known), len(section.questions) - len(known), right, right_alone)


def _nearest(targets: np.ndarray, taken: Sequence[np.ndarray], units: np.ndarray) -> np.ndarray:
    """int64 [Q]: the word with the greatest cosine to each target [Q, H], the taken ones (each int64 [Q]) left out."""
    similarity = targets @ units.T
    for words in taken:
        similarity[np.arange(len(words)), words] = -np.inf
    return similarity.argmax(1)


def _sum(name: str, scores: Sequence[Score]) -> Score:
    columns = [[s.asked, s.left_out, s.right, s.right_without_a_and_b] for s in scores]
    return Score(name, *(sum(column) for column in zip(*columns, strict=True)))
