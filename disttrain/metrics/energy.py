"""Energy counters of the hardware: NVML's of a GPU, RAPL's of a host's processors. Imports no torch.

A meter's `joules` is a sum that only grows; differences of it are energies. Nothing is estimated from power or time: where
there is no counter, or none that this user may read, energy is unknown.
"""

import re
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")
ZONE = re.compile(r"intel-rapl:\d+(:\d+)?")
"""RAPL's zones by name of their folder, AMD's too. Those of `intel-rapl-mmio` are the same counters once more."""
COUNTED = ("package", "dram")
"""Zones that are added up: processors with all that is on them, and memory, which is not in these. `core` and `uncore` are
parts of a package, `psys` is the whole platform."""


class Meter(Protocol):
    """One rank's energy counters."""

    @property
    def source(self) -> str:
        """What is counted, for people."""
        ...

    def joules(self) -> float | None:
        """Energy since some moment; None where it cannot be read any more."""
        ...


class Rapl:
    """The counters of this host's processors (Linux's powercap), which wrap around."""

    def __init__(self, zones: list[Path]):
        """`zones`: folders with `name`, `energy_uj` and `max_energy_range_uj`. Raises OSError where one cannot be read."""
        self._zones = sorted(zones)
        names = [(zone / "name").read_text().strip() for zone in self._zones]
        self.source = f"RAPL of every host: {', '.join(names)}, other programs included"
        self._ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in self._zones]
        self._last = [self._read(zone) for zone in self._zones]
        self._microjoules = 0

    @staticmethod
    def _read(zone: Path) -> int:
        return int((zone / "energy_uj").read_text())

    def joules(self) -> float | None:
        """Energy since this meter was made; it must be read once in every wrap, some 20 minutes of a busy processor."""
        try:
            now = [self._read(zone) for zone in self._zones]
        except (OSError, ValueError):
            return None
        for before, value, whole in zip(self._last, now, self._ranges, strict=True):
            self._microjoules += value - before + (whole if value < before else 0)
        self._last = now
        return self._microjoules / 1e6


class Gpu:
    """NVML's total energy of one GPU's board."""

    source = "NVML total energy of every rank's GPU, without hosts"

    def __init__(self, nvml: Any, handle: Any):
        self._nvml, self._handle = nvml, handle

    def joules(self) -> float | None:
        """Energy since the driver was loaded."""
        try:
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3
        except self._nvml.NVMLError:
            return None


class ReadByAnother:
    """Of a rank whose host's counters another rank of it reads."""

    source = ""

    def joules(self) -> float | None:
        """Nothing."""
        return 0.0


def find_meter(gpu_uuid: str | None, local_rank: int, powercap: Path = POWERCAP) -> tuple[Meter | None, str]:
    """This rank's meter, None where there is none, and what it counts, or why it does not. `gpu_uuid` is that of the GPU it
    trains on, None on a CPU, where the first rank of a host reads for all."""
    if gpu_uuid is not None:
        return _gpu(gpu_uuid)
    if local_rank > 0:
        return ReadByAnother(), ""
    zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if ZONE.fullmatch(zone.name)]
    try:
        counted = [zone for zone in zones if (zone / "name").read_text().strip().startswith(COUNTED)]
        if not counted:
            return None, f"no energy counters in {powercap}"
        meter = Rapl(counted)
    except PermissionError:
        return None, "the energy counters of this host are for root only"
    except (OSError, ValueError) as error:
        return None, f"the energy counters of this host cannot be read: {error}"
    return meter, meter.source


def _gpu(uuid: str) -> tuple[Meter | None, str]:
    try:
        nvml = import_module("pynvml")
    except ImportError:
        return None, "the package nvidia-ml-py is not installed: pip install 'disttrain[gpu]'"
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError as error:
        return None, f"NVML counts no energy of this GPU: {error}"
    meter = Gpu(nvml, handle)
    return meter, meter.source


class Interval:
    """Energy of the steps since the last record: counters run on in evaluations and the like, which are left out."""

    def __init__(self, meter: Meter | None):
        self._meter, self._began = meter, None

    def begin(self) -> None:
        """A step begins; only the first after a record counts."""
        if self._meter is not None and self._began is None:
            self._began = self._meter.joules()

    def end(self) -> float | None:
        """Joules since the first step; None where they are not known."""
        began, self._began = self._began, None
        now = None if self._meter is None or began is None else self._meter.joules()
        return None if now is None or began is None else now - began
