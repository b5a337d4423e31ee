"""Products, passes and collectives by hand."""

import math

import pytest

from disttrain.planner.collectives import all_gather, all_reduce, all_to_all, exposed, reduce_scatter, ring, send
from disttrain.planner.devices import KNOWN, speeds_of
from disttrain.planner.kernels import fused_attention, interpolated, kernels, tiled
from disttrain.planner.speeds import Attention, Link, MatrixUnit, Product
from tests.planner.machines import GPU, cpu


def test_a_product_is_cut_into_tiles_which_come_in_waves() -> None:
    """256 x 256 on 10 processors of 0.1 TFLOP/s: 8 tiles of 64 x 128 in one wave, at half the speed of the largest tiles."""
    unit = MatrixUnit(1e12, 10)
    assert tiled(unit, 256, 256, 100) == pytest.approx(2 * 64 * 128 * 100 / 0.5e11)
    whole = tiled(unit, 2560, 1280, 100)  # 100 tiles of 256 x 128: ten full waves
    assert whole == pytest.approx(2 * 2560 * 1280 * 100 / 1e12)
    assert tiled(unit, 2561, 1280, 100) > whole
    assert tiled(unit, 256, 128, 100, batch=10) == pytest.approx(2 * 256 * 128 * 100 / 1e11)


def test_reading_hides_behind_a_product_and_writing_does_not() -> None:
    unit = MatrixUnit(1e12, 10)
    product = kernels(GPU._replace(unit=unit, memory_bytes_per_second=1e10)).product
    assert product(2560, 1280, 100, 1) == pytest.approx(tiled(unit, 2560, 1280, 100) + 2 * 2560 * 1280 / 1e10)
    assert product(16, 1600, 10, 1) == pytest.approx((2 * 1616 * 10 + 2 * 16 * 1600) / 1e10, rel=0.5)
    assert product(0, 16, 100, 1) == 0


def test_points_are_interpolated_by_their_logarithms() -> None:
    points = (Product(64, 64, 64, 1e9), Product(256, 64, 64, 4e9))
    assert interpolated(points, 64, 64, 64) == 1e9
    assert interpolated(points, 128, 64, 64) == pytest.approx(2e9)
    assert 1e9 < interpolated(points, 80, 64, 64) < 2e9
    measured = kernels(cpu(products=points))
    assert measured.product(128, 64, 64, 3) == pytest.approx(3 * 2 * 128 * 64 * 64 / 2e9)


def test_attention_beyond_the_measured_lengths_is_that_of_the_last() -> None:
    points = (Attention(512, 64, 1e12, 5e11), Attention(2048, 64, 2e12, 1e12))
    assert fused_attention(points, 1024, 64) == pytest.approx((2**0.5 * 1e12, 2**0.5 * 5e11))
    assert fused_attention(points, 1 << 20, 64) == fused_attention(points, 2048, 64) == (2e12, 1e12)


def test_dispatch_hides_on_an_accelerator_alone() -> None:
    assert kernels(GPU._replace(operator_seconds=1e-5)).together(3e-4, 20) == pytest.approx(3e-4)
    assert kernels(GPU._replace(operator_seconds=1e-5)).together(1e-4, 20) == pytest.approx(2e-4)
    assert kernels(cpu(operator_seconds=1e-5)).together(1e-4, 20) == pytest.approx(3e-4)


MACHINE = GPU._replace(inside=Link(1e-6, 1e9), between=Link(1e-5, 1e8), ranks_per_host=8, collective_share=0.0)


@pytest.mark.parametrize(
    ("ranks", "stride", "hosts", "beside"),
    [(8, 1, 1, 8), (4, 2, 1, 4), (16, 1, 2, 8), (4, 8, 4, 1), (8, 4, 4, 2), (3, 1, 2, 1), (1, 1, 1, 1)],
)
def test_where_the_ranks_of_a_group_are(ranks: int, stride: int, hosts: int, beside: int) -> None:
    """Hosts of 8 in a world of 32; groups of 3 neighbours straddle two."""
    group = ring(MACHINE, 32, ranks, stride)
    assert (group.hosts, group.beside) == (hosts, beside)


def test_a_world_within_a_host_is_inside() -> None:
    assert ring(MACHINE, 6, 3, 2).hosts == 1


def test_rings_by_hand() -> None:
    inside, across = ring(MACHINE, 32, 4, 1), ring(MACHINE, 32, 16, 1)
    assert all_gather(inside, 4e6) == pytest.approx(3e-6 + 0.75 * 4e6 / 1e9)
    assert reduce_scatter(inside, 4e6) == all_gather(inside, 4e6)
    assert all_reduce(inside, 4e6) == pytest.approx(2 * all_gather(inside, 4e6))
    assert across.bytes_per_second == 8e8  # eight rings beside each other
    assert all_gather(across, 1e6) == pytest.approx(14e-6 + 1e-5 + 15 / 16 * 1e6 / 8e8)
    assert all_gather(ring(MACHINE, 32, 4, 8), 1e6) == pytest.approx(3e-5 + 0.75 * 1e6 / 1e8)
    assert send(across, 1e6) == pytest.approx(1e-5 + 1e6 / 1e8)
    assert all_to_all(across, 1.6e6) == pytest.approx(24e-6 + 8e5 / 1e8)
    alone = ring(MACHINE, 32, 1, 1)
    assert all_reduce(alone, 1e9) == all_gather(alone, 1e9) == all_to_all(alone, 1e9) == send(alone, 1e9) == 0


def test_many_hosts_may_reduce_by_a_tree() -> None:
    group = ring(MACHINE, 1024, 1024, 1)
    assert all_reduce(group, 64) == pytest.approx(2 * (7e-6 + 7e-5 + 64 / (0.9 * 8e8)))
    assert all_reduce(ring(MACHINE, 32, 8, 1), 1e9) == 2 * all_gather(ring(MACHINE, 32, 8, 1), 1e9)
    assert all_reduce(group._replace(accelerator=False), 64) == 2 * all_gather(group, 64)


def test_gloo_all_reduces_where_it_should_scatter_and_hides_nothing_inside_a_host() -> None:
    group = ring(MACHINE._replace(accelerator=False), 32, 4, 1)
    assert reduce_scatter(group, 1e6) == all_reduce(group, 1e6) == pytest.approx(2 * all_gather(group, 1e6))
    assert exposed(group, 2.0, 5.0) == 2.0
    assert exposed(ring(MACHINE._replace(accelerator=False), 32, 4, 8), 2.0, 5.0) == 0.0


def test_what_a_collective_takes_of_the_device_is_added() -> None:
    group = ring(MACHINE._replace(collective_share=0.1), 32, 4, 1)
    assert exposed(group, 2.0, 5.0) == pytest.approx(0.2)
    assert exposed(group, 7.0, 5.0) == pytest.approx(2.5)


@pytest.mark.parametrize("name", KNOWN)
def test_every_device_of_the_table_has_speeds(name: str) -> None:
    precision = "fp16" if name.startswith(("v100", "t4")) else "bf16"
    speeds = speeds_of(name, precision, 16, between_gigabits=100)
    assert speeds.unit is not None and speeds.peak_flops_per_second is not None
    assert 0 < speeds.unit.flops_per_second <= speeds.peak_flops_per_second
    assert speeds.between.bytes_per_second == pytest.approx(12.5e9 * 331 / 400)
    rate = 2 * 8192**3 / kernels(speeds).product(8192, 8192, 8192, 1)
    assert 0.3 * speeds.peak_flops_per_second < rate < speeds.peak_flops_per_second
    assert math.isfinite(kernels(speeds).attention(1024, 64)[0])
