"""The official scores of a data set."""

from collections.abc import Callable, Sequence
from typing import Any

from disttrain.config.problems import Problem, RefusedInput
from disttrain.labelled.examples import Example, Question, Sentences, Tagged
from disttrain.labelled.reading import known_set
from disttrain.scores.answers import answer_scores
from disttrain.scores.classification import accuracy, binary_scores, matthews, pearson, spearman
from disttrain.scores.entities import entity_scores, surface_scores
from disttrain.sets import LabelledSet


def official(set_name: str, predictions: Sequence[Any], references: Sequence[Example]) -> dict[str, float]:
    """The scores that `SETS` names for a set, in its order; fractions, or correlations from -1 to 1.

    predictions[i] belongs to references[i], an example with its label: a class (classify), a number (regress), a tag
    for every word (tag) or the text of the answer (answer). Raises RefusedInput for an unknown set and for references
    without labels, ValueError when there are more predictions than references, fewer, or none.
    """
    chosen = known_set(set_name)
    if len(predictions) != len(references) or not references:
        raise ValueError(f"{len(predictions)} predictions for {len(references)} examples")
    unlabelled = sum(1 for one in references if not _labelled(one))
    if unlabelled:
        message = f"{unlabelled:,} of {len(references):,} examples have no label to compare with"
        raise RefusedInput([Problem((set_name,), message, "score a split with labels")])
    found = _SCORES[chosen.kind](chosen, predictions, references)
    return {name: found[name] for name in chosen.scores}


def _labelled(example: Example) -> bool:
    if isinstance(example, Sentences):
        return example.label is not None
    return bool(example.tags) if isinstance(example, Tagged) else bool(example.answers)


def _classify(chosen: LabelledSet, predictions: Sequence[str], references: Sequence[Example]) -> dict[str, float]:
    truth = [str(one.label) for one in references if isinstance(one, Sentences)]
    found: dict[str, float] = {}
    if "accuracy" in chosen.scores:
        found["accuracy"] = accuracy(predictions, truth)
    if "matthews" in chosen.scores:
        found["matthews"] = matthews(predictions, truth)
    if chosen.positive is not None:
        found |= binary_scores(predictions, truth, chosen.positive)
    return found


def _regress(chosen: LabelledSet, predictions: Sequence[float], references: Sequence[Example]) -> dict[str, float]:
    truth = [float(one.label) for one in references if isinstance(one, Sentences) and one.label is not None]
    return {"pearson": pearson(predictions, truth), "spearman": spearman(predictions, truth)}


def _tag(chosen: LabelledSet, predictions: Sequence[Sequence[str]], references: Sequence[Example]) -> dict[str, float]:
    sentences = [one for one in references if isinstance(one, Tagged)]
    truth = [one.tags for one in sentences]
    return entity_scores(predictions, truth) | surface_scores([one.words for one in sentences], predictions, truth)


def _answer(chosen: LabelledSet, predictions: Sequence[str], references: Sequence[Example]) -> dict[str, float]:
    return answer_scores(predictions, [one for one in references if isinstance(one, Question)])


_SCORES: dict[str, Callable[[LabelledSet, Sequence[Any], Sequence[Example]], dict[str, float]]] = {
    "classify": _classify,
    "regress": _regress,
    "tag": _tag,
    "answer": _answer,
}
