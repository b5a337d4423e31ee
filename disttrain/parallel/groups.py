"""This rank's place on every axis of the mesh: the process groups made from the whole numbers of `disttrain.mesh`."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from disttrain import ranges
from disttrain.mesh import AXES, Mesh
from disttrain.parallel import world
from disttrain.parallel.collectives import Traffic


@dataclass(frozen=True)
class Group:
    """Ranks that differ only on one axis, or on several taken together, and this rank's place among them."""

    size: int
    rank: int
    """Place in the group, not in the world."""
    ranks: tuple[int, ...]
    """Ranks of the world, in the order of the axes."""
    process_group: dist.ProcessGroup | None
    """None when the group is this rank alone: then nothing is sent."""
    traffic: Traffic
    """Where collectives over this group count their bytes."""
    axis: str = "world"
    """What a profile calls it: tensor, sequence, context, pipeline, data or world."""

    def sending(self, operation: str, tensor: Tensor, ring: float) -> AbstractContextManager[ranges.Until]:
        """Count what a collective is handed, which leaves this rank `ring` times, and name it in a profiler's trace; the
        block makes the call, and gives the Work of one that it does not wait for to what the context is."""
        self.traffic.add(tensor, ring)
        return ranges.communication(self.axis, operation, tensor.device)


@dataclass(frozen=True)
class Groups:
    """All groups of one rank."""

    mesh: Mesh
    rank: int
    tensor: Group
    context: Group
    pipeline: Group
    data: Group
    """replicate x shard x context: the ranks whose gradients are summed."""
    replicate: Group
    """Ranks that hold the same shard (HSDP), or the same weights."""
    world: Group
    tie: Group
    """First and last pipeline rank of the same column; this rank alone where it is neither."""
    shard_mesh: DeviceMesh
    """Axes (replicate, shard x context) around this rank, for FSDP2; (shard x context) alone without replicas."""

    def coded(self, zero: int) -> Group:
        """The ranks between which gradients are coded: replicas of what ZeRO shards, where there are some, else all data
        ranks."""
        return self.replicate if zero and self.mesh.replicate > 1 else self.data

    def inner(self, zero: int) -> Group:
        """The data ranks of one worker that takes steps of its own: those of a replica of what ZeRO shards, else this rank
        alone."""
        if not (zero and self.mesh.replicate > 1):
            return Group(1, 0, (self.rank,), None, self.world.traffic, "data")
        group = self.shard_mesh.get_group("shard")
        ranks = tuple(dist.get_process_group_ranks(group))
        return Group(len(ranks), ranks.index(self.rank), ranks, group, self.world.traffic, "data")


def beside(groups: Groups, zero: int) -> Group:
    """`groups.coded` once more with communicators of its own, for a thread beside the step. All ranks call it together."""
    mine = groups.coded(zero)
    axes = ("replicate",) if mine is groups.replicate else ("replicate", "shard", "context")
    made: dict[tuple[int, ...], Any] = {}
    for ranks in ranks_along(groups.mesh, axes):
        made[ranks] = _make(ranks, f"{_name(axes)}, beside the step") if len(ranks) > 1 else None
    return replace(mine, process_group=made[mine.ranks])


def for_checkpoints(world_size: int) -> dist.ProcessGroup | None:
    """All ranks once more, over the hosts (gloo), for a thread beside the step; None where there is only one. All ranks call
    it together."""
    return _make(range(world_size), "checkpoint", "gloo") if world_size > 1 else None


def make_groups(mesh: Mesh, rank: int, device_type: str, traffic: Traffic) -> Groups:
    """Make the groups of `rank`. Every rank of the world calls it, after the process group has started."""

    def along(*axes: str) -> Group:
        return _group(mesh, rank, axes, traffic)

    names, axes = ("replicate", "shard"), (("replicate",), ("shard", "context"))
    if mesh.replicate == 1:
        names, axes = names[1:], axes[1:]
    return Groups(
        mesh=mesh,
        rank=rank,
        tensor=along("tensor"),
        context=along("context"),
        pipeline=along("pipeline"),
        data=along("replicate", "shard", "context"),
        replicate=along("replicate"),
        world=along(*AXES),
        tie=_tie(mesh, rank, traffic),
        shard_mesh=_device_mesh(mesh, rank, device_type, names, [along(*a) for a in axes]),
    )


def _group(mesh: Mesh, rank: int, axes: tuple[str, ...], traffic: Traffic) -> Group:
    """Every rank makes all groups along these axes, in the same order, as torch wants it."""
    mine: Group | None = None
    for ranks in ranks_along(mesh, axes):
        group = _new_group(mesh, ranks, _name(axes))
        if rank in ranks:
            mine = Group(len(ranks), ranks.index(rank), ranks, group, traffic, _axis(axes))
    assert mine is not None
    return mine


def _new_group(mesh: Mesh, ranks: tuple[int, ...], name: str) -> dist.ProcessGroup | None:
    if len(ranks) == 1:
        return None
    if len(ranks) == mesh.world_size:
        return dist.group.WORLD
    return _make(ranks, name)


def _make(ranks: Sequence[int], name: str, backend: str | None = None) -> dist.ProcessGroup:
    """A group that waits as long as the world does; an explanation of a hang calls it by its name."""
    return dist.new_group(list(ranks), timeout=world.timeout(), backend=backend, group_desc=name)  # pyright: ignore[reportReturnType]


def _name(axes: tuple[str, ...]) -> str:
    if axes == ("replicate", "shard", "context"):
        return "data"
    return "shard" if axes == ("shard", "context") else " x ".join(axes)


def _axis(axes: tuple[str, ...]) -> str:
    if set(axes) == set(AXES):
        return "world"
    return axes[0] if axes in (("tensor",), ("context",), ("pipeline",)) else "data"


def _tie(mesh: Mesh, rank: int, traffic: Traffic) -> Group:
    mine = Group(1, 0, (rank,), None, traffic, "pipeline")
    if mesh.pipeline == 1:
        return mine
    for column in ranks_along(mesh, ("pipeline",)):
        ends = (column[0], column[-1])
        group = _new_group(mesh, ends, "tie")
        if rank in ends:
            mine = Group(2, ends.index(rank), ends, group, traffic, "pipeline")
    return mine


def ranks_along(mesh: Mesh, axes: tuple[str, ...]) -> list[tuple[int, ...]]:
    """All groups of ranks that differ on these axes only; each in the order of the axes, outermost first."""
    strides, stride = {}, 1
    for axis, size in reversed(list(zip(AXES, mesh.sizes, strict=True))):
        strides[axis], stride = stride, stride * size

    def places(chosen: list[str]) -> list[int]:
        ranges = [range(0, getattr(mesh, axis) * strides[axis], strides[axis]) for axis in chosen]
        return [sum(at) for at in product(*ranges)]

    others = places([axis for axis in AXES if axis not in axes])
    inside = places([axis for axis in AXES if axis in axes])
    return [tuple(start + step for step in inside) for start in others]


def _device_mesh(mesh: Mesh, rank: int, device_type: str, names: tuple[str, ...], groups: list[Group]) -> DeviceMesh:
    """torch's mesh over groups that are there already; a group of one is made, since FSDP2 wants one."""
    made = [group.process_group or _alone(mesh, rank) for group in groups]
    if len(made) == 1:
        return DeviceMesh.from_group(made[0], device_type, mesh_dim_names=names)
    block = next(ranks for ranks in ranks_along(mesh, ("replicate", "shard", "context")) if rank in ranks)
    rows = [
        list(block[i : i + len(block) // mesh.replicate]) for i in range(0, len(block), len(block) // mesh.replicate)
    ]
    return DeviceMesh.from_group(made, device_type, mesh=rows, mesh_dim_names=names)


def _alone(mesh: Mesh, rank: int) -> dist.ProcessGroup:
    return [_make([other], "alone") for other in range(mesh.world_size)][rank]
