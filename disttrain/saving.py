"""Checkpoints beside training: the state is copied to the host, and a thread of each rank writes it."""

import copy
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from disttrain import checkpoint
from disttrain.config.schema import CheckpointConfig
from disttrain.parallel.groups import for_checkpoints

PATIENCE_S = 60.0
"""How long a run that fails waits for the checkpoint that is being written."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is there."""

    path: Path
    step: int
    write_seconds: float
    """From the copy of the state to the last file's name, beside training or not."""


@dataclass
class Saver:
    """Writes one checkpoint at a time; a context manager, made and used by all ranks together.

    Every rank copies its shards to the host's memory, which is what training waits for, and a thread writes them over a
    process group of its own. Without `checkpoint.asynchronous` the writing is waited for. A checkpoint that could not be
    written is reported by `wait`, on all ranks alike; ask for `failed` where ranks agree on what to do next.
    """

    folder: Path
    kept: CheckpointConfig
    device: torch.device
    _group: Any = None
    _writer: threading.Thread | None = None
    _error: BaseException | None = None
    _done: deque[Saved] = field(default_factory=deque)

    def __enter__(self) -> Self:
        """Open the group and the memory that copies go to."""
        if self.kept.asynchronous:
            on_gpu = self.device.type == "cuda"
            self._group = for_checkpoints(dist.get_world_size())
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=on_gpu,
                    use_shared_memory=False,
                    use_async_staging=False,
                    use_non_blocking_copy=on_gpu,
                )
            )
        return self

    def __exit__(self, *_: object) -> None:
        """Let the last checkpoint be written, if it can be."""
        if self._writer is not None:
            self._writer.join(PATIENCE_S)

    @property
    def failed(self) -> bool:
        """Whether `wait` would raise here."""
        return self._error is not None

    def save(self, step: int, tensors: dict[str, Any], trainer: dict[str, Any], beside: bool) -> None:
        """Begin checkpoint number `step`, when the one before is written; wait for it if it is not to be written beside
        training.

        Raises CheckpointFailed where the one before, or the one that is waited for, could not be written.
        """
        self.wait()
        if beside and self.kept.asynchronous:
            copied = self._stager.stage(tensors)
            self._writer = threading.Thread(
                target=self._write, args=(step, copied, copy.deepcopy(trainer)), name="checkpoint", daemon=True
            )
            self._writer.start()
        else:
            self._write(step, tensors, trainer)
            self.wait()

    def wait(self) -> None:
        """Until the last checkpoint is written. Raises CheckpointFailed where it could not be."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def take_done(self) -> list[Saved]:
        """What was written since the last call."""
        return [self._done.popleft() for _ in range(len(self._done))]

    def _write(self, step: int, tensors: dict[str, Any], trainer: dict[str, Any]) -> None:
        began = time.monotonic()
        kept = self.kept.keep, self.kept.keep_every, self.kept.keep_best
        try:
            path = checkpoint.save(self.folder, step, tensors, trainer, *kept, group=self._group)
        except BaseException as error:  # for the thread that trains
            self._error = error
        else:
            self._done.append(Saved(path, step, time.monotonic() - began))
