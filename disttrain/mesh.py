"""Sizes and coordinates of the device mesh: whole numbers only, no torch.

Axes from the outermost to the innermost: pipeline, replicate, shard, context, tensor. Ranks that differ only in the
tensor coordinate are neighbours, so that the most talkative axis stays within a host.
"""

from dataclasses import dataclass
from math import prod

from disttrain.config.schema import ParallelConfig

AXES = ("pipeline", "replicate", "shard", "context", "tensor")


@dataclass(frozen=True)
class Mesh:
    """Sizes of the five axes."""

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes in the order of `AXES`."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return prod(self.sizes)

    @property
    def data_ranks(self) -> int:
        """Number of ranks that see different sequences: replicate x shard."""
        return self.replicate * self.shard

    def coordinates(self, rank: int) -> dict[str, int]:
        """Coordinate of a rank on each axis. Raises ValueError for a rank outside the world."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not in a world of {self.world_size}")
        found = {}
        for axis, size in reversed(list(zip(AXES, self.sizes, strict=True))):
            rank, found[axis] = divmod(rank, size)
        return {axis: found[axis] for axis in AXES}

    def data_rank(self, rank: int) -> int:
        """Which share of the global batch this rank reads, from 0 to data_ranks - 1."""
        at = self.coordinates(rank)
        return at["replicate"] * self.shard + at["shard"]


def build_mesh(parallel: ParallelConfig, world_size: int) -> Mesh:
    """The mesh of a config on this many ranks; what is left of the world is data-parallel.

    ZeRO 0 replicates over all data ranks; other stages shard within `parallel.replicate` replicas.
    Raises ValueError if the sizes do not divide the world (`disttrain.config.checks` says so before).
    """
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    data_ranks, rest = divmod(world_size, model_ranks)
    replicate = parallel.replicate if parallel.zero else data_ranks
    if rest or data_ranks == 0 or data_ranks % replicate:
        raise ValueError(f"{model_ranks} model ranks x {replicate} replicas do not divide a world of {world_size}")
    return Mesh(parallel.pipeline, replicate, data_ranks // replicate, parallel.context, parallel.tensor)
