"""The trainer's optimizers: parameter groups, and which class each `optim.name` is (docs/optimisers.md)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from disttrain.config.optimizer import is_hidden
from disttrain.config.schema import ONE_BIT, GradientCodec, OptimConfig
from disttrain.optim.adafactor import FACTORS, Adafactor
from disttrain.optim.adam import OneBitAdamW, no_moments
from disttrain.optim.lamb import Lamb, OneBitLamb
from disttrain.optim.muon import Muon
from disttrain.optim.parts import WHOLE, Across, Parts
from disttrain.optim.schedule import learning_rate

__all__ = [
    "WHOLE", "Across", "Adafactor", "Lamb", "Muon", "OneBitAdamW", "OneBitLamb", "Parts", "begin", "build_optimizer",
    "in_parts", "learning_rate", "no_moments", "parameter_groups",
]  # fmt: skip

QKV = ".attn.qkv.weight"
"""End of the name of a matrix that is three: queries', keys' and values' (`disttrain.models.layers.Attention`)."""


def parameter_groups(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict]:
    """Matrices and embeddings decay; biases and layer normalisation (fewer than two dimensions) do not."""
    named = [(name, p) for name, p in parameters if p.requires_grad]
    groups = [
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    config: OptimConfig, parameters: Iterable[tuple[str, nn.Parameter]], codec: GradientCodec = "none",
    parts: Parts = WHOLE, heads: int = 1,
) -> torch.optim.Optimizer:  # fmt: skip
    """The optimizer of this name. For the codecs `ONE_BIT` one whose second moments can be frozen.

    torch's class where it is one that goes over elements; ours where whole parameters count, of which there may be `parts`
    here. `heads` are those in a fused attention matrix, which muon takes apart.
    """
    named = list(parameters)
    groups, lr, betas = parameter_groups(named, config.weight_decay), config.lr, (config.beta1, config.beta2)
    match config.name:
        case "lamb":
            return (OneBitLamb if codec in ONE_BIT else Lamb)(groups, lr, betas, config.epsilon, parts.across)
        case "adafactor":
            return Adafactor(groups, lr, config.epsilon, parts)
        case "muon":
            momentum = config.running, config.looks_ahead, config.ns_steps
            return Muon(_muon_groups(named, groups, heads), lr, betas, config.epsilon, *momentum, parts)
        case "adamw" if codec in ONE_BIT:
            return _by_element(OneBitAdamW, config, groups)
    return _by_element(torch.optim.AdamW, config, groups)


def _by_element(adamw: type[torch.optim.AdamW], config: OptimConfig, groups: list[dict]) -> torch.optim.Optimizer:
    """torch's classes; `adamw` is the one for that name. Decay of radam is decoupled as in its authors' code."""
    lr, betas, fused = config.lr, (config.beta1, config.beta2), config.implementation in ("auto", "fused")
    kernel = {"fused": fused, "foreach": None if fused else True}
    match config.name:
        case "adam":
            return torch.optim.Adam(groups, lr=lr, betas=betas, eps=config.epsilon, **kernel)
        case "radam":
            return torch.optim.RAdam(groups, lr, betas, config.epsilon, decoupled_weight_decay=True, foreach=True)
        case "sgd":
            return torch.optim.SGD(groups, lr, momentum=config.running, nesterov=config.looks_ahead, foreach=True)
        case "adagrad":
            return torch.optim.Adagrad(groups, lr, eps=config.epsilon, foreach=True)
        case "rmsprop":
            return torch.optim.RMSprop(groups, lr, config.alpha, config.epsilon, momentum=config.running,
                                       centered=config.centered, foreach=True)  # fmt: skip
    return adamw(groups, lr=lr, betas=betas, eps=config.epsilon, **kernel)


def _muon_groups(named: list[tuple[str, nn.Parameter]], groups: list[dict], heads: int) -> list[dict]:
    """Hidden weights apart, and of these the ones that are three."""
    name_of = {p: name for name, p in named}

    def kind(p: nn.Parameter) -> int:
        return (1 + name_of[p].endswith(QKV)) * is_hidden(name_of[p], p.ndim)

    found = [
        {**group, "params": [p for p in group["params"] if kind(p) == k], "orthogonal": k > 0, "fused": 3 if k > 1 else 1,
         "heads": heads}
        for group in groups for k in (0, 1, 2)
    ]  # fmt: skip
    return [group for group in found if group["params"]]


def in_parts(key: str, value: Tensor) -> bool:
    """Whether a tensor of the optimizer's state has an element for each of the parameter's, so that a rank with a part of
    the one has a part of the other. Other state is whole on every rank: counts, and Adafactor's factors."""
    return value.ndim > 0 and key not in FACTORS


def begin(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter without state that from which its first step would start."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = _first(optimizer, group, parameter)


def _first(optimizer: torch.optim.Optimizer, group: dict, parameter: Tensor) -> dict[str, Tensor]:
    match optimizer:
        case Adafactor() | Muon():
            return optimizer.begin(parameter)
        case torch.optim.SGD():
            return {"momentum_buffer": torch.zeros_like(parameter)} if group["momentum"] else {}
        case torch.optim.RMSprop():
            kept = {"square_avg": True, "momentum_buffer": group["momentum"] > 0, "grad_avg": group["centered"]}
            found = {key: torch.zeros_like(parameter) for key, there in kept.items() if there}
            return {"step": torch.zeros((), dtype=torch.float32), **found}
    moments = no_moments(parameter)
    if isinstance(optimizer, torch.optim.RAdam):
        moments["step"] = moments["step"].cpu()
    return moments
