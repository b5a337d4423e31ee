"""Seconds of what one rank computes: products, passes over memory, fused attention. No torch.

Letters: m, n, k of a product (m x k) (k x n); S sequence length, d size of a head.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from disttrain.planner.speeds import Attention, MatrixUnit, Product, Speeds

TILES = ((256, 128), (128, 256), (128, 128), (64, 128), (128, 64), (64, 64))
"""Tiles of the result that libraries choose among (NVIDIA, "Matrix Multiplication Background User's Guide", section 2.3)."""
NEAREST = 8
"""Measured points that an interpolation weighs."""


class Kernels(NamedTuple):
    """Seconds, remembered: a plan asks for the same products again and again."""

    speeds: Speeds
    product: Callable[[int, int, int, int], float]
    """(m, n, k, batch) -> seconds of `batch` products beside each other."""
    attention: Callable[[int, int], tuple[float, float]]
    """(S, d) -> FLOP/s of the fused kernel, forward and backward."""

    def passes(self, moved_bytes: float) -> float:
        """Seconds of operators that read and write so many bytes."""
        return moved_bytes / self.speeds.memory_bytes_per_second

    def together(self, busy_seconds: float, operators: float) -> float:
        """Seconds of so many operators that keep the device busy for so long. An accelerator's are handed over ahead: the
        slower of the two, device or host, says how long it takes. A CPU's follow upon their dispatch."""
        host = operators * self.speeds.operator_seconds
        return max(busy_seconds, host) if self.speeds.accelerator else busy_seconds + host


def kernels(speeds: Speeds) -> Kernels:
    """Of this device.

    A product that was not measured takes what its tiles do, or what reading its operands does, if that is longer, and
    then what writing its result does: a tile of the largest size takes all registers of a processor, so that none
    multiplies while it writes. Products with a short sum are slower for that, as the best ones measured have long sums.
    """
    item = {"fp64": 8, "fp32": 4}.get(speeds.precision, 2)

    @cache
    def product(m: int, n: int, k: int, batch: int = 1) -> float:
        if min(m, n, k, batch) == 0:
            return 0.0
        if speeds.products:
            return batch * 2 * m * n * k / interpolated(speeds.products, m, n, k)
        assert speeds.unit is not None
        read, written = (batch * item * count / speeds.memory_bytes_per_second for count in (m * k + k * n, m * n))
        return max(tiled(speeds.unit, m, n, k, batch), read) + written

    @cache
    def attention(length: int, size: int) -> tuple[float, float]:
        return fused_attention(speeds.attention, length, size)

    return Kernels(speeds, product, attention)


def tiled(unit: MatrixUnit, m: int, n: int, k: int, batch: int = 1) -> float:
    """Seconds of products whose results are cut into tiles, which the processors compute in waves.

    An unfinished tile and an unfinished wave take as long as a whole one (NVIDIA, ibid., sections 3.1 and 3.2). The best of
    `TILES` is taken, where a tile that reads more operands for each of its multiplications than the largest ones takes
    longer in proportion: what a library gives up for fewer idle processors.
    """
    each = unit.flops_per_second / unit.processors
    largest = max(rows * columns / (rows + columns) for rows, columns in TILES)
    best = math.inf
    for rows, columns in TILES:
        waves = math.ceil(batch * math.ceil(m / rows) * math.ceil(n / columns) / unit.processors)
        reached = each * rows * columns / (rows + columns) / largest
        best = min(best, waves * 2 * rows * columns * k / reached)
    return best


def interpolated(points: tuple[Product, ...], m: int, n: int, k: int) -> float:
    """FLOP/s between measured points: their logarithms, weighed by the inverse square of the distance in (log m, log n,
    log k) over the nearest ones (Shepard 1968); a point that was measured is what it was."""
    found = []
    for point in points:
        distance = (
            math.log2(m / point.m) ** 2 + math.log2(n / point.n) ** 2 + math.log2(k / point.k) ** 2
        )  # of the square
        if distance == 0:
            return point.flops_per_second
        found.append((distance, point.flops_per_second))
    found.sort()
    weights = [(1 / distance, math.log(speed)) for distance, speed in found[:NEAREST]]
    return math.exp(sum(w * speed for w, speed in weights) / sum(w for w, _ in weights))


def fused_attention(points: tuple[Attention, ...], length: int, size: int) -> tuple[float, float]:
    """FLOP/s forward and backward, as `interpolated`, in (log S, log d); beyond the measured lengths that of the last."""
    lengths = [point.sequence_length for point in points]
    length = min(max(length, min(lengths)), max(lengths))
    directions = []
    for name in ("forward_flops_per_second", "backward_flops_per_second"):
        as_products = tuple(Product(p.sequence_length, p.head_size, 1, getattr(p, name)) for p in points)
        directions.append(interpolated(as_products, length, size, 1))
    return directions[0], directions[1]
