"""What each local parameter is of the whole one, and from there: filling, saving, counting copies.

A parameter is cut at most twice: over the tensor axis along the dim its role says, then by FSDP2 over shard x context
along dim 0. Each cut is torch.chunk's: equal chunks, rounded up, so that the last may be shorter or empty. FSDP2 leaves
the blocks' norms whole (see `disttrain.parallel.data.shard`).
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as Split

from disttrain.optim import in_parts
from disttrain.parallel.groups import Groups, ranks_along


class Cut(NamedTuple):
    """One cut of a tensor into chunks."""

    dim: int
    chunks: int
    index: int
    """Which chunk is here."""


@dataclass(frozen=True)
class Shard:
    """One local parameter as a part of the whole."""

    name: str
    """Full name of the whole parameter."""
    shape: torch.Size
    """Shape of the whole."""
    tensor_cut: Cut | None
    """How the tensor axis cuts it, which comes first."""
    data_cut: Cut | None
    """How ZeRO cuts what is left."""
    copies: int
    """Ranks of the world that hold these same elements."""
    partial: bool
    """Whether the gradient must still be summed over the tensor axis (sequence parallelism)."""
    tied_to: str | None
    """Name of the parameter on another stage whose values this one repeats: left out of norms and checkpoints."""

    @property
    def slices(self) -> tuple[slice, ...]:
        """Where the local part lies in the whole."""
        bounds = [(0, size) for size in self.shape]
        for dim, chunks, index in filter(None, (self.tensor_cut, self.data_cut)):
            start, stop = bounds[dim]
            size = -(-(stop - start) // chunks)
            bounds[dim] = (min(start + index * size, stop), min(start + (index + 1) * size, stop))
        return tuple(slice(start, stop) for start, stop in bounds)

    def in_link(self, groups: Groups) -> "Shard":
        """The part whose gradient is summed over the ranks between which gradients are coded: ZeRO cuts it afterwards,
        where there are no replicas."""
        return self if groups.mesh.replicate > 1 else replace(self, data_cut=None)

    @property
    def local_shape(self) -> torch.Size:
        """Shape of the local part."""
        return torch.Size(s.stop - s.start for s in self.slices)


@dataclass(frozen=True)
class LocalParameter:
    """A parameter of this rank: what the model holds, and its plain local tensor, which the optimizer updates."""

    shard: Shard
    parameter: nn.Parameter
    master: nn.Parameter
    """The parameter itself, or the local tensor of FSDP2's, sharing its memory."""
    share: Tensor
    """Part of a sum over the world that is this rank's: 1 / copies, 0 for a tied copy; float64 scalar on the device."""

    @property
    def gradient(self) -> Tensor | None:
        """The local part of the gradient; None before a backward pass, and for parameters that it does not reach."""
        return None if self.parameter.grad is None else local(self.parameter.grad)


def local(tensor: Tensor) -> Tensor:
    """The local part of a DTensor, detached: a way back for gradients takes ten times as long. Another tensor itself."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


@dataclass(frozen=True)
class Cutting:
    """How the parameters of one stage are cut over the tensor axis, by full name."""

    shapes: dict[str, torch.Size]
    """Shapes of the whole parameters."""
    dims: dict[str, int]
    """Dim along which a parameter is cut; whole where the name is missing."""
    partial: frozenset[str]
    """Whole parameters whose gradients must be summed over the tensor axis."""
    tied_to: dict[str, str]
    """Parameters that repeat one of another stage."""

    def tensor_shard(self, name: str, groups: Groups) -> Shard:
        """The part of a parameter before FSDP2 cuts it."""
        mesh = groups.mesh
        copies = mesh.replicate * mesh.shard * mesh.context
        cut = Cut(self.dims[name], mesh.tensor, groups.tensor.rank) if name in self.dims else None
        copies = copies if cut else copies * mesh.tensor
        return Shard(name, self.shapes[name], cut, None, copies, name in self.partial, self.tied_to.get(name))


def local_parameters(model: nn.Module, groups: Groups, cutting: Cutting, device: torch.device) -> list[LocalParameter]:
    """The parameters of one stage in its last form, as `parallelize` leaves it."""
    found = []
    for name, parameter in model.named_parameters():
        shard, master = cutting.tensor_shard(name, groups), parameter
        if isinstance(parameter, DTensor):  # FSDP2 has cut it
            chunks = groups.mesh.shard * groups.mesh.context
            cut = Cut(0, chunks, groups.shard_mesh.get_local_rank("shard"))
            shard = replace(shard, data_cut=cut, copies=shard.copies // chunks)
            master = nn.Parameter(local(parameter).detach())
        share = torch.tensor(0.0 if shard.tied_to else 1 / shard.copies, dtype=torch.float64, device=device)
        found.append(LocalParameter(shard, parameter, master, share))
    return found


def state_mesh(groups: Groups, device_type: str) -> DeviceMesh:
    """This stage's ranks as (tensor, replicate, shard x context): the order in which parameters are cut.

    Plain Shard placements then describe them, which an order of torch's own, shard before tensor, would not.
    """
    mesh = groups.mesh
    stage = next(r for r in ranks_along(mesh, ("replicate", "shard", "context", "tensor")) if groups.rank in r)
    ranks = torch.tensor(stage).view(mesh.replicate, mesh.shard * mesh.context, mesh.tensor).permute(2, 0, 1)
    return DeviceMesh(device_type, ranks, mesh_dim_names=("tensor", "replicate", "shard"), _init_backend=False)


def as_whole(shard: Shard, tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """A local tensor shaped like the parameter's part, as a DTensor that knows its place in the whole."""
    if shard.tensor_cut is None and shard.data_cut is None:
        return tensor
    over_tensor, over_data = (
        Replicate() if cut is None else Split(cut.dim) for cut in (shard.tensor_cut, shard.data_cut)
    )
    stride = torch.empty(shard.shape, device="meta").stride()
    placements = (over_tensor, Replicate(), over_data)
    return DTensor.from_local(tensor, mesh, placements, run_check=False, shape=shard.shape, stride=stride)


def placed(shard: Shard, key: str, value: Tensor, mesh: DeviceMesh) -> Tensor:
    """What an optimizer keeps of a parameter under this key: of a part its place in the whole; what is whole on every rank
    as it is."""
    return as_whole(shard, value, mesh) if in_parts(key, value) else value
