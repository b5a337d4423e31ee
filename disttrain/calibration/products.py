"""FLOP/s of matrix products and of fused attention, over the sizes that a transformer's have."""

import statistics
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from disttrain.calibration.timing import Timed, timed
from disttrain.planner.speeds import Attention, Product

SIZES = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Of rows, columns and sums."""
LONGEST_SECONDS = 0.02
"""Products that take longer than this are not measured: there the rate does not change with the size any more."""
ROUNDS = 3
SEQUENCES, HEAD_SIZES = (128, 256, 512, 1024, 2048, 4096), (64, 128)
KINDS = ("forward", "gradient of input", "gradient of weight")


class MeasuredProduct(NamedTuple):
    """One size, in the three ways in which a linear layer multiplies: x W^T, dy W and dy^T x."""

    m: int
    n: int
    k: int
    kinds: tuple[Timed, ...]
    """As `KINDS`."""

    def product(self, overhead_seconds: float) -> Product:
        """The rate of the three together, without what calling an operator costs."""
        flops = 2 * self.m * self.n * self.k
        each = [flops / max(t.seconds - overhead_seconds, t.seconds / 10) for t in self.kinds]
        return Product(self.m, self.n, self.k, statistics.harmonic_mean(each))


def sizes(most_flops: float) -> list[tuple[int, int, int]]:
    """All (m, n, k) up to so many FLOPs, the cheapest first."""
    found = [(m, n, k) for m in SIZES for n in SIZES for k in SIZES if 2 * m * n * k <= most_flops]
    return sorted(found, key=lambda size: size[0] * size[1] * size[2])


def measure(size: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> MeasuredProduct:
    """Time one size."""
    return MeasuredProduct(*size, tuple(timed(call, device, ROUNDS) for call in _calls(*size, device, dtype)))


def _calls(m: int, n: int, k: int, device: torch.device, dtype: torch.dtype) -> Iterator:
    """Operands as autograd brings them: [m, k] by the transpose of [n, k]; [m, k] by [k, n]; the transpose of [k, m] by
    [k, n]."""

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=device).to(dtype)

    left, right = matrix(m, k), matrix(n, k)
    yield lambda: left @ right.mT
    right = matrix(k, n)
    yield lambda: left @ right
    left = matrix(k, m)
    yield lambda: left.mT @ right


def rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of middle size, to know what can be afforded."""
    size = 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / timed(lambda: a @ b, device, ROUNDS).seconds


def attention(flops_per_second: float, device: torch.device, dtype: torch.dtype) -> list[Attention]:
    """Causal attention through torch's fused kernel, forward and backward, as far as it is affordable."""
    found = []
    for size in HEAD_SIZES:
        for length in SEQUENCES:
            pairs = length * (length + 1) / 2
            if 4 * size * pairs * 8 > 4 * LONGEST_SECONDS * flops_per_second:
                continue
            heads = max(8, min(256, round(0.25 * LONGEST_SECONDS * flops_per_second / (4 * size * pairs))))
            forward, backward = _attend(heads, length, size, device, dtype)
            found.append(Attention(length, size, 4 * size * pairs * heads / forward.seconds,
                                   10 * size * pairs * heads / backward.seconds))  # fmt: skip
    return found


def _attend(heads: int, length: int, size: int, device: torch.device, dtype: torch.dtype) -> tuple[Timed, Timed]:
    query, key, value = (torch.randn(1, heads, length, size, device=device).to(dtype) for _ in range(3))

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    there = timed(forward, device, ROUNDS)
    for tensor in (query, key, value):
        tensor.requires_grad_()
    output = forward()
    gradient = torch.randn_like(output)
    back = timed(lambda: torch.autograd.grad(output, (query, key, value), gradient, retain_graph=True), device, ROUNDS)
    return there, back
