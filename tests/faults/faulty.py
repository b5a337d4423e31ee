"""A GPT that goes wrong with the batches, and on the rank, that its options name; it may be slow, and so may its disk.

A config names it as model.source=faulty.py:Faulty. When a fault begins a file `struck` is left in the working folder.
"""

import os
import time
from pathlib import Path

import torch.distributed as dist

from disttrain import checkpoint, models
from disttrain.data import Data
from disttrain.models.layers import LossSum

NEVER = 10**9
SLOW_DISK = Path("slow_disk")
"""While there is such a file, the last files of a checkpoint are not written."""

reads, finishes, at = Data.micro_batches, checkpoint._finish, [-1]


def strikes() -> None:
    """Leave word of when a fault began."""
    Path("struck").touch() if not Path("struck").exists() else None


def micro_batches(self, step, data_rank, data_ranks):
    """The batches of a step, whose number is kept; the last data rank may be slow, and every rank die once."""
    options, died = self.config.model.options, Path(f"rank_{dist.get_rank()}_died")
    if data_rank == data_ranks - 1 and "data_sleeps" in options:
        strikes()
        time.sleep(options["data_sleeps"])
    if step == options.get("die_once_at", -1) and not died.exists():
        died.touch()
        os._exit(9)
    at[0] = step
    yield from reads(self, step, data_rank, data_ranks)


def finish(*words):
    """Write the last files of a checkpoint, when the disk does."""
    while SLOW_DISK.exists():
        time.sleep(0.02)
    finishes(*words)


Data.micro_batches = micro_batches
checkpoint._finish = finish


class Faulty(models.GPT):
    """`sleeps`: seconds of every forward pass of all ranks, so that there is time to hit it."""

    def loss_of(self, logits, batch, label_smoothing=0.0):
        options, rank = self.config.options, dist.get_rank()
        found = super().loss_of(logits, batch, label_smoothing)["lm"]
        if not self.training:
            return {"lm": found}
        time.sleep(options.get("sleeps", 0.0))
        if rank == 1:
            time.sleep(options.get("forward_sleeps", 0.0))
        if rank == 1 and options.get("nan_from", NEVER) <= at[0] <= options.get("nan_to", NEVER):
            strikes()
            logits.register_hook(lambda gradient: gradient * float("nan"))
        factor = 1.0
        if at[0] == options.get("explodes_at", -1):
            strikes()
            factor = 20.0
        if rank == 1 and at[0] == options.get("nan_input_at", -1):
            strikes()
            factor = float("nan")
        return {"lm": LossSum(found.sum * factor, found.count)}
