"""The state of a training of word vectors: its tensors and its place, in one file that is replaced at once."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

STATE = "training.safetensors"


@dataclass
class Place:
    """How far training is."""

    epoch: int = 0
    """Epochs that are done."""
    batch: int = 0
    """Batches of the present epoch that are done."""
    loss: float = 0.0
    """Summed loss of the present epoch, nats (GloVe: weighted squares)."""
    count: int = 0
    """Predictions (GloVe: pairs) in it."""
    losses: list[float] = field(default_factory=list)
    """Mean loss of each epoch that is done."""
    seconds: float = 0.0
    """Time in training steps."""


def save_state(folder: Path, tensors: dict[str, Tensor], place: Place) -> None:
    """Write tensors and place as one file, which replaces the last one at once."""
    part = folder / (STATE + ".part")
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, part, {"place": json.dumps(asdict(place))}
    )
    part.replace(folder / STATE)


def load_state(folder: Path, tensors: dict[str, Tensor]) -> Place:
    """Read what `save_state` wrote into the tensors, in place; the start of training where there is nothing."""
    if not (folder / STATE).exists():
        return Place()
    with safe_open(folder / STATE, "pt") as file:
        for name, tensor in tensors.items():
            tensor.copy_(file.get_tensor(name))
        return Place(**json.loads(file.metadata()["place"]))
