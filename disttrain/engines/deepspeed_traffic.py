"""Counts the bytes that DeepSpeed hands to collectives: a layer around its communication backend."""

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

from torch import Tensor

from disttrain.parallel.collectives import Traffic

SENT: dict[str, int] = {
    "all_reduce": 0, "reduce": 0, "broadcast": 0, "all_gather": 1, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1,
    "all_to_all_single": 1, "all_gather_coalesced": 1,
}  # fmt: skip
"""Collectives of DeepSpeed's backend, and which argument this rank hands over."""


def count_traffic(traffic: Traffic) -> None:
    """Let every collective of DeepSpeed's backend count on `traffic` from now on; the last caller's counts."""
    backend = import_module("deepspeed.comm.comm").cdb
    for name, place in SENT.items():
        method = getattr(backend, name, None)
        if method is not None:
            setattr(backend, name, _counted(getattr(method, "__wrapped__", method), place, traffic))


def _counted(method: Callable, place: int, traffic: Traffic) -> Callable:
    @wraps(method)
    def counted(*args: Any, **kwargs: Any) -> Any:
        sent = args[place] if len(args) > place else kwargs.get("input_tensor", kwargs.get("tensor"))
        for tensor in sent if isinstance(sent, list | tuple) else [sent]:
            if isinstance(tensor, Tensor):
                traffic.add(tensor)
        return method(*args, **kwargs)

    return counted
