"""Bytes of all live tensors, moment by moment, of a rehearsal or of a real rank: what torch's allocator has handed out.

A storage counts from the first operator that touches it to its end; views share one, and one that is resized counts as it
is. Not seen is what an operator takes and gives back inside itself (a kernel's workspace), and what communication
libraries hold.
"""

import gc
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from disttrain.engines.native import NativeEngine
from disttrain.parallel import data
from disttrain.rehearsal.records import PARTS, LiveBytes

CUDA_BLOCK_BYTES = 512
"""The caching allocator for CUDA hands out multiples of so much (torch, c10/cuda/CUDACachingAllocator.cpp)."""


class _Life:
    """A storage between two changes of its size."""

    __slots__ = ("born", "died", "part", "size")

    def __init__(self, born: int, size: int, part: str):
        self.born, self.size, self.part = born, size, part
        self.died: int | None = None

    def at(self, moment: int) -> bool:
        """Whether it is there then."""
        return self.born <= moment and (self.died is None or self.died > moment)


class Ledger(TorchDispatchMode):
    """Adds up the storages of tensors on one type of device, in all threads that it reaches. Made by `counting`."""

    def __init__(self, device_type: str = "cpu", block_bytes: int = 1) -> None:
        """Storages count in whole blocks of `block_bytes`."""
        super().__init__()
        self._device, self._block = device_type, block_bytes
        self._alive: dict[int, _Life] = {}
        self._lives: list[_Life] = []
        self._moment = self._bytes = 0
        self.step, self._phase = "start", "forward"
        self._peaks: dict[tuple[str, str], tuple[int, int, str]] = {}
        """Of each step and phase: bytes, moment and operator."""
        self._lock = RLock()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """One operator of torch."""
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its local tensors come by
        result = func(*args, **(kwargs or {}))
        if func is not torch.ops.prim.device.default:
            with self._lock:
                self._see(func, args, kwargs, result)
                if func is torch.ops.aten._to_copy.default:
                    self._copied(args[0], result)
        return result

    def begin(self, step: str, phase: str) -> None:
        """What follows belongs to this step and phase; what runs in a backward pass is told by itself."""
        self.step, self._phase = step, phase

    def call(self, part: str, tensors: Iterable[Tensor]) -> None:
        """Say what these hold, from their beginning on."""
        with self._lock:
            for tensor in tensors:
                self._see("", tensor)
                life = self._alive.get(tensor.untyped_storage()._cdata)
                if life is not None:
                    life.part = part

    def peak(self, steps: Iterable[str]) -> LiveBytes:
        """The moment of these steps at which most is alive."""
        chosen = set(steps)
        found = {key: value for key, value in self._peaks.items() if key[0] in chosen}
        (step, phase), (_, moment, operator) = max(found.items(), key=lambda item: item[1][0])
        sizes = dict.fromkeys(PARTS, 0)
        for life in self._lives:
            if life.at(moment):
                sizes[life.part] += life.size
        return LiveBytes(*sizes.values(), step=step, phase=phase, operator=operator)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage has changed its size outside of an operator."""
        with self._lock:
            life = self._alive.get(storage._cdata)
            if life is not None:
                self._end(storage._cdata)
                self._begin(storage._cdata, self._size(storage), life.part, "resize_")

    def _see(self, func: Any, *trees: Any) -> None:
        """The tensors in arguments and results."""
        for tree in trees:
            if isinstance(tree, Tensor):
                self._see_one(tree, func)
            elif isinstance(tree, list | tuple):
                self._see(func, *tree)
            elif isinstance(tree, dict):
                self._see(func, *tree.values())

    def _see_one(self, tensor: Tensor, func: Any) -> None:
        device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
        if device.type != self._device:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, self._size(storage)
        life = self._alive.get(key)
        if life is None:
            weakref.finalize(storage, self._ended, key).atexit = False
            self._begin(key, size, "activations" if self._now()[1] == "forward" else "buffers", func)
        elif life.size != size:
            self._end(key)
            self._begin(key, size, life.part, func)

    def _size(self, storage: torch.UntypedStorage) -> int:
        return -(-storage.nbytes() // self._block) * self._block

    def _now(self) -> tuple[str, str]:
        return self.step, self._phase if torch._C._current_graph_task_id() == -1 else "backward"

    def _begin(self, key: int, size: int, part: str, func: Any) -> None:
        self._moment += 1
        self._bytes += size
        self._alive[key] = _Life(self._moment, size, part)
        self._lives.append(self._alive[key])
        now = self._now()
        if now not in self._peaks or self._bytes > self._peaks[now][0]:
            self._peaks[now] = self._bytes, self._moment, str(func).removeprefix("aten.")

    def _end(self, key: int) -> None:
        self._moment += 1
        life = self._alive.pop(key)
        life.died = self._moment
        self._bytes -= life.size

    def _ended(self, key: int) -> None:
        with self._lock:
            self._end(key)

    def _copied(self, source: Tensor, result: Tensor) -> None:
        """A copy of a weight in another type is one of the `copies`."""
        before = self._alive.get(source.untyped_storage()._cdata)
        new = self._alive.get(result.untyped_storage()._cdata)
        if before is not None and new is not None and before is not new and before.part in ("weights", "copies"):
            new.part = "copies"


@contextmanager
def counting(device_type: str = "cpu", block_bytes: int = 1) -> Iterator[Ledger]:
    """Count what happens inside; the garbage collector rests meanwhile, so that two counts are the same."""
    ledger, resize = Ledger(device_type, block_bytes), torch.UntypedStorage.resize_
    enabled, frozen = gc.isenabled(), gc.get_freeze_count() > 0

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:  # FSDP2 frees and takes memory so
        done = resize(storage, size)
        ledger.resized(storage)
        return done

    gc.collect()
    gc.freeze()  # what was there before need not be looked through again
    gc.disable()
    torch.UntypedStorage.resize_ = resize_  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with ledger:
            yield ledger
    finally:
        torch.UntypedStorage.resize_ = resize
        if not frozen:
            gc.unfreeze()
        if enabled:
            gc.enable()


def follow(ledger: Ledger, engine: NativeEngine) -> None:
    """Tell the ledger from now on what the tensors of this engine hold."""
    state = engine._state

    def kept() -> None:
        ledger.call("weights", (p.master for p in state.parameters))
        ledger.call("optimizer", (value for one in state.optimizer.state.values() for value in one.values()))
        if state.compressor is not None:
            ledger.call("feedback", state.compressor.residual.values())
        if state.outer is not None:
            ledger.call("outer", [*state.outer.weight.values(), *state.outer.momentum.values()])

    def gradients(*_: Any) -> None:
        ledger.call("gradients", (g for p in state.parameters if (g := p.gradient) is not None))
        for chunk in engine.chunks:
            ledger.call("copies", data.gathered(chunk.model))
            ledger.call("gradients", data.whole_gradients(chunk.model))

    def look(moment: str) -> None:
        if moment == "reduced":
            gradients()
            ledger.begin(ledger.step, "update")
        if moment == "updated":
            kept()

    kept()
    engine.watch = look
    for chunk in engine.chunks:
        chunk.model.register_forward_pre_hook(gradients)
