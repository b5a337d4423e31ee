"""What a model says of batches without learning from them, under any layout."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from disttrain.config.schema import Precision
from disttrain.models import Model
from disttrain.parallel import data
from disttrain.parallel.outer import OuterSteps
from disttrain.parallel.parallelize import Chunk
from disttrain.parallel.pipeline import Pipeline
from disttrain.precision import autocast

Of = Callable[[Any, Any, dict[str, Tensor]], Any]
"""What is wanted of (model, what its head gave, batch)."""


def scores_of(model: Any, logits: Any, batch: dict[str, Tensor]) -> Any:
    """Losses and scores, as sums."""
    return model.scores_of(logits, batch)


def predictions_of(model: Any, logits: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a task's model predicts, on the host in a type that numpy has."""
    found = model.predictions_of(logits, batch)
    return {name: (t if t.dtype in (torch.int64, torch.float64) else t.float()).cpu() for name, t in found.items()}


@contextmanager
def looking(chunks: Sequence[Chunk], outer: OuterSteps | None) -> Iterator[None]:
    """Models do not drop out, and workers of local steps have the weights that they share."""
    for chunk in chunks:
        chunk.model.eval()
    if outer is None:
        yield
    else:
        with outer.in_place():
            yield
    for chunk in chunks:
        chunk.model.train()
        if outer is not None:
            data.forget_gathered(chunk.model)


def outputs(
    model: Model, pipeline: Pipeline | None, precision: Precision, device_type: str, batches: Iterable[dict[str, Tensor]],
    hidden: Callable[..., tuple[int, int, int]], of: Of,
) -> Iterable[Any]:  # fmt: skip
    """What is wanted of each prepared batch, on ranks with the head; `hidden` gives the shape between stages from that of
    tokens."""

    def run(model: Model, batch: dict[str, Tensor], x: Tensor | None) -> Any:
        with autocast(precision, device_type):
            y = model.forward_batch(batch, x)
            return y if model.head is None else of(model, y, batch)

    if pipeline is None:
        return (run(model, batch, None) for batch in batches)
    return pipeline.evaluate(batches, run, lambda batch: hidden(*batch["tokens"].shape))
