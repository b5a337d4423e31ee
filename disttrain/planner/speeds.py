"""What a machine can do, as the planner asks: measured by `disttrain calibrate`, or from the table of devices (no torch)."""

from typing import NamedTuple


class Link(NamedTuple):
    """One rank's end of a network: a message of n bytes takes latency_seconds + n / bytes_per_second (Hockney 1994)."""

    latency_seconds: float
    bytes_per_second: float
    """One direction."""


class Product(NamedTuple):
    """A matrix product (m x k) (k x n) and what was reached in it."""

    m: int
    n: int
    k: int
    flops_per_second: float


class Speeds(NamedTuple):
    """Of one rank's device in one precision, and of the links between ranks."""

    device: str
    source: str
    """Where the numbers come from: a file that `disttrain calibrate` wrote, or a vendor's document."""
    precision: str
    """Of the products: fp64, fp32, bf16 or fp16."""
    products: tuple[Product, ...]
    """Points between which the planner interpolates."""
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
