"""How fast this machine multiplies the model's own matrices: the throughput no training step of it can pass.

Times every matrix product of forward and backward alone, at the workload's dtype and thread count, and weights each by
how often a step needs it. A multiply-add is two operations; attention counts the whole square (no causal saving).

python matmul_ceiling.py WORKLOAD.json
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from workload import Workload, write_rank_report

REPEATS = 7
WARM_UP = 20  # products until clocks and caches have settled
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Product(NamedTuple):
    """A [*, m, k] times b [*, k, n], this often a step."""

    name: str
    times: int
    a: Tensor
    b: Tensor

    @property
    def flops(self) -> int:
        """Floating-point operations of one such product."""
        return 2 * self.a.numel() * self.b.shape[-1]


def products(w: Workload) -> Iterator[Product]:
    """Every matrix product of one step of one rank, in the memory layouts that autograd gives them."""
    device, dtype = torch.device(w.device), DTYPES[w.precision]
    hidden, layers, tokens = w.hidden_size, w.layers, w.micro_batch_size * w.sequence_length

    def matrix(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    linear = {
        "qkv": (hidden, 3 * hidden, layers),
        "attention out": (hidden, hidden, layers),
        "mlp up": (hidden, 4 * hidden, layers),
        "mlp down": (4 * hidden, hidden, layers),
        "head": (hidden, w.vocab_size, 1),
    }
    for name, (inputs, outputs, times) in linear.items():
        x, weight, grad = matrix(tokens, inputs), matrix(outputs, inputs), matrix(tokens, outputs)
        yield Product(f"{name}, forward", times, x, weight.t())
        yield Product(f"{name}, gradient of input", times, grad, weight)
        yield Product(f"{name}, gradient of weight", times, grad.t(), x)
    batch = w.micro_batch_size * w.heads
    q, k = (matrix(batch, w.sequence_length, hidden // w.heads) for _ in range(2))
    square = matrix(batch, w.sequence_length, w.sequence_length)
    yield Product("attention Q K^T, forward, and dP", 2 * layers, q, k.transpose(1, 2))
    yield Product("attention P V, forward, and dQ", 2 * layers, square, k)
    yield Product("attention dK, dV", 2 * layers, square.transpose(1, 2), q)


def median_seconds(run: Callable[[], object], cuda: bool) -> float:
    """Median time of a call, after one that is not counted."""
    seconds = []
    for _ in range(REPEATS + 1):
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def main(path: Path) -> None:
    """Time the products and report the step's FLOP count, its seconds, and each product's rate."""
    w = Workload.read(path)
    if w.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    flops, seconds, rates = 0.0, 0.0, {}
    first = next(products(w))
    for _ in range(WARM_UP):
        torch.matmul(first.a, first.b)
    for product in products(w):
        one = median_seconds(lambda p=product: torch.matmul(p.a, p.b), w.device == "cuda")
        flops += product.times * product.flops
        seconds += product.times * one
        rates[product.name] = product.flops / one
    write_rank_report(path, flops_per_step=flops, seconds_per_step=seconds, flops_per_second=rates)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
