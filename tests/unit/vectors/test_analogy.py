"""Analogies and neighbours on vectors made so that the answers are known."""

from pathlib import Path

import numpy as np
import pytest

from disttrain.config.problems import RefusedInput
from disttrain.vectors.analogy import Score, answer, chance, neighbours, read_questions
from disttrain.vectors.files import Vectors

QUESTIONS = """: family
king man queen woman
man king woman queen
man king woman prince
duke man queen woman
: gram1-plural
car cars boat boats
"""


@pytest.fixture
def vectors() -> Vectors:
    """Directions royal, male, female, thing and many; of any length, since only directions count."""
    places = {
        "king": [2, 2, 0, 0, 0], "queen": [1, 0, 1, 0, 0], "man": [0, 3, 0, 0, 0], "woman": [0, 0, 1, 0, 0],
        "prince": [1, 1, -1, 0, 0], "car": [0, 0, 0, 1, 0], "cars": [0, 0, 0, 1, 1], "boat": [0, 0, 0.1, 1, 0],
        "boats": [0, 0, 0.1, 1, 1],
    }  # fmt: skip
    return Vectors(tuple(places), np.array(list(places.values()), dtype=np.float32))


def asked(tmp_path: Path, vectors: Vectors, text: str = QUESTIONS) -> dict[str, Score]:
    (tmp_path / "questions.txt").write_text(text)
    return {score.name: score for score in answer(vectors, read_questions(tmp_path / "questions.txt"))}


def test_scores_by_section_and_totals(tmp_path: Path, vectors: Vectors) -> None:
    scores = asked(tmp_path, vectors)
    assert list(scores) == ["family", "gram1-plural", "semantic", "syntactic", "total"]
    family = scores["family"]
    assert (family.asked, family.left_out, family.right) == (3, 1, 2)  # duke is unknown, the prince is wrong
    assert family.accuracy == pytest.approx(2 / 3) and family.accuracy_of_all == pytest.approx(2 / 4)
    assert (scores["syntactic"].asked, scores["syntactic"].right) == (1, 1)
    assert scores["total"] == Score("total", 4, 1, 3, 3) and family.right_without_a_and_b == 2
    assert scores["semantic"].right == 2


def test_the_words_of_a_question_are_no_answers(tmp_path: Path, vectors: Vectors) -> None:
    # with a = b the sum is c itself, so its nearest other word answers: the 3CosAdd and the neighbour of c agree
    scores = asked(tmp_path, vectors, ": same\ncar car boat boats\ncar car boat king\n")
    assert scores["same"].right == scores["same"].right_without_a_and_b == 1


def test_a_section_whose_words_are_all_unknown(tmp_path: Path, vectors: Vectors) -> None:
    scores = asked(tmp_path, vectors, ": currency\nAlgeria dinar Angola kwanza\n")
    assert scores["currency"].accuracy is None
    assert scores["total"].left_out == 1 and scores["total"].accuracy_of_all == 0


def test_equals_the_definition_on_random_vectors(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    words = [f"w{n}" for n in range(20)]
    values = generator.normal(size=(20, 4)).astype(np.float32)
    rows = [generator.choice(20, 4, replace=False) for _ in range(530)]  # more than are answered at once
    text = ": any\n" + "\n".join(" ".join(words[n] for n in row) for row in rows)
    score = asked(tmp_path, Vectors(tuple(words), values), text)["any"]

    def cosine(x: np.ndarray, y: np.ndarray) -> float:
        return x @ y / np.linalg.norm(x) / np.linalg.norm(y)

    units = values / np.linalg.norm(values, axis=1, keepdims=True)
    right = alone = 0
    for a, b, c, d in rows:
        rest = [n for n in range(20) if n not in (a, b, c)]
        right += max(rest, key=lambda n: cosine(units[n], units[b] - units[a] + units[c])) == d
        alone += max(rest, key=lambda n: cosine(units[n], units[c])) == d
    assert (score.right, score.right_without_a_and_b) == (right, alone) and right > 0


def test_lower_case(tmp_path: Path) -> None:
    (tmp_path / "questions.txt").write_text(": Capitals\nOslo Norway Bern Switzerland\n")
    (section,) = read_questions(tmp_path / "questions.txt", lowercase=True)
    assert section.name == "Capitals" and section.questions == (("oslo", "norway", "bern", "switzerland"),)


def test_chance(vectors: Vectors) -> None:
    assert chance(vectors) == pytest.approx(1 / 6)


def test_neighbours(vectors: Vectors) -> None:
    found = neighbours(vectors, "car", 2)
    assert [word for word, _ in found] == ["boat", "cars"]
    assert found[0][1] == pytest.approx(1 / np.sqrt(1.01), rel=1e-6)
    assert len(neighbours(vectors, "car", 100)) == 8
    with pytest.raises(KeyError):
        neighbours(vectors, "bus", 2)


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (": x\na b c\na b c d e\n", ["line 2 has 3 words", "line 3 has 5 words"]),
        ("a b c d\n", ["line 1 stands before a section's name"]),
        (": x\n", ["there are no questions in it"]),
    ],
)
def test_wrong_files(tmp_path: Path, vectors: Vectors, text: str, messages: list[str]) -> None:
    with pytest.raises(RefusedInput) as refused:
        asked(tmp_path, vectors, text)
    assert [problem.message for problem in refused.value.problems] == messages
    with pytest.raises(RefusedInput, match="cannot be read"):
        read_questions(tmp_path / "nothing.txt")
