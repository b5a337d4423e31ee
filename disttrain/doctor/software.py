"""Versions of what trains, and what optional packages were built with."""

import importlib.util
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from disttrain import __version__

OPTIONAL = {
    "deepspeed": "pip install 'disttrain[deepspeed]'",
    "horovod": "launchers/install_horovod.sh",
    "mpi4py": "pip install mpi4py",
    "wandb": "pip install 'disttrain[wandb]'",
    "tensorboard": "pip install 'disttrain[tensorboard]'",
    "datasets": "pip install 'disttrain[hf]'",
    "transformers": "pip install 'disttrain[hf]'",
}
"""Packages that disttrain uses where they are installed, and how to install them."""


_PARTS_OF_HOROVOD = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
print(*(part for part in ("mpi", "gloo", "nccl") if getattr(library, f"horovod_{part}_built")()))
"""


def versions(with_gpus: bool) -> dict[str, str]:
    """Of python, torch, cuda, nccl and disttrain; empty where there is none."""
    import torch
    import torch.cuda.nccl
    import torch.distributed as dist

    nccl = ".".join(map(str, torch.cuda.nccl.version())) if with_gpus and dist.is_nccl_available() else ""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "nccl": nccl,
        "disttrain": __version__,
    }


def package_version(name: str) -> str:
    """Version of an installed package; empty when there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def horovod_built() -> tuple[str, ...]:
    """What this Horovod was built with, of mpi, gloo and nccl; nothing where it is missing or has no native code."""
    # Without its build flags an install succeeds and gives Python files only.
    spec = importlib.util.find_spec("horovod")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    library = next((file for folder in folders for file in folder.glob("torch/mpi_lib*.so")), None)
    if library is None:
        return ()
    # Elsewhere: Horovod asks MPI on its import, which ends a process where MPI has ended already. Its library finds torch's
    # beside it, so that nothing has to be imported.
    words = [sys.executable, "-I", "-S", "-c", _PARTS_OF_HOROVOD, str(library)]
    probe = subprocess.run(words, capture_output=True, text=True, timeout=120)
    return tuple(probe.stdout.split()) if probe.returncode == 0 else ()  # built for another torch, or libmpi is gone


def mpi_library() -> str:
    """The MPI library that mpi4py finds, which is not started; empty when there is none."""
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError):
        return ""
    return " ".join(MPI.Get_library_version().splitlines()[0].strip("\0").split(",")[0].split())
