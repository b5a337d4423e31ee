"""Energy counters on made-up machines: which are added up, wrapping around, and what is said where there are none."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from disttrain.metrics import energy


def zone(folder: Path, name: str, called: str, microjoules: int = 0, whole: int = 1000) -> Path:
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "name").write_text(f"{called}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text(f"{whole}\n")
    return path


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """Two sockets, one with memory; parts, the platform, and the same counter by another way are there too."""
    zone(tmp_path, "intel-rapl:0", "package-0", 100)
    zone(tmp_path, "intel-rapl:0:0", "core", 1)
    zone(tmp_path, "intel-rapl:0:1", "dram", 10)
    zone(tmp_path, "intel-rapl:1", "package-1", 500)
    zone(tmp_path, "intel-rapl:2", "psys", 1)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 100)
    (tmp_path / "dtpm").mkdir()
    return tmp_path


def test_packages_and_memory_are_added_up_and_nothing_twice(host: Path) -> None:
    meter, source = energy.find_meter(None, 0, host)
    assert meter is not None
    assert source == meter.source == "RAPL of every host: package-0, dram, package-1, other programs included"
    assert meter.joules() == 0.0
    for name, microjoules in (("intel-rapl:0", 140), ("intel-rapl:0:1", 12), ("intel-rapl:0:0", 900)):
        (host / name / "energy_uj").write_text(str(microjoules))
    (host / "intel-rapl:1" / "energy_uj").write_text("501")
    assert meter.joules() == pytest.approx(43e-6)


def test_a_counter_wraps_around(host: Path) -> None:
    meter, _ = energy.find_meter(None, 0, host)
    assert meter is not None
    (host / "intel-rapl:1" / "energy_uj").write_text("20")  # 480 to the end, 20 behind it
    assert meter.joules() == pytest.approx(520e-6 - 0)
    (host / "intel-rapl:1" / "energy_uj").write_text("30")
    assert meter.joules() == pytest.approx(530e-6)


def test_one_rank_reads_for_its_host() -> None:
    meter, source = energy.find_meter(None, 1, Path("/nowhere"))
    assert meter is not None and meter.joules() == 0.0
    assert source == ""


def test_where_there_is_no_counter_it_is_said_why(tmp_path: Path, host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert energy.find_meter(None, 0, tmp_path / "nothing") == (None, f"no energy counters in {tmp_path / 'nothing'}")
    read_text = Path.read_text

    def denied(self: Path, *args, **kwargs) -> str:
        if self.name == "energy_uj":
            raise PermissionError(13, "denied")
        return read_text(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", denied)  # root may read anything
    assert energy.find_meter(None, 0, host) == (None, "the energy counters of this host are for root only")


def test_a_counter_that_goes_away_makes_energy_unknown(host: Path) -> None:
    meter, _ = energy.find_meter(None, 0, host)
    assert meter is not None
    interval = energy.Interval(meter)
    interval.begin()
    (host / "intel-rapl:0" / "energy_uj").unlink()
    assert interval.end() is None
    assert meter.joules() is None


def test_an_interval_begins_with_its_first_step(host: Path) -> None:
    meter, _ = energy.find_meter(None, 0, host)
    assert meter is not None
    interval = energy.Interval(meter)
    for microjoules in (110, 120, 130):
        interval.begin()  # the second and third step of the interval do not begin it anew
        (host / "intel-rapl:0" / "energy_uj").write_text(str(microjoules))
    assert interval.end() == pytest.approx(30e-6)
    (host / "intel-rapl:0" / "energy_uj").write_text("700")  # an evaluation
    interval.begin()
    (host / "intel-rapl:0" / "energy_uj").write_text("701")
    assert interval.end() == pytest.approx(1e-6)
    assert energy.Interval(None).end() is None


class NVMLError(Exception):
    pass


def nvml(joules: dict[str, int]) -> SimpleNamespace:
    def total(handle: str) -> int:
        if handle not in joules:
            raise NVMLError("not supported")
        return joules[handle]

    return SimpleNamespace(NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
                           nvmlDeviceGetTotalEnergyConsumption=total)  # fmt: skip


def test_a_gpu_tells_its_own_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = {"GPU-a": 5000}
    monkeypatch.setitem(sys.modules, "pynvml", nvml(counters))
    meter, source = energy.find_meter("GPU-a", 3)
    assert meter is not None and meter.joules() == 5.0
    assert source == "NVML total energy of every rank's GPU, without hosts"
    assert energy.find_meter("GPU-b", 0) == (None, "NVML counts no energy of this GPU: not supported")
    counters.clear()
    assert meter.joules() is None


def test_a_gpu_without_nvml_has_no_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy.find_meter("GPU-a", 0) == (
        None,
        "the package nvidia-ml-py is not installed: pip install 'disttrain[gpu]'",
    )
