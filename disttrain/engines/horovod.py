"""The Horovod engine: `horovod.torch`'s DistributedOptimizer sums the gradients, everything else is the native engine's.

torch's own group stays the control plane: counts, norms, evaluation, records, checkpoints, and the tensor axis. Weights
need no broadcast, since every rank draws the same ones; nor does the optimizer, since every rank loads the checkpoint.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from disttrain import ranges
from disttrain.config.schema import Config, Precision
from disttrain.engines import Reduction, horovod_world
from disttrain.engines.native import NativeEngine
from disttrain.parallel.collectives import all_reduced, any_rank
from disttrain.parallel.groups import Groups


def horovod_engine(config: Config, groups: Groups, device: torch.device, precision: Precision) -> NativeEngine:
    """The native engine with its gradients reduced by Horovod. All ranks call it together. Raises RefusedInput."""
    hvd, process_set = horovod_world.start(config, groups)
    reduction: Reduction = (
        Adasum(config, groups, hvd) if config.horovod.adasum else Summed(config, groups, hvd, process_set)
    )
    return NativeEngine(config, groups, device, precision, reduction)


class Summed:
    """Gradients summed over the data ranks while the backward pass goes on; see `Reduction`."""

    def __init__(self, config: Config, groups: Groups, hvd: Any, process_set: Any):
        self._config, self._groups, self._hvd, self._process_set = config, groups, hvd, process_set
        self._averaged = config.horovod.gradient_predivide != 1.0 or config.horovod.compression != "none"
        self._named: list[tuple[str, nn.Parameter]] = []
        self._optimizer: Any = None

    def attach(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[tuple[str, nn.Parameter]]
    ) -> torch.optim.Optimizer:
        """Put the optimizer inside Horovod's, which reduces each gradient when the last micro-batch has made it."""
        hvd, settings, train = self._hvd, self._config.horovod, self._config.train
        self._named = list(parameters)
        if self._averaged:
            as_own_means(self._named, self._groups.data.size)
        share = train.global_batch_size // self._groups.mesh.data_ranks
        self._optimizer = hvd.DistributedOptimizer(
            optimizer,
            named_parameters=self._named,
            compression=getattr(hvd.Compression, settings.compression),
            backward_passes_per_step=share // (train.micro_batch_size or share),
            op=hvd.Average if self._averaged else hvd.Sum,
            gradient_predivide_factor=settings.gradient_predivide,
            process_set=self._process_set,
        )
        return self._optimizer

    def complete(self) -> None:
        """Wait for the sums. A gradient that no rank has made stays None, where Horovod makes zeros."""
        made = any_rank(*(parameter.grad is not None for _, parameter in self._named))
        with ranges.communication("data", "synchronize", self._named[0][1].device):  # Horovod's threads are in no trace
            self._optimizer.synchronize()
        for (_, parameter), somewhere in zip(self._named, made, strict=True):
            if not somewhere:
                parameter.grad = None
        count((p for _, p in self._named), self._groups, self._config.horovod.compression == "fp16")

    def update(self) -> None:
        """Step on gradients that are complete already."""
        with self._optimizer.skip_synchronize():
            self._optimizer.step()

    def agree(self) -> None:
        """Nothing differs between the ranks."""

    def close(self) -> None:
        """Stop Horovod; a rank that just ends makes the others abort."""
        self._hvd.shutdown()


class Adasum:
    """Every rank steps on its own mean gradient, and the steps are combined by Adasum (Maleki et al. 2021).

    As Horovod's own Adasum optimizer does inside the backward pass; here after it, when the gradient is clipped and
    nobody has overflowed. The ranks' moments differ until `agree`.
    """

    def __init__(self, config: Config, groups: Groups, hvd: Any):
        self._config, self._groups, self._hvd = config, groups, hvd
        self._named: list[tuple[str, nn.Parameter]] = []
        self._optimizer: torch.optim.Optimizer

    def attach(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[tuple[str, nn.Parameter]]
    ) -> torch.optim.Optimizer:
        """Take the parameters; the optimizer stays as it is."""
        self._named, self._optimizer = list(parameters), optimizer
        as_own_means(self._named, self._groups.data.size)
        return optimizer

    def complete(self) -> None:
        """Gradients stay each rank's own."""

    @torch.no_grad()
    def update(self) -> None:
        """Step alone, then take the combined step of all ranks instead."""
        before = [parameter.detach().clone() for _, parameter in self._named]
        self._optimizer.step()
        steps = [(name, p - start) for (name, p), start in zip(self._named, before, strict=True)]
        self._reduce(steps, self._hvd.Adasum)
        for (_, parameter), start, (_, step) in zip(self._named, before, steps, strict=True):
            parameter.copy_(start + step)

    @torch.no_grad()
    def agree(self) -> None:
        """Average the moments over the ranks, so that a checkpoint fits any of them and any number of them."""
        state = self._optimizer.state
        moments = [
            (f"{name}.{key}", value)
            for name, parameter in self._named
            for key, value in state[parameter].items()
            if isinstance(value, Tensor) and value.ndim
        ]
        self._reduce(moments, self._hvd.Average)

    def close(self) -> None:
        """Stop Horovod; a rank that just ends makes the others abort."""
        self._hvd.shutdown()

    def _reduce(self, named: Sequence[tuple[str, Tensor]], op: Any) -> None:
        handles = [self._hvd.allreduce_async_(tensor, name=name, op=op) for name, tensor in named]
        with ranges.communication("data", "synchronize", named[0][1].device):
            for handle in handles:
                self._hvd.synchronize(handle)
        count((tensor for _, tensor in named), self._groups, False)


def as_own_means(named: Iterable[tuple[str, nn.Parameter]], ranks: int) -> None:
    """Multiply gradients, which are parts of the whole step's mean, by the number of ranks whose mean will be taken."""

    def multiplied(gradient: Tensor) -> Tensor:
        return gradient * ranks

    for _, parameter in named if ranks > 1 else ():
        parameter.register_hook(multiplied)


def count(tensors: Iterable[Tensor], groups: Groups, half: bool) -> None:
    """Count what is handed to Horovod; `half` where it travels as fp16. Nothing leaves a rank that is alone."""
    for tensor in tensors if groups.data.size > 1 else ():
        handed = tensor.numel() * 2 if half else tensor.nbytes
        groups.data.traffic.count(handed, tensor.nbytes, all_reduced(groups.data.size) * handed)
