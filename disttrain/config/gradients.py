"""Settings of what data ranks send each other beside plain gradients: changes of weights, and what Horovod does."""

from typing import Annotated, Literal

from pydantic import Field

from disttrain.config.section import Fraction, NonNegative, Positive, Section


class OuterConfig(Section):
    """Local steps: workers update weights of their own and meet now and then (docs/compression.md).

    A worker is one data rank, or one replica of what ZeRO shards.
    """

    method: Literal["none", "average", "nesterov", "adasum"] = "none"
    """What becomes of the workers' changes when they meet. none: gradients are summed every step instead. average: their
    mean (local SGD, Stich 2019). nesterov: an outer optimizer takes their mean for its gradient (DiLoCo, Douillard et al.
    2023). adasum: they are combined pairwise (Maleki et al. 2021)."""
    every: Positive = 32
    """Steps between two meetings."""
    lr: Annotated[float, Field(gt=0)] = 0.7
    """Learning rate of nesterov."""
    momentum: Fraction = 0.9
    """Momentum of nesterov."""
    fragments: Positive = 1
    """Parts of the model that meet at different steps (streaming DiLoCo, Douillard et al. 2025)."""
    overlap: NonNegative = 0
    """Steps that go on while a fragment's changes travel."""
    mixing: Fraction = 0.5
    """Share of a worker's own weights that stays when the outer ones arrive late, after overlap."""


class HorovodConfig(Section):
    """How Horovod reduces gradients; for engine horovod only (docs/horovod.md).

    What is not given keeps Horovod's default, or what horovodrun was told.
    """

    transport: Literal["auto", "gloo", "mpi"] = "auto"
    """What carries the gradients; auto takes MPI where it started the ranks and Horovod was built with it, else gloo."""
    compression: Literal["none", "fp16"] = "none"
    """Send gradients as they are, or in half the bytes."""
    adasum: bool = False
    """Combine the ranks' updates by Adasum (Maleki et al. 2021) in place of a sum: another result by design. Needs MPI."""
    gradient_predivide: Annotated[float, Field(gt=0)] = 1.0
    """Divide gradients by this before the sum over the ranks instead of after it, against overflow in fp16."""
    fusion_threshold_mib: Annotated[float, Field(ge=0)] | None = None
    """Buffer in which small gradients travel together, MiB; 0 sends each alone. Horovod takes 128 when not given."""
    cycle_time_ms: Annotated[float, Field(gt=0)] | None = None
    """How long Horovod collects gradients before it sends them, milliseconds. Horovod takes 1 when not given."""
    timeline: bool = False
    """Write what Horovod did when to timeline.json in the run folder, for chrome://tracing."""
