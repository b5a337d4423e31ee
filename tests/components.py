"""Real components that some tests need: skipped, saying so, where one is missing, or failed where nothing may be."""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
"""Folder of the environment's commands."""

MPICH = BIN.parent / "mpich"
"""Beside the environment and not in it, where its mpirun and libmpi would hide those of Open MPI."""


def on_path(*commands: str) -> bool:
    """Whether all these commands are there."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return all(shutil.which(command, path=path) for command in commands)


def built_horovod() -> bool:
    """Whether Horovod is installed with its native code for torch; without build flags it is Python files only."""
    spec = find_spec("horovod")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    return any(True for folder in folders for _ in folder.glob("torch/mpi_lib*.so"))


PRESENT = {
    "mpirun": (lambda: on_path("mpirun.openmpi"), "apt-get install openmpi-bin"),
    "mpich": (lambda: (MPICH / "bin" / "mpiexec").exists(), f"pip install --no-deps --prefix {MPICH} mpich"),
    "mpi4py": (lambda: find_spec("mpi4py") is not None, "pip install mpi4py"),
    "slurm": (lambda: on_path("slurmctld", "slurmd", "munged", "sbatch", "srun"), "tests/cluster/install.sh"),
    "horovod": (built_horovod, "launchers/install_horovod.sh"),
    "deepspeed": (lambda: find_spec("deepspeed") is not None, "launchers/install_deepspeed.sh"),
    "namespaces": (
        lambda: sys.platform == "linux" and os.geteuid() == 0 and on_path("ip"),
        "run as root with iproute2",
    ),
    "wandb": (lambda: find_spec("wandb") is not None, "pip install 'disttrain[wandb]'"),
}
"""Name of a component: whether this machine has it, and how to get it."""


def need(name: str) -> None:
    """Go on only where the component is there: skip, or fail where DISTTRAIN_TEST_ALL=1 says that nothing is skipped."""
    present, install = PRESENT[name]
    if present():
        return
    reason = f"{name} is missing: {install}"
    if os.environ.get("DISTTRAIN_TEST_ALL") == "1":
        pytest.fail(reason)
    pytest.skip(reason)
