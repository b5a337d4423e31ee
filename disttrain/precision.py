"""Arithmetic of forward and backward, and the dynamic loss scale as a plain state machine (Micikevicius et al. 2017)."""

from dataclasses import dataclass, replace

import torch

from disttrain.config.schema import LossScaleConfig, Precision
from disttrain.hardware import cpu_flags

COMPUTE_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def choose(requested: str, device_type: str) -> Precision:
    """The precision to use: the requested one, or for ``auto`` bf16 where the device multiplies it natively."""
    if requested != "auto":
        return requested  # type: ignore[return-value]
    if device_type == "cuda":
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp32"
    return "bf16" if cpu_flags() & {"amx_bf16", "avx512_bf16"} else "fp32"


def master_dtype(precision: Precision) -> torch.dtype:
    """Type of weights, gradients and optimizer state: fp64 for proofs, else fp32."""
    return torch.float64 if precision == "fp64" else torch.float32


def autocast(precision: Precision, device_type: str) -> torch.autocast:
    """The context of forward passes: matrix products in the compute type, reductions in fp32."""
    low = precision in ("bf16", "fp16")
    return torch.autocast(device_type, dtype=COMPUTE_DTYPE[precision] if low else None, enabled=low)


@dataclass(frozen=True)
class LossScale:
    """Dynamic loss scale: doubles after `growth_interval` good steps, halves on overflow, never below `minimum`."""

    value: float
    growth_interval: int
    minimum: float
    good_steps: int = 0

    @classmethod
    def start(cls, precision: Precision, config: LossScaleConfig) -> "LossScale":
        """The first state of a run; a constant 1 unless the precision is fp16."""
        if precision != "fp16":
            return cls(1.0, 0, 1.0)
        return cls(config.initial, config.growth_interval, config.minimum)

    @property
    def dynamic(self) -> bool:
        """Whether overflow is looked for at all."""
        return self.growth_interval > 0

    def after(self, overflow: bool) -> "LossScale":
        """The state after a step. Raises FloatingPointError for an overflow at the smallest scale."""
        if not self.dynamic:
            return self
        if overflow:
            if self.value <= self.minimum:
                raise FloatingPointError(
                    f"gradients overflow fp16 even at the smallest loss scale, {self.value:g}: the model diverged; "
                    "lower optim.lr, or use precision=bf16"
                )
            return replace(self, value=max(self.value / 2, self.minimum), good_steps=0)
        if self.good_steps + 1 >= self.growth_interval:
            return replace(self, value=self.value * 2, good_steps=0)
        return replace(self, good_steps=self.good_steps + 1)
