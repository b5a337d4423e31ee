"""What one rank knows about itself, and all ranks' facts on every rank."""

import os
import shutil
import socket
from dataclasses import asdict, dataclass, field, fields

import psutil

from disttrain import hardware
from disttrain.doctor.software import OPTIONAL, horovod_built, mpi_library, package_version, versions
from disttrain.launch import RankInfo, network

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_DEBUG", "OMP_NUM_THREADS",
             "CUDA_VISIBLE_DEVICES")  # fmt: skip
"""Variables that decide about network, threads and devices."""

CPU_FLAGS = ("avx512_bf16", "amx_bf16")
"""CPU features that multiply bf16 natively."""


@dataclass(frozen=True)
class Gpu:
    """One GPU that this rank sees."""

    name: str
    uuid: str
    memory_bytes: int


@dataclass(frozen=True)
class RankFacts:
    """What one rank knows about itself; sizes in bytes."""

    rank: int = 0
    local_rank: int = 0
    host: str = ""
    pid: int = 0
    device: str = "cpu"
    """Device this rank takes by default: its own GPU where the host has one for every local rank, else the CPU."""
    gpus: tuple[Gpu, ...] = ()
    cpu: str = ""
    cores: int = 1
    """Cores of the host."""
    bound_to: tuple[int, ...] = (0,)
    """Numbers of the cores this process may run on."""
    cpu_flags: tuple[str, ...] = ()
    threads: int = 1
    """Threads torch computes with."""
    memory_bytes: int = 0
    disk_free_bytes: int = 0
    """Free on the disk of the working directory."""
    backends: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    """python, torch, cuda, nccl, disttrain; empty where there is none."""
    packages: dict[str, str] = field(default_factory=dict)
    """Version of each optional package; empty where it is not installed."""
    variables: dict[str, str] = field(default_factory=dict)
    """VARIABLES that are set."""
    horovod_built: tuple[str, ...] = ()
    """What Horovod was built with, of mpi, gloo and nccl."""
    mpi_library: str = ""
    """The MPI library that mpi4py finds; empty when there is none."""
    interfaces: tuple[str, ...] = ()
    """Network interfaces that are up."""
    gloo_interface: str = ""
    """The one that gloo speaks through; empty where GLOO_SOCKET_IFNAME names none that is up."""
    gloo_address: str = ""
    gloo_speed_megabits_per_second: int | None = None
    """None where the driver does not tell."""
    gloo_is_loopback: bool = False
    """Whether this interface reaches the own host only."""
    nccl_interfaces: tuple[str, ...] = ()
    """Those that NCCL's sockets go through (InfiniBand verbs go their own way)."""
    master_interface: str = ""
    """The one with the route to the master address; empty when there is no route."""
    master_is_loopback: bool = False
    """Whether the master address means this host itself."""


def rank_facts(info: RankInfo) -> RankFacts:
    """Look at this process and its host."""
    import torch
    import torch.distributed as dist

    gpus = _gpus()
    cores = os.cpu_count() or 1
    available = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(), "mpi": dist.is_mpi_available()}
    gloo, route = network.gloo_interface(os.environ), network.route_to(info.master_address)
    return RankFacts(
        rank=info.rank,
        local_rank=info.local_rank,
        host=socket.gethostname(),
        pid=os.getpid(),
        device=f"cuda:{info.local_rank}" if len(gpus) >= info.local_world_size else "cpu",
        gpus=gpus,
        cpu=hardware.cpu_name(),
        cores=cores,
        bound_to=tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else tuple(range(cores)),
        cpu_flags=_cpu_flags(),
        threads=torch.get_num_threads(),
        memory_bytes=psutil.virtual_memory().total,
        disk_free_bytes=shutil.disk_usage(".").free,
        backends=tuple(name for name, present in available.items() if present),
        versions=versions(with_gpus=bool(gpus)),
        packages={name: package_version(name) for name in OPTIONAL},
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        horovod_built=horovod_built(),
        mpi_library=mpi_library(),
        interfaces=tuple(interface.name for interface in network.interfaces()),
        gloo_interface=gloo.name if gloo else "",
        gloo_address=gloo.addresses[0] if gloo else "",
        gloo_speed_megabits_per_second=gloo.speed_megabits_per_second if gloo else None,
        gloo_is_loopback=gloo.is_loopback if gloo else False,
        nccl_interfaces=network.nccl_interfaces(os.environ),
        master_interface=route.name if route else "",
        master_is_loopback=route.is_loopback if route else False,
    )


def gather_facts(own: RankFacts, world_size: int) -> list[RankFacts]:
    """Facts of all ranks, in order of rank, on every rank; the default process group is up.

    Plain dictionaries travel, and unknown keys are left out, so that ranks with different versions of disttrain
    still understand each other.
    """
    import torch.distributed as dist

    gathered: list[dict] = [{} for _ in range(world_size)]
    dist.all_gather_object(gathered, asdict(own))
    known = {entry.name for entry in fields(RankFacts)}
    ranks: list[RankFacts] = []
    for facts in gathered:
        values = {key: value for key, value in facts.items() if key in known}
        values["gpus"] = tuple(Gpu(**gpu) for gpu in values.get("gpus", ()))
        ranks.append(RankFacts(**values))
    return ranks


def _gpus() -> tuple[Gpu, ...]:
    import torch

    if not torch.cuda.is_available():
        return ()
    found = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return tuple(Gpu(gpu.name, str(gpu.uuid), gpu.total_memory) for gpu in found)


def _cpu_flags() -> tuple[str, ...]:
    """Which of CPU_FLAGS the CPU has; none where the system does not tell."""
    if not hardware.CPUINFO.exists():
        return ()
    lines = (line for line in hardware.CPUINFO.read_text().splitlines() if line.startswith("flags"))
    flags = next(lines, "").split()
    return tuple(flag for flag in CPU_FLAGS if flag in flags)
