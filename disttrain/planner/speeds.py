"""What a machine can do, as the planner asks: measured by `disttrain calibrate`, or from the table of devices (no torch).

`disttrain.planner.devices` makes one from the table, `disttrain.calibration` from measurements; `read` and `write` are the
file between the two. Fields with a default may be left out by whoever measures.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from disttrain.config.problems import Problem, RefusedInput

MEASURED = Path("~/.cache/disttrain/speeds.json")
"""Where `disttrain calibrate` leaves what it measured, and `disttrain plan --device measured` looks."""


class Link(NamedTuple):
    """One rank's end of a network: a message of n bytes takes latency_seconds + n / bytes_per_second (Hockney 1994)."""

    latency_seconds: float
    bytes_per_second: float
    """One direction, when all ranks of a host send at once."""


class Product(NamedTuple):
    """A matrix product (m x k) (k x n) and what was reached in it."""

    m: int
    n: int
    k: int
    flops_per_second: float


class Attention(NamedTuple):
    """Causal attention of many heads over one sequence length, and what was reached: 4 d S (S + 1) / 2 FLOPs forward and
    10 d S (S + 1) / 2 backward a head, d its size (Dao 2023, section 4.1: five products against two)."""

    sequence_length: int
    head_size: int
    forward_flops_per_second: float
    backward_flops_per_second: float


class MatrixUnit(NamedTuple):
    """A model of a product where none was measured: tiles of the result, dealt out to equal processors in waves
    (`disttrain.planner.kernels`)."""

    flops_per_second: float
    """Of the best product that anybody has measured on it; the datasheet's peak if nobody has."""
    processors: int
    """Streaming multiprocessors, or compute units."""


class Speeds(NamedTuple):
    """Of one rank's device in one precision, and of the links between ranks."""

    device: str
    source: str
    """Where the numbers come from: a measurement by `disttrain calibrate`, or a vendor's document."""
    precision: str
    """Of the products: fp64, fp32, bf16 or fp16."""
    products: tuple[Product, ...]
    """Points between which the planner interpolates; empty where there is a `unit`."""
    memory_bytes: float
    """What one rank may hold."""
    memory_bytes_per_second: float
    """Of elementwise operators: bytes read and written."""
    operator_seconds: float
    """What every operator costs before it does anything: dispatch on a CPU, a launch on a GPU."""
    ranks_per_host: int
    """Ranks 0 to ranks_per_host - 1 are on the first host, and so on."""
    at_full_speed: int
    """So many ranks of a host compute at full speed at a time; more share it (a CPU with few cores)."""
    inside: Link
    """Between ranks of a host."""
    between: Link
    """Between hosts."""
    accelerator: bool = False
    """Operators are handed over ahead, so that dispatch hides behind them; collectives run beside them, by NCCL or its like.
    False: a CPU with gloo, whose messages inside a host are work for the same cores, and which all-reduces where a
    reduce-scatter is asked for."""
    unit: MatrixUnit | None = None
    attention: tuple[Attention, ...] = ()
    """Of the fused kernel; empty: attention is counted as its products and its passes over the scores."""
    peak_flops_per_second: float | None = None
    """Dense peak that MFU is a share of; None where unknown, as of every CPU."""
    peak_source: str = "unknown"
    context_bytes: float = 0.0
    """Held by the device's runtime before the first tensor."""
    group_bytes: float = 0.0
    """Held by the communication library for every group of ranks."""
    collective_share: float = 0.0
    """Of an accelerator's processors that a collective keeps busy, so that what is computed beside it is slower."""
    notes: tuple[str, ...] = ()
    """What of this is assumed, for the reader of a plan."""


def write(path: Path, speeds: Speeds, details: Mapping[str, Any] | None = None) -> None:
    """As JSON, whole or not at all, beside those in other precisions that the file holds already; `details` of how they were
    measured are for people."""
    path = path.expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        kept = _entries(path)
    except (OSError, ValueError, TypeError):
        kept = {}
    kept.pop(speeds.precision, None)
    entries = {**kept, speeds.precision: {"speeds": speeds._asdict(), "details": dict(details or {})}}
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(entries, indent=1), encoding="utf-8")
    new.replace(path)


def read(path: Path, precision: str | None = None) -> Speeds:
    """What `write` wrote, last of all if no precision is named. Raises RefusedInput for a file that is not there, holds
    something else, or nothing in that precision."""
    path = path.expanduser()
    fix = "run `disttrain calibrate`, or name a device of the table or another file"
    try:
        entries = _entries(path)
        chosen = precision or list(entries)[-1]
        if chosen in entries:
            return _made(entries[chosen]["speeds"])
    except FileNotFoundError:
        raise RefusedInput([Problem((f"--device {path}",), "there is no such file", fix)]) from None
    except (OSError, ValueError, TypeError, LookupError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RefusedInput(
            [Problem((f"--device {path}",), f"it does not hold measured speeds: {reason}", fix)]
        ) from None
    message = f"it holds speeds in {', '.join(entries)} only"
    fix = f"run `disttrain calibrate --precision {chosen}`"
    raise RefusedInput([Problem((f"--device {path}", f"precision={chosen}"), message, fix)])


def _entries(path: Path) -> dict[str, Any]:
    """By precision, in the order in which they were written. Raises TypeError for other JSON."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(entries, dict) or not entries or not all("speeds" in one for one in entries.values()):
        raise TypeError("it has no speeds by precision")
    return entries


def _made(values: dict[str, Any]) -> Speeds:
    """Raises TypeError or ValueError where a field is missing, unknown or of another kind."""
    parts: dict[str, Any] = {
        **values,
        "products": tuple(Product(*point) for point in values["products"]),
        "attention": tuple(Attention(*point) for point in values.get("attention", ())),
        "inside": Link(*values["inside"]),
        "between": Link(*values["between"]),
        "unit": MatrixUnit(*values["unit"]) if values.get("unit") else None,
        "notes": tuple(values.get("notes", ())),
    }
    speeds = Speeds(**parts)
    positive = {
        name: value
        for name in ("memory_bytes", "memory_bytes_per_second", "ranks_per_host", "at_full_speed")
        if not (value := getattr(speeds, name)) > 0
    }
    if positive or not (speeds.products or speeds.unit):
        raise ValueError(f"{', '.join(positive) or 'products'} must be above zero")
    return speeds
