"""SQuAD v1.1 in its JSON file (Rajpurkar et al. 2016)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from disttrain.config.problems import Problem, RefusedInput
from disttrain.labelled.examples import Labelled, Question
from disttrain.labelled.files import bad_line, content_of, refuse
from disttrain.sets import LabelledSet


def read_squad(chosen: LabelledSet, path: Path, split: str) -> Labelled:
    """Every question of a file, with all its answers, in the order of the file.

    Raises RefusedInput for a file that is not JSON (with the line) or not SQuAD's, for SQuAD 2.0's questions without an
    answer, and, with the question's id, for an answer that is not at its place in the context.
    """
    try:
        content = json.loads(content_of(path))
    except json.JSONDecodeError as error:
        raise RefusedInput([bad_line(path, error.lineno, f"this is not JSON: {error.msg}", "copy it again")]) from error
    except UnicodeDecodeError as error:
        raise RefusedInput([Problem((str(path),), "the file is not UTF-8", "copy it again")]) from error
    try:
        questions = tuple(_questions(content))
    except (KeyError, TypeError, AttributeError) as error:
        message = f"the file does not have SQuAD's form: {type(error).__name__}: {error}"
        raise RefusedInput([Problem((str(path),), message, "give train-v1.1.json or dev-v1.1.json")]) from error
    except _Impossible as error:
        problem = Problem((f"{path}: question {error}",), "this question of SQuAD 2.0 has no answer",
                          "give SQuAD v1.1")  # fmt: skip
        raise RefusedInput([problem]) from error
    refuse([p for question in questions for p in answer_problems(question, str(path))], path)
    return Labelled(chosen.name, split, questions)


def answer_problems(question: Question, where: str) -> list[Problem]:
    """The answers of a question that the context does not have at their place."""
    wrong = [text for text, start in question.answers
             if start < 0 or not text or question.context[start : start + len(text)] != text]  # fmt: skip
    return [Problem((f"{where}: question {question.id}",),
                    f"the context does not have the answer '{text}' at its place",
                    "correct answer_start, which counts characters") for text in wrong]  # fmt: skip


class _Impossible(Exception):
    """A question without an answer; its id."""


def _questions(content: Any) -> Iterator[Question]:
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                if asked.get("is_impossible"):
                    raise _Impossible(asked["id"])
                answers = tuple((answer["text"], int(answer["answer_start"])) for answer in asked.get("answers", []))
                yield Question(asked["id"], article.get("title", ""), asked["question"], paragraph["context"], answers)
