"""Models as plain torch modules, and their initial weights.

Every parameter is drawn from a generator of its own, seeded by (seed, full parameter name), in float32 on the CPU. The
initial weights therefore depend on the seed alone: not on ranks, pipeline stage, order, dtype or device.
"""

import hashlib

import torch
from torch import Tensor

from disttrain.config.schema import ModelConfig
from disttrain.models.bert import BERT
from disttrain.models.cross_entropy import IGNORED
from disttrain.models.gpt import GPT
from disttrain.models.layers import LossSum
from disttrain.models.source import load_class
from disttrain.models.task import TaskModel

__all__ = [
    "BERT", "FAMILIES", "GPT", "IGNORED", "LossSum", "Model", "TaskModel", "build_model", "initial_value", "initialise",
    "model_class", "tie_weights",
]  # fmt: skip

Model = GPT | BERT | TaskModel
"""What can be trained: see `GPT` for what it offers."""

FAMILIES: dict[str, type[GPT] | type[BERT]] = {"gpt": GPT, "bert": BERT}
"""Classes of language models."""


def model_class(config: ModelConfig) -> type[Model]:
    """The class of a config's model: its family's, that of tasks, or the user's own. Raises RefusedInput as `load_class`."""
    if config.head != "lm":
        return TaskModel
    family = FAMILIES[config.family]
    return family if config.source is None else load_class(config.source, family)


def build_model(
    config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Model:
    """A model with its initial weights; on the meta device shapes only. config must be resolved (ValueError if not)."""
    with torch.device("meta"):
        model = model_class(config)(config)
    model = model.to(dtype)
    tie_weights(model)
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device=device)
    initialise(model, seed)
    return model


def initialise(model: Model, seed: int) -> None:
    """Overwrite every parameter of a model, or of a part of one, with its initial value; ties weights first."""
    tie_weights(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(model.config, name, parameter.shape, seed))


def tie_weights(model: Model) -> None:
    """Make tied names one parameter again where both are present (to_empty and some wrappers part them)."""
    for name, source in model.tied.items():
        parameters = dict(model.named_parameters(remove_duplicate=False))
        if name in parameters and source in parameters:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, parameters[source])


def initial_value(config: ModelConfig, name: str, shape: torch.Size, seed: int) -> Tensor:
    """The initial value of one whole parameter by its full name, float32 on the CPU.

    Normal with the mean and deviation that the model's class gives, see `GPT.initial` and `BERT.initial`. A tied
    parameter takes the value of its source.
    """
    model = model_class(config)
    name = model.tied.get(name, name)
    mean, std = model.initial(config, name)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    return torch.empty(shape).normal_(mean, std, generator=generator) if std else torch.full(shape, mean)
