"""Bytes per second of operators that go over memory, and what calling any operator costs."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from disttrain.calibration.timing import Timed, timed

ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 25}
"""Of each operand: more than caches hold, as a layer's activations are."""
WIDTH = 1024
CHAIN = 64
"""Operators in a row on a tensor of one element."""


class Pass(NamedTuple):
    """One operator, results in new memory as in training."""

    operator: str
    moved_bytes: int
    """Read and written, each tensor once."""
    timed: Timed

    @property
    def bytes_per_second(self) -> float:
        """Moved in a second."""
        return self.moved_bytes / self.timed.seconds


PLAIN = ("add", "copy")
"""Those that do nothing but move: their mean is `Speeds.memory_bytes_per_second`."""


def measure(device: torch.device, low: torch.dtype) -> list[Pass]:
    """Elementwise operators and norms in float32, and casts to the type of products."""
    return [Pass(name, moved, timed(call, device)) for name, moved, call in _calls(device, low)]


def _calls(device: torch.device, low: torch.dtype) -> Iterator:
    x, y = (torch.randn(ELEMENTS[device.type] // WIDTH, WIDTH, device=device) for _ in range(2))
    size, narrow = x.nbytes, x.to(low)
    yield "add", 3 * size, lambda: x + y
    yield "copy", 2 * size, lambda: x.clone()
    if low != torch.float32:
        yield f"cast to {str(low).removeprefix('torch.')}", size + narrow.nbytes, lambda: x.to(low)
        yield "cast to float32", size + narrow.nbytes, lambda: narrow.to(torch.float32)
    yield "gelu", 2 * narrow.nbytes, lambda: F.gelu(narrow, approximate="tanh")
    z, gradient = narrow.detach().requires_grad_(), narrow.clone()
    activated = F.gelu(z, approximate="tanh")
    yield "gelu backward", 3 * narrow.nbytes, lambda: torch.autograd.grad(activated, z, gradient, retain_graph=True)
    weight, bias = (torch.ones(WIDTH, device=device, requires_grad=True) for _ in range(2))
    yield "layer norm", 2 * size, lambda: F.layer_norm(x, (WIDTH,), weight, bias)
    w = x.detach().requires_grad_()
    normed = F.layer_norm(w, (WIDTH,), weight, bias)
    inputs = (w, weight, bias)
    yield "layer norm backward", 3 * size, lambda: torch.autograd.grad(normed, inputs, y, retain_graph=True)
    yield "softmax", 2 * narrow.nbytes, lambda: narrow.softmax(-1)
    yield "sum of rows", narrow.nbytes, lambda: narrow.sum(0)


def adamw(device: torch.device) -> Pass:
    """The fused update: weight, gradient and two moments are read, all but the gradient written."""
    parameter = torch.nn.Parameter(torch.randn(ELEMENTS[device.type], device=device))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, fused=True)
    parameter.grad = torch.randn_like(parameter)
    return Pass("adamw", 7 * parameter.nbytes, timed(optimizer.step, device))


def operator(device: torch.device) -> Timed:
    """Seconds that one operator costs before it does anything, forward and backward passes of a chain taken together."""
    x = torch.ones(1, device=device, requires_grad=True)

    def chain() -> None:
        y: Tensor = x
        for _ in range(CHAIN):
            y = y * 1.0
        y.backward()

    once = timed(chain, device)
    return Timed(once.seconds / (2 * CHAIN), once.spread)


def call(device: torch.device, dtype: torch.dtype) -> Timed:
    """Seconds of a product of single numbers: nothing but the call."""
    one = torch.ones(1, 1, device=device).to(dtype)
    return timed(lambda: one @ one, device)
