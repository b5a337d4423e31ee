"""Train word vectors: go on where the folder's state ends, save after every epoch, stop when asked to."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from torch import Tensor

from disttrain.config.problems import Problem
from disttrain.config.standalone import dump_section, load_section
from disttrain.folders import exclusive, write_atomically
from disttrain.interruption import Interruption
from disttrain.vectors.corpus import Corpus
from disttrain.vectors.files import CONFIG, SUMMARY, VECTORS, Vectors, write_vectors
from disttrain.vectors.glove import GloVe
from disttrain.vectors.schema import REFERENCE, VectorsConfig
from disttrain.vectors.state import STATE, Place, load_state, save_state
from disttrain.vectors.word2vec import Word2Vec

FREE = ("questions", "resume", "dir", "name")
"""Settings that may change between two starts of one training."""


class Model(Protocol):
    """What `train` asks of Word2Vec and GloVe."""

    tensors: dict[str, Tensor]

    def begin(self, epoch: int) -> int:
        """Make an epoch ready; how many batches it has."""
        ...

    def step(self, number: int, progress: float) -> tuple[float, int]:
        """Take a batch; (summed loss, count)."""
        ...

    def vectors(self) -> Tensor:
        """The word vectors [V, H]."""
        ...


class VectorsDiverged(RuntimeError):
    """The loss is no number any more."""


Show = Callable[[Place, int], None]
"""Called with the place and the number of batches of the epoch, after every batch."""


def changed(config: VectorsConfig) -> list[Problem]:
    """Why a training cannot go on in its folder: settings that differ from those it began with."""
    began = config.folder / CONFIG
    if config.resume == "never" or not (config.folder / STATE).exists() or not began.exists():
        return []
    earlier = load_section(VectorsConfig, began, (), REFERENCE)
    differing = [
        f"{key}={getattr(config, key)} (was {getattr(earlier, key)})"
        for key in type(config).model_fields
        if key not in FREE and getattr(config, key) != getattr(earlier, key)
    ]
    if not differing:
        return []
    return [Problem(tuple(differing), f"{config.folder} holds vectors of other settings",
                    "use another name, or resume=never to train them anew")]  # fmt: skip


def train(config: VectorsConfig, corpus: Corpus, interruption: Interruption, show: Show) -> Place | None:
    """Train to the end and write the vectors; where it ended, or None if somebody asked to stop.

    Raises RefusedInput where another process trains in the folder, VectorsDiverged where the loss is no number any more.
    """
    folder = config.folder
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder, other="use another name"):
        if config.resume == "never":
            (folder / STATE).unlink(missing_ok=True)
        write_atomically(folder / CONFIG, dump_section(config))
        model: Model = GloVe(corpus, config) if config.method == "glove" else Word2Vec(corpus, config)
        place = load_state(folder, model.tensors)
        while place.epoch < config.epochs:
            complete = _epoch(model, place, config.epochs, interruption, show)
            save_state(folder, model.tensors, place)
            if not complete:
                return None
        write_vectors(folder / VECTORS, Vectors(corpus.words, model.vectors().numpy()))
    return place


def _epoch(model: Model, place: Place, epochs: int, interruption: Interruption, show: Show) -> bool:
    """Train to the end of the present epoch; whether it was reached."""
    batches = model.begin(place.epoch)
    while place.batch < batches:
        if interruption.requested:
            return False
        began = time.perf_counter()
        loss, count = model.step(place.batch, (place.epoch + place.batch / batches) / epochs)
        if not math.isfinite(loss):
            raise VectorsDiverged(
                f"the loss is {loss} in epoch {place.epoch + 1}: give a smaller lr or a smaller batch"
            )
        place.batch += 1
        place.loss += loss
        place.count += count
        place.seconds += time.perf_counter() - began
        show(place, batches)
    place.losses.append(place.loss / max(1, place.count))
    place.epoch, place.batch, place.loss, place.count = place.epoch + 1, 0, 0.0, 0
    return True


def write_summary(folder: Path, summary: dict[str, object]) -> None:
    """Write summary.json."""
    write_atomically(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
