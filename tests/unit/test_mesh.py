"""Coordinates of the mesh: a bijection, tensor innermost, data ranks shared by model ranks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disttrain.config.schema import ParallelConfig
from disttrain.mesh import AXES, Mesh, build_mesh

sizes = st.integers(1, 4)


@given(sizes, sizes, sizes, sizes, sizes)
def test_coordinates_are_a_bijection(pipeline: int, replicate: int, shard: int, context: int, tensor: int) -> None:
    mesh = Mesh(pipeline, replicate, shard, context, tensor)
    seen = [tuple(mesh.coordinates(rank)[axis] for axis in AXES) for rank in range(mesh.world_size)]
    assert len(set(seen)) == mesh.world_size
    assert seen == sorted(seen)  # the last axis, tensor, runs fastest
    counts = [sum(mesh.data_rank(r) == d for r in range(mesh.world_size)) for d in range(mesh.data_ranks)]
    assert counts == [pipeline * context * tensor] * mesh.data_ranks


def test_ranks_outside_are_refused() -> None:
    with pytest.raises(ValueError, match="rank 2 is not in a world of 2"):
        Mesh(replicate=2).coordinates(2)


@pytest.mark.parametrize(
    ("parallel", "world", "expected"),
    [
        ({}, 4, (1, 4, 1, 1, 1)),
        ({"tensor": 2}, 8, (1, 4, 1, 1, 2)),
        ({"tensor": 2, "pipeline": 2, "zero": 2}, 8, (2, 1, 2, 1, 2)),
        ({"zero": 3, "replicate": 2}, 8, (1, 2, 4, 1, 1)),
        ({"context": 2, "zero": 1}, 4, (1, 1, 2, 2, 1)),
    ],
)
def test_what_is_left_is_data_parallel(parallel: dict, world: int, expected: tuple) -> None:
    assert build_mesh(ParallelConfig(**parallel), world).sizes == expected


@pytest.mark.parametrize(
    ("parallel", "world"), [({"tensor": 3}, 4), ({"tensor": 8}, 4), ({"zero": 3, "replicate": 3}, 4)]
)
def test_sizes_that_do_not_divide(parallel: dict, world: int) -> None:
    with pytest.raises(ValueError, match="do not divide"):
        build_mesh(ParallelConfig(**parallel), world)
