"""What one rank knows about itself, and all ranks' facts on every rank."""

import importlib.util
import os
import platform
import shutil
import socket
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path

import psutil

from disttrain import __version__, hardware
from disttrain.launch import RankInfo

OPTIONAL = {
    "deepspeed": "pip install deepspeed",
    "horovod": "build it from source against this torch",
    "mpi4py": "pip install mpi4py",
    "wandb": "pip install 'disttrain[wandb]'",
    "tensorboard": "pip install 'disttrain[tensorboard]'",
    "datasets": "pip install 'disttrain[hf]'",
    "transformers": "pip install 'disttrain[hf]'",
}
"""Packages that disttrain uses where they are installed, and how to install them."""

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


def rank_facts(info: RankInfo) -> RankFacts:
    """Look at this process and its host."""
    import torch
    import torch.cuda.nccl
    import torch.distributed as dist

    gpus = _gpus()
    cores = os.cpu_count() or 1
    available = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(), "mpi": dist.is_mpi_available()}
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if gpus and available["nccl"] else ""
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
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda or "",
            "nccl": nccl,
            "disttrain": __version__,
        },
        packages={name: _package_version(name) for name in OPTIONAL},
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
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


def _package_version(name: str) -> str:
    """Version of an installed package, empty when there is none; says so when Horovod lacks its native code."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
    if name == "horovod":
        # Without its build flags an install succeeds and gives Python files only.
        spec = importlib.util.find_spec(name)
        folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
        if not any(folder.glob("torch/mpi_lib*.so") for folder in folders):
            return f"{version} without native code for torch"
    return version
