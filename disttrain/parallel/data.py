"""Data parallelism by torch's DistributedDataParallel, reducing with SUM through one hook that counts bytes."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from disttrain.models import BERT, GPT
from disttrain.parallel.collectives import Traffic


class LossModule(nn.Module):
    """A model whose forward is its loss, which is what DistributedDataParallel wants to wrap."""

    def __init__(self, model: GPT | BERT):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor], label_smoothing: float) -> dict:
        """The loss sums of one micro-batch: see the model's `loss`."""
        return self.model.loss(batch, label_smoothing)


def replicate(model: GPT | BERT, device: torch.device, traffic: Traffic) -> nn.Module:
    """The model's loss with gradients summed over all ranks, overlapping the backward pass (Li et al. 2020).

    Losses are already divided by the count of the whole step, so gradients are summed, not averaged.
    """
    module = LossModule(model)
    if dist.get_world_size() == 1:
        return module
    ids = [device.index] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)
    wrapped.register_comm_hook(traffic, _sum_bucket)
    return wrapped


def unsynchronised(module: nn.Module) -> AbstractContextManager:
    """Backward passes in this context add to the gradients of this rank alone."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def _sum_bucket(traffic: Traffic, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    traffic.add(bucket.buffer())
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])  # type: ignore[union-attr]
