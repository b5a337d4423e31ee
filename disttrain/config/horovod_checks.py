"""Checks of engine horovod: settings that contradict each other, the installation, and the launcher. No torch."""

import json
from collections.abc import Iterator, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from disttrain.config.problems import Problem
from disttrain.config.schema import Config
from disttrain.config.settings import given, setting

INSTALL = "run launchers/install_horovod.sh, which builds Horovod for this torch"
MPI_LAUNCHERS = ("openmpi", "mpich")


def problems(config: Config, world_size: int) -> list[Problem]:
    """What keeps Horovod from training this config on this many ranks, whoever starts them."""
    adasum = _adasum(config, world_size) if config.horovod.adasum else ()
    return [*adasum, *installation_problems()]


def _adasum(config: Config, world_size: int) -> Iterator[Problem]:
    if given(config, "horovod.gradient_predivide"):
        yield Problem(("horovod.adasum=true", setting(config, "horovod.gradient_predivide")),
                      "Adasum does not divide gradients", "remove horovod.gradient_predivide")  # fmt: skip
    if given(config, "horovod.compression"):
        yield Problem(("horovod.adasum=true", setting(config, "horovod.compression")),
                      "Adasum sends updates of the weights, which are too small for fp16",
                      "remove horovod.compression")  # fmt: skip
    if config.parallel.tensor > 1:
        yield Problem(("horovod.adasum=true", setting(config, "parallel.tensor")),
                      "Horovod's Adasum always combines all ranks", "use parallel.tensor=1")  # fmt: skip
    if config.horovod.transport == "gloo":
        yield Problem(("horovod.adasum=true", "horovod.transport=gloo"),
                      "Horovod has Adasum for MPI only", "use horovod.transport=mpi, and mpirun")  # fmt: skip
    if world_size & (world_size - 1):
        yield Problem(("horovod.adasum=true", f"world size {world_size}"),
                      "Horovod's Adasum needs a power of two of ranks", "start 2, 4, 8, ... ranks")  # fmt: skip


def installation_problems() -> list[Problem]:
    """Whether Horovod is there, with native code, and built for the torch that is installed."""
    spec = find_spec("horovod")
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    if not places:
        return [Problem(("engine=horovod",), "Horovod is not installed", INSTALL)]
    if not [library for place in places for library in place.glob("torch/mpi_lib*.so")]:
        return [Problem(("engine=horovod",), "Horovod is installed without its native code for torch", INSTALL)]
    try:
        built_for = json.loads((places[0] / "metadata.json").read_text()).get("pytorch")
    except (OSError, ValueError):
        built_for = None
    torch = metadata.version("torch")
    if built_for is not None and built_for != torch:
        return [Problem(("engine=horovod", f"torch {torch}"), f"Horovod was built for torch {built_for}", INSTALL)]
    return []


def launcher_problems(config: Config, launcher: str, environ: Mapping[str, str]) -> list[Problem]:
    """What the launcher of these ranks cannot give, and where its variables say something else than the config."""
    return [*_transport(config, launcher, environ), *_variables(config, environ)]


def offers_mpi(launcher: str, environ: Mapping[str, str]) -> bool:
    """Whether these processes were started as ranks of an MPI job."""
    return launcher in MPI_LAUNCHERS or (launcher == "srun" and "PMIX_RANK" in environ)


def _transport(config: Config, launcher: str, environ: Mapping[str, str]) -> Iterator[Problem]:
    asked = config.horovod.transport
    if (asked == "mpi" or config.horovod.adasum) and not offers_mpi(launcher, environ):
        because = "horovod.adasum=true" if config.horovod.adasum else "horovod.transport=mpi"
        yield Problem((because, f"launcher {launcher}"), "these ranks were not started by MPI, which this needs",
                      "start them with mpirun, horovodrun --mpi or srun --mpi=pmix")  # fmt: skip


def variables(config: Config) -> dict[str, str]:
    """The variables of Horovod's that stand for settings which were given."""
    horovod = config.horovod
    values: dict[str, str] = {}
    if horovod.fusion_threshold_mib is not None:
        values["HOROVOD_FUSION_THRESHOLD"] = str(round(horovod.fusion_threshold_mib * 2**20))
    if horovod.cycle_time_ms is not None:
        values["HOROVOD_CYCLE_TIME"] = str(horovod.cycle_time_ms)
    if horovod.timeline:
        values["HOROVOD_TIMELINE"] = str(Path(config.run.dir) / config.run.name / "timeline.json")
    return values


_SETTINGS = {
    "HOROVOD_FUSION_THRESHOLD": "horovod.fusion_threshold_mib",
    "HOROVOD_CYCLE_TIME": "horovod.cycle_time_ms",
    "HOROVOD_TIMELINE": "horovod.timeline",
}


def _variables(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    for name, value in variables(config).items():
        there = environ.get(name, "")
        if there and not _same(there, value):
            yield Problem((setting(config, _SETTINGS[name]), f"{name}={there}"),
                          "the launcher or the environment says something else than the config",
                          f"give one of them only: unset {name}, or remove {_SETTINGS[name]}")  # fmt: skip


def _same(there: str, value: str) -> bool:
    try:
        return float(there) == float(value)
    except ValueError:
        return there == value
