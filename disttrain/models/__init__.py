"""Models as plain torch modules, and their initial weights.

Every parameter is drawn from a generator of its own, seeded by (seed, full parameter name), in float32 on the CPU. The
initial weights therefore depend on the seed alone: not on ranks, pipeline stage, order, dtype or device.
"""

import hashlib
import math

import torch
from torch import Tensor

from disttrain.config.schema import ModelConfig
from disttrain.models.bert import BERT
from disttrain.models.cross_entropy import IGNORED
from disttrain.models.gpt import GPT
from disttrain.models.layers import LossSum

__all__ = ["BERT", "FAMILIES", "GPT", "IGNORED", "LossSum", "build_model", "initial_value", "initialise", "tie_weights"]

FAMILIES: dict[str, type[GPT] | type[BERT]] = {"gpt": GPT, "bert": BERT}

INITIAL_STD = 0.02


def build_model(
    config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> GPT | BERT:
    """A model with its initial weights; on the meta device shapes only. config must be resolved (ValueError if not)."""
    with torch.device("meta"):
        model = FAMILIES[config.family](config)
    model = model.to(dtype)
    tie_weights(model)
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device=device)
    initialise(model, seed)
    return model


def initialise(model: GPT | BERT, seed: int) -> None:
    """Overwrite every parameter of a model, or of a part of one, with its initial value; ties weights first."""
    tie_weights(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(model.config, name, parameter.shape, seed))


def tie_weights(model: GPT | BERT) -> None:
    """Make tied names one parameter again where both are present (to_empty and some wrappers part them)."""
    for name, source in model.tied.items():
        parameters = dict(model.named_parameters(remove_duplicate=False))
        if name in parameters and source in parameters:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, parameters[source])


def initial_value(config: ModelConfig, name: str, shape: torch.Size, seed: int) -> Tensor:
    """The initial value of one whole parameter by its full name, float32 on the CPU.

    Weights are normal(0, 0.02) (Radford et al. 2018; Devlin et al. 2019, who truncate at two standard deviations),
    biases 0, norm weights 1. GPT's projections back into the residual stream are scaled by 1 / sqrt(2 * layers)
    (Radford et al. 2019, section 2.3). A tied parameter takes the value of its source.
    """
    name = FAMILIES[config.family].tied.get(name, name)
    if name.endswith("bias"):
        return torch.zeros(shape)
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    std = INITIAL_STD
    if config.family == "gpt" and name.endswith(("attn.out.weight", "mlp.down.weight")):
        std /= math.sqrt(2 * config.layers)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    return torch.empty(shape).normal_(0.0, std, generator=generator)
