"""The launchers, the variables in which each tells ranks and sizes, and what it says in a given environment."""

from dataclasses import dataclass
from typing import Literal

from disttrain.launch.reader import Reader
from disttrain.launch.slurm import is_srun_step, tasks_on_node

Launcher = Literal["none", "env", "local", "torchrun", "deepspeed", "horovodrun", "openmpi", "mpich", "srun"]


@dataclass(frozen=True)
class Names:
    """A launcher and its variables; empty where it has none."""

    launcher: Launcher
    command: str
    """What a user types."""
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str
    node_rank: str = ""
    nodes: str = ""
    agents: bool = False
    """It runs as one agent a node, often started by another launcher, and starts the ranks of its node."""


TORCHRUN = Names(
    *("torchrun", "torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("GROUP_RANK", "GROUP_WORLD_SIZE", True),
)
DEEPSPEED = Names(
    *("deepspeed", "deepspeed", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", True)
)
HOROVODRUN = Names(
    *("horovodrun", "horovodrun", "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    *("HOROVOD_CROSS_RANK", "HOROVOD_CROSS_SIZE"),
)
OPENMPI = Names(
    *("openmpi", "mpirun (Open MPI)", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    *("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
)
MPICH = Names("mpich", "mpiexec (MPICH)", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
SRUN = Names(
    *("srun", "srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    *("SLURM_NODEID", "SLURM_STEP_NUM_NODES"),
)
LOCAL_RANKS = "DISTTRAIN_LOCAL_RANKS"
"""Set, beside torch's variables, by `disttrain.local_ranks`: how many ranks it started."""
LOCAL = Names("local", "disttrain --nproc", "RANK", LOCAL_RANKS, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
ENV = Names("env", "RANK and WORLD_SIZE", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class View:
    """What one launcher says; None where it says nothing."""

    names: Names
    rank: int | None
    world_size: int | None
    local_rank: int | None
    local_world_size: int | None
    node_rank: int | None
    nodes: int | None


def launchers_of(reader: Reader) -> list[Names]:
    """Every launcher that left its variables, the innermost first."""
    torchrun = reader.has("TORCHELASTIC_RUN_ID")
    srun = is_srun_step(reader)
    found = [
        (reader.has(LOCAL_RANKS), LOCAL),
        (torchrun, TORCHRUN),
        (not torchrun and all(reader.has(name) for name in ("CROSS_RANK", "CROSS_SIZE", "RANK")), DEEPSPEED),
        (reader.has(HOROVODRUN.rank, HOROVODRUN.world_size), HOROVODRUN),
        (reader.has(OPENMPI.rank, OPENMPI.world_size), OPENMPI),
        # srun --mpi=pmi2 sets PMI_RANK too, but not hydra's local ranks.
        (reader.has(MPICH.rank, MPICH.world_size) and (not srun or reader.has(MPICH.local_rank)), MPICH),
        (srun, SRUN),
    ]
    names = [names for present, names in found if present]
    alone = reader.integer(ENV.world_size) == 1 and reader.integer(ENV.rank) == 0
    if not names and not alone and reader.has(ENV.rank) and reader.has(ENV.world_size):
        names = [ENV]
    return names


def read_view(reader: Reader, names: Names) -> View:
    """Read what one launcher says."""
    world_size = reader.integer(names.world_size)
    node_rank, nodes = reader.integer(names.node_rank), reader.integer(names.nodes)
    if names is SRUN:
        local_world_size = tasks_on_node(reader, names.local_world_size, node_rank or 0)
    else:
        local_world_size = reader.integer(names.local_world_size)
    if names is HOROVODRUN and nodes and local_world_size and nodes * local_world_size != world_size:
        # Horovod counts the nodes that have this local rank: all nodes only where each has as many slots.
        node_rank, nodes = None, None
    node_rank, nodes = _node(node_rank, nodes, world_size, local_world_size)
    ranks = (reader.integer(names.rank), world_size, reader.integer(names.local_rank), local_world_size)
    return View(names, *ranks, node_rank, nodes)


def complete(reader: Reader, view: View) -> View:
    """Take the local rank and size from torch's variables where the launcher has none; refuse what is still missing."""
    names, local_rank, local_world_size = view.names, view.local_rank, view.local_world_size
    if local_rank is None:
        local_rank = 0 if view.world_size == 1 else reader.integer(ENV.local_rank)
    if local_world_size is None:
        local_world_size = 1 if view.world_size == 1 else reader.integer(ENV.local_world_size)
    given = [(names.rank, "", view.rank), (names.world_size, "", view.world_size)]
    given += [(names.local_rank, ENV.local_rank, local_rank)]
    given += [(names.local_world_size, ENV.local_world_size, local_world_size)]
    for name, other, value in given:
        if value is None and not reader.has(name):
            export = f"export {other or name} in each" if other or names is ENV else "do not unset its variables"
            reader.refuse([name], f"{names.command} is in use, but this part of the rank is not told.",
                          f"Start every process through one launcher, or {export}.")  # fmt: skip
    node_rank, nodes = _node(view.node_rank, view.nodes, view.world_size, local_world_size)
    ranks = (view.rank, view.world_size, local_rank, local_world_size)
    return View(names, *ranks, node_rank, nodes)


def _node(
    node_rank: int | None, nodes: int | None, world_size: int | None, local_world_size: int | None
) -> tuple[int | None, int | None]:
    """Node rank and number of nodes; known without being told when the whole world is on this node."""
    if nodes is None and world_size is not None and world_size == local_world_size:
        return 0, 1
    return node_rank, nodes
