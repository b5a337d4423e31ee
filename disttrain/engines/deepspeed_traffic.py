"""Counts the bytes that DeepSpeed hands to collectives: a layer around its communication backend."""

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from disttrain import ranges
from disttrain.parallel.collectives import Traffic, all_gathered, all_reduced, exchanged, reduce_scattered

SENT: dict[str, tuple[int, Callable[..., float]]] = {
    "all_reduce": (0, all_reduced), "reduce": (0, exchanged), "broadcast": (0, exchanged), "all_gather": (1, all_gathered),
    "all_gather_into_tensor": (1, all_gathered), "reduce_scatter_tensor": (1, reduce_scattered),
    "all_to_all_single": (1, exchanged), "all_gather_coalesced": (1, all_gathered),
}  # fmt: skip
"""Collectives of DeepSpeed's backend, which argument this rank hands over, and how often that crosses a wire."""


def count_traffic(traffic: Traffic) -> None:
    """Let every collective of DeepSpeed's backend count on `traffic` from now on; the last caller's counts."""
    backend = import_module("deepspeed.comm.comm").cdb
    for name, (place, ring) in SENT.items():
        method = getattr(backend, name, None)
        if method is not None:
            setattr(backend, name, _counted(getattr(method, "__wrapped__", method), place, ring, traffic))


def _counted(method: Callable, place: int, ring: Callable[..., float], traffic: Traffic) -> Callable:
    @wraps(method)
    def counted(*args: Any, **kwargs: Any) -> Any:
        sent = args[place] if len(args) > place else kwargs.get("input_tensor", kwargs.get("tensor"))
        device = torch.device("cpu")
        for tensor in sent if isinstance(sent, list | tuple) else [sent]:
            if isinstance(tensor, Tensor):
                ranks = dist.get_world_size()
                traffic.add(tensor, ring(ranks, tensor.device) if ring is reduce_scattered else ring(ranks))
                device = tensor.device
        with ranges.communication("data", method.__name__, device) as until:
            return until(method(*args, **kwargs))

    return counted
