"""int8 weights with one scale a row, multiplied by inputs of a byte: dynamic, static, and what training rounded for.

A weight is q scale, q a whole number from -127 to 127 and the scale its row's largest magnitude / 127. An input is rounded
to 63 steps either way of its own position's largest magnitude (dynamic), or to 127 steps between bounds that calibration
found for the layer (static; Jacob et al. 2018, section 2.1). These steps are of 7 bits so that no CPU's sums of two
products of bytes overflow. The products are oneDNN's on plain tensors, those to which torch's compiler lowers quantised
models on CPUs: `torch.ao.quantization` and torch's quantised tensors are deprecated, and torchao's eager tensors end in
`torch._int_mm`, which takes a hundred times as long on a CPU without int8 instructions. Norms, biases and the residual
stream stay float32.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from disttrain.config.schema import ModelConfig
from disttrain.models import Model, model_class
from disttrain.models.rounding import INPUT_STEPS, WEIGHT_STEPS, row_scales

SCALE = ".scale"
"""Ends the name of the scales of a matrix."""
MIDDLE = 64
"""The byte of an input of 0 (dynamic)."""
BYTE_STEPS = 127
"""Steps between the bounds of inputs (static)."""


class Bounds(NamedTuple):
    """Of the inputs of a linear layer; 0 is always between them."""

    low: float
    high: float

    @property
    def step(self) -> float:
        """Distance of two values."""
        return (self.high - self.low) / BYTE_STEPS or 1.0

    @property
    def zero(self) -> int:
        """The byte of 0."""
        return round(-self.low / self.step)


def quantize(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every matrix [O, I] as int8 and its scales float32 [O] under `NAME.scale`; all else float32."""
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        if value.ndim < 2:
            found[name] = value.float()
            continue
        scale = row_scales(value.float(), WEIGHT_STEPS)
        found[name] = (value.float() / scale).round().to(torch.int8)
        found[name + SCALE] = scale.squeeze(-1)
    return found


class Int8Linear(nn.Module):
    """y = x W^T + b with int8 W [O, I], for inputs float32 [..., I]."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, bounds: Bounds | None):
        super().__init__()
        self.bias, self.bounds = bias, bounds
        self.scale, self.zeros = scale, torch.zeros(len(scale), dtype=torch.int32)
        self.packed = torch.ops.onednn.qlinear_prepack(weight, None)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., I] -> float32 [..., O]."""
        rows = x.flatten(0, -2)
        if self.bounds is not None:
            step, zero = self.bounds.step, self.bounds.zero
            inputs = (rows / step).round_().add_(zero).clamp_(0, BYTE_STEPS).to(torch.uint8)
            return self._product(inputs, step, zero, self.bias).unflatten(0, x.shape[:-1])
        scale = row_scales(rows, INPUT_STEPS)
        inputs = (rows / scale).round_().add_(MIDDLE).to(torch.uint8)
        y = self._product(inputs, 1.0, MIDDLE, None).mul_(scale)
        return (y if self.bias is None else y.add_(self.bias)).unflatten(0, x.shape[:-1])

    def _product(self, inputs: Tensor, step: float, zero: int, bias: Tensor | None) -> Tensor:
        """(inputs - zero) step times the weights, plus the bias: uint8 [N, I] -> float32 [N, O]."""
        return torch.ops.onednn.qlinear_pointwise(
            inputs, step, zero, self.packed, self.scale, self.zeros, bias, 1.0, 0, torch.float32, "none", [], ""
        )


class Int8Embedding(nn.Module):
    """Rows of an int8 matrix [V, H], as float32."""

    def __init__(self, weight: Tensor, scale: Tensor):
        super().__init__()
        self.weight, self.scale = weight, scale

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> float32 [..., H]."""
        return self.weight[ids] * self.scale[ids].unsqueeze(-1)


def int8_model(config: ModelConfig, tensors: Mapping[str, Tensor], bounds: Mapping[str, Bounds]) -> Model:
    """The model of what `quantize` gave, in evaluation mode; layers with `bounds`, by name, are static, others dynamic.

    Raises KeyError for a tensor that is missing.
    """
    with torch.device("meta"):
        model = model_class(config)(config)
    for name, module in list(model.named_modules()):
        owner, _, leaf = name.rpartition(".")
        matrix = model.tied.get(f"{name}.weight", f"{name}.weight")
        if isinstance(module, nn.Linear):
            bias = None if module.bias is None else tensors[f"{name}.bias"]
            new = Int8Linear(tensors[matrix], tensors[matrix + SCALE], bias, bounds.get(name))
        elif isinstance(module, nn.Embedding):
            new = Int8Embedding(tensors[matrix], tensors[matrix + SCALE])
        else:
            continue
        setattr(model.get_submodule(owner), leaf, new)
    rest = {name: tensors[name] for name, _ in model.named_parameters()}
    model.load_state_dict(rest, assign=True)
    return model.requires_grad_(False).eval()


def calibrate(model: Model, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Bounds]:
    """The smallest and the largest input of every linear layer over these batches, 0 included, by name.

    Raises ValueError without batches.
    """
    with _watched(model.eval()) as seen, torch.no_grad():
        for batch in batches:
            model.scores(dict(batch))
    if not seen:
        raise ValueError("calibration needs at least one batch")
    return seen


@contextmanager
def _watched(model: Model) -> Iterator[dict[str, Bounds]]:
    """Bounds of inputs as they come by."""
    seen: dict[str, Bounds] = {}

    def look(name: str, x: Tensor) -> None:
        low, high = (float(bound) for bound in x.aminmax())
        before = seen.get(name, Bounds(0.0, 0.0))
        seen[name] = Bounds(min(before.low, low), max(before.high, high))

    def looks(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, inputs: look(name, inputs[0])

    handles = [
        module.register_forward_pre_hook(looks(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
