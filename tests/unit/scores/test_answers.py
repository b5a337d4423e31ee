import numpy as np
import pytest

from disttrain.labelled.examples import Question
from disttrain.labelled.windows import windows_of
from disttrain.scores.answers import answer_scores, best_answers, best_span, exact_match, normalised, token_f1
from tests.unit.labelled.made import question, wordpiece


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The  U.S. (an) Army!", "us army"),
        ("theatre Anna", "theatre anna"),
        ("the-end", "theend"),
        ("A\tthe an", ""),
        ("$3,000", "3000"),
        ("\u201cyes\u201d", "\u201cyes\u201d"),
    ],
)
def test_normalised(answer, expected):
    assert normalised(answer) == expected


def test_scores_of_an_answer():
    assert exact_match("The cat.", "cat") == 1 and exact_match("cats", "cat") == 0
    assert token_f1("the black cat sat", "a cat sat down") == pytest.approx(2 * 2 / 6)
    assert token_f1("b b b", "b b c") == pytest.approx(2 / 3)
    assert token_f1("x", "y") == 0 and token_f1("the", "a") == 0 and token_f1("", "cat") == 0


def test_the_best_of_several_true_answers_then_the_mean():
    context = "red green blue"
    several = Question("1", "t", "?", context, (("red green", 0), ("green", 4)))
    one = Question("2", "t", "?", context, (("blue", 10),))
    assert answer_scores(["green", "a green blue"], [several, one]) == pytest.approx(
        {"exact_match": 1 / 2, "f1": (1 + 2 / 3) / 2}, abs=1e-12
    )


@pytest.fixture
def windows(tmp_path):
    questions = [question("a b c d e f", "d e"), question("the cat sat")]
    return questions, windows_of(wordpiece(tmp_path), questions, 8, 2)


def test_best_spans_over_windows(windows):
    questions, cut = windows
    starts, ends = ([np.zeros(len(window.ids)) for window in cut] for _ in range(2))
    starts[0][0] = ends[0][0] = 50.0  # neither [CLS] nor the question can be the answer
    starts[0][1] = ends[0][2] = 40.0
    starts[0][6], ends[0][4] = 9.0, 9.0  # an end before its start is no span: c, or a, alone have 9
    starts[1][4], ends[1][6] = 8.0, 8.0  # c d e, in the second window
    starts[3][5] = ends[3][5] = 1.0
    assert best_answers(questions, cut, starts, ends) == ["c d e", "cat"]
    assert best_answers(questions, cut, starts, ends, max_answer_length=2) == ["a", "cat"]


def test_best_span_is_the_best_of_all(windows):
    window = windows[1][0]
    rng = np.random.default_rng(0)
    for length in (1, 2, 3, 30):
        starts, ends = rng.normal(size=12), rng.normal(size=12)  # as padded: 7 tokens are real
        usable = [token for token in range(len(window.ids)) if window.offsets[token, 0] >= 0]
        spans = [(starts[i] + ends[j], i, j) for i in usable for j in usable if i <= j < i + length]
        assert best_span(window, starts, ends, length) == pytest.approx(max(spans))


def test_a_context_without_tokens_has_no_answer(tmp_path):
    questions = [question("")]
    (window,) = windows_of(wordpiece(tmp_path), questions, 8, 2)
    assert best_answers(questions, [window], [np.ones(9)], [np.ones(9)]) == [""]
