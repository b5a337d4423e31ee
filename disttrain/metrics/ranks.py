"""Readings that differ between ranks (memory, traffic, waiting), and their reduction to the worst rank."""

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

PROC_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class RankReading:
    """What one rank says of itself at a step record. Plain numbers, so that it travels between processes."""

    rank: int
    peak_allocated_bytes: int | None = None
    """Most device memory held by tensors since the process started; None on a CPU."""
    peak_reserved_bytes: int | None = None
    """Most device memory held by the allocator since the process started; None on a CPU."""
    host_rss_bytes: int | None = None
    """Most resident host memory of the process since it started."""
    host_rss_current_bytes: int | None = None
    """Resident host memory of the process now."""
    comm_bytes: int = 0
    """Bytes handed to collectives since the last step record."""
    comm_bytes_uncompressed: int = 0
    """The same, had nothing been compressed."""
    data_seconds: float = 0.0
    """Time spent waiting for data since the last step record."""
    pipeline_busy_seconds: float | None = None
    """Time in which this rank's stages computed since the last step record; None without pipeline stages."""
    pipeline_seconds: float | None = None
    """Time inside the pipeline's schedule since the last step record; None without pipeline stages."""
    wire_bytes: float = 0.0
    """Bytes that left this rank since the last step record, with rings."""
    compute_seconds: float | None = None
    """Time of forward passes, or in which stages computed, since the last step record; None where it is not known."""
    energy_joules: float | None = None
    """Energy of the steps since the last step record of what this rank reads; None where it is not known."""
    stage: int = 0
    """Pipeline rank: ranks with the same one compute the same."""
    host: str = ""
    """Name of the machine."""

    @property
    def own_seconds(self) -> float:
        """Time this rank took since the last step record for what it does by itself."""
        return self.data_seconds + (self.compute_seconds or 0.0)


def read_rank(rank: int, device_type: str, **counters: Any) -> RankReading:
    """Memory of this process on `device_type` ("cpu" or "cuda"); `counters` are the fields that the caller keeps."""
    allocated = reserved = None
    if device_type == "cuda":
        import torch

        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    peak, current = host_rss_bytes()
    return RankReading(rank, allocated, reserved, peak, current, **counters)


def host_rss_bytes(status: Path = PROC_STATUS) -> tuple[int, int]:
    """(peak, current) resident bytes of this process.

    The peak is VmHWM where the kernel gives it: `ru_maxrss` survives exec on Linux, so a small process started by a
    large one would report the large one's peak.
    """
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if line.startswith("Vm"))
        if "VmHWM" in lines and "VmRSS" in lines:
            return int(lines["VmHWM"].split()[0]) * 1024, int(lines["VmRSS"].split()[0]) * 1024
    import psutil

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, psutil.Process().memory_info().rss


def reduce_ranks(readings: Sequence[RankReading], interval_steps: int = 1) -> dict[str, Any]:
    """The worst rank of every reading, as keys of a step record; null where no rank has one. The bubble is over all.

    Counters since the last record become means per step. The lowest rank is named when several are equal.
    Raises ValueError when there is no reading.
    """
    if not readings:
        raise ValueError("at least one rank has to be read")
    record: dict[str, Any] = {}
    for field in ("peak_allocated_bytes", "peak_reserved_bytes", "host_rss_bytes", "host_rss_current_bytes"):
        known = [(getattr(r, field), -r.rank) for r in readings if getattr(r, field) is not None]
        most, rank = max(known, default=(None, None))
        record[f"{field}_max"] = most
        if field != "host_rss_current_bytes":
            record[f"{field}_max_rank"] = None if rank is None else -rank
    record["comm_bytes_per_step"] = max(r.comm_bytes for r in readings) / interval_steps
    record["comm_bytes_uncompressed_per_step"] = max(r.comm_bytes_uncompressed for r in readings) / interval_steps
    record["wire_bytes_per_step"] = max(r.wire_bytes for r in readings) / interval_steps
    record["data_seconds"] = max(r.data_seconds for r in readings) / interval_steps
    own, rank = max((r.own_seconds, -r.rank) for r in readings)
    record |= {"own_seconds_max": own / interval_steps, "own_seconds_max_rank": -rank}
    record["own_seconds_median"] = median(r.own_seconds for r in readings) / interval_steps
    record["pipeline_bubble_fraction"] = _bubble(readings)
    return record


def _bubble(readings: Sequence[RankReading]) -> float | None:
    """Share of the ranks' time in the schedule during which they did not compute; None where no rank has stages."""
    busy = sum(r.pipeline_busy_seconds or 0.0 for r in readings)
    seconds = sum(r.pipeline_seconds or 0.0 for r in readings)
    return 1 - busy / seconds if seconds > 0 else None
