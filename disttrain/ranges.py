"""Named ranges in the trace of torch's profiler: phases of a step, stages, micro-batches and collectives.

While nothing is profiled a range is one look at a flag of torch's. `disttrain.profiling` reads the names again: a kind
(step, data, engine, forward, backward, communication, ...) and words about it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch.autograd import profiler

PREFIX = "disttrain."
HOST, DEVICE = "gloo", "nccl"
"""What carries a collective of tensors on a CPU, and on a GPU."""

T = TypeVar("T")
Until = Callable[[T], T]
"""Takes a collective that was started (torch's Work) and gives it back."""


def _itself(work: T) -> T:
    return work


_NOTHING: AbstractContextManager[None] = nullcontext()
_NO_COLLECTIVE: AbstractContextManager[Until] = nullcontext(_itself)


def named(kind: str, *words: object) -> AbstractContextManager[Any]:
    """A range of this kind while torch's profiler records; nothing otherwise."""
    if not profiler._is_profiler_enabled:
        return _NOTHING
    return profiler.record_function(" ".join([PREFIX + kind, *map(str, words)]))


def communication(axis: str, operation: str, device: torch.device) -> AbstractContextManager[Until]:
    """A range around a collective over `axis`. On a CPU it goes on until the Work that the block hands over is done; what a
    GPU does is in the trace itself, and the range says for which axis it was launched."""
    if not profiler._is_profiler_enabled:
        return _NO_COLLECTIVE
    carrier = HOST if device.type == "cpu" else DEVICE
    return _Communication(f"{PREFIX}communication {axis} {carrier}:{operation}", carrier == HOST)


class _Communication:
    def __init__(self, name: str, on_host: bool):
        self._range, self._on_host, self._goes_on = profiler.record_function(name), on_host, False

    def __enter__(self) -> Until:
        self._range.__enter__()
        return self._until

    def __exit__(self, *error: Any) -> None:
        if not self._goes_on:
            self._range.__exit__(*error)

    def _until(self, work: Any) -> Any:
        if not self._on_host or not hasattr(work, "get_future"):
            return work
        self._goes_on = True
        try:
            self._range._call_end_callbacks_on_future(work.get_future())
        except RuntimeError:  # gloo's reduce-scatter cannot tell
            return _Awaited(work, self._range)
        return work


class _Awaited:
    """A Work whose range ends when it is waited for."""

    def __init__(self, work: Any, around: Any):
        self._work, self._range = work, around

    def wait(self, *args: Any) -> Any:
        """As torch's."""
        result = self._work.wait(*args)
        self._range.__exit__(None, None, None)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
