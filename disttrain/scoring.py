"""Official scores of a task: what each rank predicts of its held-out examples, gathered and judged. All ranks call it."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from disttrain.assembly import Session
from disttrain.labelled.chosen import chosen_examples
from disttrain.labelled.loading import LabelledData
from disttrain.models import IGNORED
from disttrain.parallel.collectives import gather_objects
from disttrain.scores.judging import judge


def held_out_share(session: Session, count: int) -> Iterator[tuple[range, Mapping[str, Any]]]:
    """This rank's held-out batches, and the numbers of their sequences; ranks take turns.

    All ranks get equally many, since sharded weights are gathered for each: beyond the end a rank gets the first
    sequences once more, without targets.
    """
    size = session.config.train.micro_batch_size or 1
    stride = size * session.mesh.data_ranks
    for start in range(0, count, stride):
        first = start + session.data_rank * size
        if first < count:
            numbers = range(first, min(first + size, count))
            yield numbers, session.data.held_out_batch(first, len(numbers))
        else:
            yield range(0), without_targets(session.data.held_out_batch(0, 1))


def without_targets(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch with every target ignored: it goes through the model and adds nothing to a sum."""
    ignored = {name: np.full_like(batch[name], IGNORED) for name in ("targets", "next_sentence") if name in batch}
    return {**batch, **ignored}


def predictions(session: Session, count: int) -> dict[int, dict[str, np.ndarray]]:
    """What the model predicts for each of the first `count` held-out sequences; the same on all ranks."""
    shares = list(held_out_share(session, count))
    found = session.engine.predict(batch for _, batch in shares)
    own = {
        number: {name: tensor[row].numpy() for name, tensor in outputs.items()}
        for (numbers, _), outputs in zip(shares, found, strict=False)  # none where the head is on other ranks
        for row, number in enumerate(numbers)
    }
    gathered = gather_objects(own if session.groups.tensor.rank == 0 else {})
    return {number: row for part in gathered for number, row in part.items()}


def official_scores(session: Session, count: int) -> dict[str, float]:
    """The official scores of the held-out examples by name, on the first rank; none for language models."""
    if not isinstance(session.data, LabelledData):
        return {}
    found = predictions(session, count)
    if session.rank.rank > 0:
        return {}
    return judge(session.config, session.data.tokenizer, chosen_examples(session.config)[1], found)
