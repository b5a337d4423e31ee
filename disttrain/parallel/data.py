"""Data parallelism: DistributedDataParallel, or FSDP2 as ZeRO stages 1 to 3 and HSDP.

Every reduction is a SUM: losses are divided by the count of the whole step before the backward pass.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from disttrain import ranges
from disttrain.config.schema import Precision
from disttrain.grad_compression.compressor import Compressor
from disttrain.models import Model
from disttrain.parallel.collectives import (
    all_gather_flat,
    all_gathered,
    all_reduced,
    reduce_scatter_flat,
    reduce_scattered,
)
from disttrain.parallel.groups import Group, Groups
from disttrain.parallel.thread import one_thread
from disttrain.precision import COMPUTE_DTYPE


class LossModule(nn.Module):
    """A model whose forward is its loss, which is what DistributedDataParallel wants to wrap."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor], label_smoothing: float) -> dict:
        """The loss sums of one micro-batch: see the model's `loss`."""
        return self.model.loss(batch, label_smoothing)


CODED_BUCKET_BYTES = 8 << 20
"""DDP's own buckets are of 25 MiB: the backward pass of a small model would be over before the second one travels."""


def replicate(module: nn.Module, device: torch.device, data: Group, compressor: Compressor | None = None) -> nn.Module:
    """A module with gradients summed over the data ranks, overlapping the backward pass (Li et al. 2020)."""
    if data.size == 1:
        return module
    ids = [device.index] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(
        module,
        device_ids=ids,
        process_group=data.process_group,
        gradient_as_bucket_view=True,
        bucket_cap_mb=None if compressor is None else CODED_BUCKET_BYTES >> 20,
    )
    if compressor is None:
        wrapped.register_comm_hook(data, _sum_bucket)
    else:
        names: dict[Tensor, str] = {p: name for name, p in module.model.named_parameters()}  # pyright: ignore
        wrapped.register_comm_hook(CodedBuckets(compressor, names), CodedBuckets.sum_bucket)
    return wrapped


def _sum_bucket(data: Group, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    with data.sending("all_reduce", bucket.buffer(), all_reduced(data.size)) as until:
        work = until(dist.all_reduce(bucket.buffer(), group=data.process_group, async_op=True))
    return work.get_future().then(lambda done: done.value()[0])  # type: ignore[union-attr]


class CodedBuckets:
    """DDP's buckets, summed through a codec by one thread in the order in which they come, while others are computed."""

    def __init__(self, compressor: Compressor, names: Mapping[Tensor, str]):
        self._compressor, self._names = compressor, names
        self._thread = one_thread("gradients")

    def sum_bucket(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """The hook."""
        device = bucket.buffer().device
        summed: torch.futures.Future[Tensor] = torch.futures.Future(devices=[device] if device.type == "cuda" else None)
        self._thread.submit(self._sum, bucket, summed)
        return summed

    def _sum(self, bucket: GradBucket, summed: torch.futures.Future[Tensor]) -> None:
        try:
            names = [self._names[parameter] for parameter in bucket.parameters()]
            self._compressor.sum_(list(zip(names, bucket.gradients(), strict=True)))
            summed.set_result(bucket.buffer())
        except Exception as error:
            summed.set_exception(error)  # pyright: ignore[reportArgumentType]  its stub is wrong


def shard(
    model: Model, groups: Groups, zero: int, precision: Precision, offload: bool,
    fill: Callable[[nn.Module, str], None], compressor: Compressor | None = None, apart: bool = False,
) -> None:  # fmt: skip
    """Shard parameters, gradients and optimizer over shard x context, in place (Rajbhandari et al. 2020), by FSDP2.

    Stages 1 and 2 keep the whole weights from the forward to the end of the backward pass, stage 3 gathers them anew.
    Several replicas of the sharded group make HSDP (Zhao et al. 2023, section 3.2.2). In bf16 and fp16 the blocks'
    weights are gathered in that type; gradients are always reduced in the master type. The blocks' norms stay whole on
    every rank, a half per cent of a block or less: they compute in the master type as without ZeRO, and their gradients
    are the engine's to sum. `fill(module, name)` gives a module its storage and values right before it is sharded, so
    that only one block is ever whole. A `compressor` sums what FSDP2 would scatter, or, where there are replicas, is the
    engine's to sum between them. Replicas that are `apart` keep gradients and weights of their own.
    """
    low = precision in ("bf16", "fp16")
    policy = MixedPrecisionPolicy(
        param_dtype=COMPUTE_DTYPE[precision] if low else None,
        reduce_dtype=torch.float32 if low else None,
        cast_forward_inputs=False,
    )
    replicas = groups.mesh.replicate > 1
    joined = replicas and compressor is None and not apart  # by FSDP2
    kept: Any = {
        "mesh": groups.shard_mesh["shard"] if replicas and not joined else groups.shard_mesh,
        "offload_policy": CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy(),
    }
    kept_whole: set[nn.Parameter] = set()
    for number, block in model.blocks.items():
        fill(block, f"blocks.{number}")
        kept_whole |= norms(block)
        fully_shard(block, mp_policy=policy, reshard_after_forward=zero == 3, ignored_params=kept_whole, **kept)
    fill(model, "")
    master = MixedPrecisionPolicy(cast_forward_inputs=False)
    fully_shard(model, mp_policy=master, reshard_after_forward=False, ignored_params=kept_whole, **kept)
    gather, scatter = CountedAllGather(groups.data), CountedReduceScatter(groups.data)
    for module in sharded_modules(model):
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
        module.set_custom_all_gather(gather)  # pyright: ignore[reportArgumentType]  same shape, private base
        coded = scatter if compressor is None or replicas else CodedReduceScatter(groups.data, compressor, module)
        module.set_custom_reduce_scatter(coded)  # pyright: ignore[reportArgumentType]
        if joined:
            module.set_all_reduce_hook(partial(groups.data.traffic.add, ring=all_reduced(groups.mesh.replicate)))


def norms(block: nn.Module) -> set[nn.Parameter]:
    """Parameters of the modules of a block that hold vectors only."""
    vectors: set[nn.Parameter] = set()
    for module in block.modules():
        own = list(module.parameters(recurse=False))
        if all(parameter.ndim < 2 for parameter in own):
            vectors.update(own)
    return vectors


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules that FSDP2 handles as one group each."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def forget_gathered(model: nn.Module) -> None:
    """After the shards have changed outside a step: what a forward pass alone had gathered is not the model any more."""
    for module in sharded_modules(model):
        module.reshard()


def gathered(model: nn.Module) -> list[Tensor]:
    """What FSDP2 gathers weights into; without storage where they are sharded."""
    return [tensor for p in _fsdp_params(model) for tensor in p.all_gather_outputs]


def whole_gradients(model: nn.Module) -> list[Tensor]:
    """Gradients that FSDP2 adds up before it scatters their sum."""
    found = []
    for p in _fsdp_params(model):
        unsharded = p._unsharded_param.grad if hasattr(p, "_unsharded_param") else None
        found += [gradient for gradient in (unsharded, p.unsharded_accumulated_grad) if gradient is not None]
    return found


def _fsdp_params(model: nn.Module) -> list[Any]:
    """torch tells nowhere else."""
    groups = [module._get_fsdp_state()._fsdp_param_group for module in sharded_modules(model)]
    return [p for group in groups if group is not None for p in group.fsdp_params]


def synchronise(model: nn.Module, zero: int, last: bool) -> None:
    """Say before a micro-batch's forward pass whether it is the step's last.

    Stage 1 adds whole gradients up and scatters their sum with the last micro-batch; stages 2 and 3 scatter each. With
    replicas the all-reduce between them waits for the last one.
    """
    if not isinstance(model, FSDPModule):
        return
    for module in sharded_modules(model):
        module.set_requires_gradient_sync(last or zero > 1, recurse=False)
        module.set_requires_all_reduce(last, recurse=False)
        if zero < 3:
            module.set_reshard_after_backward(last, recurse=False)
    model.set_is_last_backward(last)


def unsynchronised(module: nn.Module, last: bool) -> AbstractContextManager:
    """The context of a micro-batch's forward and backward: DDP reduces with the step's last one only."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext()


class _Counted:
    """A communication of FSDP2's over some of the data ranks that counts what this rank hands over."""

    def __init__(self, data: Group):
        self.data = data

    def sending(self, operation: str, tensor: Tensor, ranks: int, ring: float) -> AbstractContextManager[ranges.Until]:
        """As a group's; a rank that is alone sends nothing."""
        return self.data.sending(operation, tensor, ring) if ranks > 1 else nullcontext(lambda work: work)

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for the result."""
        return torch.empty(*size, dtype=dtype, device=device)


class CountedAllGather(_Counted):
    """FSDP2's gathering of weights."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        """All-gather flat shards into one flat tensor."""
        ranks = group.size()
        with self.sending("all_gather", input_tensor, ranks, all_gathered(ranks)) as until:
            return until(all_gather_flat(output_tensor, input_tensor, group, async_op))


class CountedReduceScatter(_Counted):
    """FSDP2's reduction of gradients."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        """Reduce-scatter a flat tensor into flat shards."""
        ranks = group.size()
        with self.sending("reduce_scatter", input_tensor, ranks, reduce_scattered(ranks, input_tensor.device)) as until:
            return until(reduce_scatter_flat(output_tensor, input_tensor, group, op, async_op))


class CodedReduceScatter(_Counted):
    """FSDP2's reduction of the gradients of one module through a codec."""

    def __init__(self, data: Group, compressor: Compressor, module: FSDPModule):
        super().__init__(data)
        self._compressor, self._module = compressor, module

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        """Reduce-scatter a flat tensor into flat shards. Raises RuntimeError where a parameter has no gradient."""
        rows = input_tensor.view(group.size(), -1)
        held = self._module._get_fsdp_state()._fsdp_param_group.fsdp_params  # pyright: ignore
        named = [(p._param_fqn or "", p.padded_sharded_param_size.numel()) for p in held]
        if sum(width for _, width in named) != rows.shape[1]:
            names = ", ".join(name for name, _ in named)
            raise RuntimeError(f"one of these has no gradient, so that they cannot be coded under ZeRO: {names}")
        self._compressor.scatter(output_tensor, rows, named)
