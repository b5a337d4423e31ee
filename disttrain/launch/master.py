"""Where the ranks of a world meet: address and port of rank 0."""

import zlib

from disttrain.launch.launchers import ENV, HOROVODRUN, MPICH, OPENMPI, SRUN, View
from disttrain.launch.reader import Reader
from disttrain.launch.slurm import expand_hostlist

LOOPBACK = "127.0.0.1"
_TORCH_DEFAULT_PORT = 29500
# Below the ephemeral ports of Linux (from 32768), so that an outgoing connection cannot hold the port already.
_FIRST_PORT, _PORTS = 15000, 14000
_JOB_VARIABLES = {
    "srun": ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
    "openmpi": ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    "horovodrun": ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT"),
    # hydra names no job; a batch system may. A step number would differ between the first node and the others.
    "mpich": ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "SLURM_RESTART_COUNT"),
}
"""Variables that are equal on all ranks of a job and differ between jobs."""


def find_master(reader: Reader, view: View) -> tuple[str, int]:
    """Address and port of torch's store; ("", 0) and a Problem when they cannot be known."""
    if view.world_size == 1 and not reader.has("MASTER_ADDR"):
        return LOOPBACK, 0
    return _address(reader, view), _port(reader, view)


def _address(reader: Reader, view: View) -> str:
    """MASTER_ADDR, or this host when it is the only one, or the first host of an srun step."""
    address = reader.text("MASTER_ADDR")
    several_nodes = view.nodes != 1 and view.names in (SRUN, OPENMPI, MPICH)
    if several_nodes and (address in ("localhost", "::1") or address.startswith("127.")):
        reader.refuse(
            ["MASTER_ADDR", view.names.world_size, view.names.local_world_size],
            "every node would look for rank 0 on itself, since this address means the own host.",
            "Set MASTER_ADDR to the host name of rank 0.",
        )
    if address:
        return address
    if view.nodes == 1 and not view.names.agents and view.names is not ENV:
        return LOOPBACK
    # With --distribution=arbitrary the first host of the list need not run task 0.
    if view.names is SRUN and not reader.text("SLURM_DISTRIBUTION").startswith("arbitrary"):
        return _first_host(reader)
    start = {
        OPENMPI.launcher: "mpirun -x MASTER_ADDR=$(hostname) ... on the host of rank 0",
        MPICH.launcher: "mpiexec -genv MASTER_ADDR $(hostname) ... on the host of rank 0",
        HOROVODRUN.launcher: "MASTER_ADDR=$(hostname) horovodrun ... on the host of rank 0",
        SRUN.launcher: "MASTER_ADDR=HOST srun ...",
    }.get(view.names.launcher, "export MASTER_ADDR=HOST and MASTER_PORT=29500 for every process")
    reader.refuse(
        ["MASTER_ADDR"],
        f"{view.names.command} does not tell on which host rank 0 runs, so the ranks cannot meet.",
        f"Name the host of rank 0: {start}.",
    )
    return ""


def _first_host(reader: Reader) -> str:
    """Host of task 0 of an srun step."""
    name = "SLURM_STEP_NODELIST"
    try:
        return expand_hostlist(reader.text(name))[0]
    except ValueError as error:
        reader.refuse([name, "MASTER_ADDR"], f"{error}.", "Set MASTER_ADDR to the host name of rank 0.")
        return ""


def _port(reader: Reader, view: View) -> int:
    """MASTER_PORT, or a port that follows from the job's identity and so is the same on every rank."""
    if reader.has("MASTER_PORT"):
        port = reader.integer("MASTER_PORT")
        if port is not None and not (0 < port < 65536 or (port == 0 and view.world_size == 1)):
            reader.refuse(["MASTER_PORT"], "a TCP port is between 1 and 65535.", "Set a free port above 1023.")
        return port or 0
    if view.names.agents or view.names is ENV:
        reader.refuse(["MASTER_PORT"], "the ranks need a common port to meet on.", "Export MASTER_PORT, such as 29500.")
        return 0
    identity = [f"{name}={reader.text(name)}" for name in _JOB_VARIABLES[view.names.launcher] if reader.has(name)]
    if not identity:
        return _TORCH_DEFAULT_PORT
    return _FIRST_PORT + zlib.crc32(";".join(identity).encode()) % _PORTS
