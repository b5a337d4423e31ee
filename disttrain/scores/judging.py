"""What a model predicted, judged as the official scripts do. No torch."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from disttrain.config.schema import Config
from disttrain.data.tokenizer import Tokenizer
from disttrain.labelled.arrays import encode
from disttrain.labelled.examples import Example, Question, Sentences, Tagged
from disttrain.labelled.words import Vocabulary
from disttrain.scores.answers import best_answers
from disttrain.scores.official import official
from disttrain.sets import SETS, tags_of

Predictions = Mapping[int, Mapping[str, np.ndarray]]
"""For numbers of held-out sequences `best` and `scores`, as `disttrain.models.task.TaskModel.predictions_of` has them."""


def judge(
    config: Config, vocabulary: Tokenizer | Vocabulary, examples: Sequence[Example], predictions: Predictions
) -> dict[str, float]:
    """Official scores by name, of examples whose every sequence was predicted; none where these have no labels."""
    name = config.task.set or ""
    chosen = SETS[name]
    if chosen.kind in ("classify", "regress"):
        rows = [(examples[i], predictions[i]) for i in sorted(predictions)]
        labelled = [(one, found) for one, found in rows if isinstance(one, Sentences) and one.label is not None]
        best: list[Any] = [found["best"].item() for _, found in labelled]
        if chosen.kind == "classify":
            best = [chosen.labels[int(number)] for number in best]
        return official(name, best, [one for one, _ in labelled]) if labelled else {}
    encoded = encode(config, vocabulary, examples)
    if chosen.kind == "tag":
        labels = tags_of(chosen.labels, config.task.scheme)
        tagged = [
            (i, one) for i, one in enumerate(examples) if isinstance(one, Tagged) and one.tags and i in predictions
        ]
        found = [[labels[int(predictions[i]["best"][place])] if place >= 0 else "O" for place in encoded.places[i]]
                 for i, _ in tagged]  # fmt: skip
        return official(name, found, [one for _, one in tagged]) if tagged else {}
    questions = [one for one in examples if isinstance(one, Question)]
    known = {number: window for number, window in enumerate(encoded.windows) if number in predictions}
    seen = {window.question for window in known.values()}
    unseen = {window.question for number, window in enumerate(encoded.windows) if number not in known}
    whole = [q for q in sorted(seen - unseen) if questions[q].answers]
    if not whole:
        return {}
    starts, ends = ([predictions[n]["scores"][:, end] for n in known] for end in (0, 1))
    best = best_answers(questions, list(known.values()), starts, ends, config.task.max_answer)
    return official(name, [best[q] for q in whole], [questions[q] for q in whole])
