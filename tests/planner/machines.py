"""Machines for the planner's tests, with round numbers."""

from typing import Any

from disttrain.config.schema import Config
from disttrain.planner.speeds import Attention, Link, MatrixUnit, Product, Speeds

GPU = Speeds(
    device="gpu",
    source="a test",
    precision="bf16",
    products=(),
    memory_bytes=80e9,
    memory_bytes_per_second=2e12,
    operator_seconds=0.0,
    ranks_per_host=8,
    at_full_speed=8,
    inside=Link(3e-6, 3e11),
    between=Link(1e-5, 4e10),
    accelerator=True,
    unit=MatrixUnit(5e14, 100),
    attention=(Attention(1024, 64, 2e14, 1e14),),
    peak_flops_per_second=1e15,
    peak_source="a datasheet",
)


def even(rate: float, **values: Any) -> Speeds:
    """Every product and attention at one rate, and nothing else takes time."""
    nothing = Link(0.0, float("inf"))
    alike = {"products": (Product(1, 1, 1, rate),), "unit": None, "attention": (Attention(64, 64, rate, rate),)}
    return GPU._replace(
        **{**alike, "memory_bytes_per_second": float("inf"), "inside": nothing, "between": nothing, **values}
    )


def cpu(**values: Any) -> Speeds:
    """Two cores that gloo connects."""
    base = GPU._replace(
        device="cpu", precision="fp32", accelerator=False, unit=None, attention=(), products=(Product(64, 64, 64, 1e10),),
        memory_bytes=8e9, memory_bytes_per_second=1e10, operator_seconds=1e-5, ranks_per_host=8, at_full_speed=2,
        inside=Link(5e-5, 2e9), between=Link(1e-4, 1e8), peak_flops_per_second=None, peak_source="unknown",
    )  # fmt: skip
    return base._replace(**values)


def config(family: str = "gpt", **values: Any) -> Config:
    """A small model; `model`, `train`, ... as keyword arguments add to it."""
    model = {"family": family, "layers": 4, "hidden_size": 256, "heads": 4, "ffn_hidden_size": 1024, "max_positions": 64,
             "vocab_size": 512, "layer_norm_epsilon": 1e-5, **values.pop("model", {})}  # fmt: skip
    train = {"steps": 10, "global_batch_size": 16, **values.pop("train", {})}
    data = {"corpus": "python-docs", "sequence_length": 64, **values.pop("data", {})}
    return Config.model_validate({"model": model, "train": train, "data": data, "precision": "bf16", **values})
