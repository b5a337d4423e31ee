"""Which launcher started this process: its environment variables become a `RankInfo`, or a list of contradictions.

Only variables are looked at: no network, no files, no torch. What each launcher really sets was recorded, see
`tests/unit/launch_environments`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from disttrain.launch.contradictions import check_nesting, check_ranges, check_torch_variables, check_unknown_launcher
from disttrain.launch.launchers import Launcher, complete, launchers_of, read_view
from disttrain.launch.master import LOOPBACK, find_master
from disttrain.launch.reader import Reader
from disttrain.launch.slurm import expand_hostlist

__all__ = ["Launcher", "RankInfo", "detect", "environment_for_torch", "expand_hostlist"]


@dataclass(frozen=True)
class RankInfo:
    """Place of this process in the world. Ranks and node ranks count from 0, sizes are numbers of processes."""

    launcher: Launcher
    """"none": a plain process. "env": somebody exported torch's own variables (RANK, WORLD_SIZE, ...)."""
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int | None
    """None when the launcher does not tell (mpirun over several nodes)."""
    nodes: int | None
    """Nodes of the world; None when the launcher does not tell."""
    master_address: str
    """Host of rank 0, where torch's rendezvous store listens."""
    master_port: int
    """TCP port of that store; 0 (any free one) in a world of one process."""
    restart_count: int = 0
    """How often this job was started before: torch's elastic restarts plus Slurm's requeues."""


def detect(environ: Mapping[str, str]) -> RankInfo:
    """Tell from `environ` which launcher started this process and where it stands in the world.

    It is one process when no launcher did, also in the body of an sbatch script or in a shell inside salloc. Raises
    `RefusedInput` with every `Problem` when the variables contradict each other or no master address can be known.
    """
    reader = Reader(environ)
    restarts = (reader.integer("TORCHELASTIC_RESTART_COUNT") or 0) + (reader.integer("SLURM_RESTART_COUNT") or 0)
    views = [read_view(reader, names) for names in launchers_of(reader)]
    if not views:
        check_unknown_launcher(reader)
        reader.raise_problems()
        return RankInfo("none", 0, 1, 0, 1, 0, 1, LOOPBACK, 0, restarts)
    check_nesting(reader, views)
    check_torch_variables(reader, views[0])
    view = complete(reader, views[0])
    check_ranges(reader, view)
    address, port = find_master(reader, view)
    reader.raise_problems()
    if view.rank is None or view.world_size is None or view.local_rank is None or view.local_world_size is None:
        raise AssertionError("a missing rank or size was not refused")
    ranks = (view.rank, view.world_size, view.local_rank, view.local_world_size)
    return RankInfo(view.names.launcher, *ranks, view.node_rank, view.nodes, address, port, restarts)


def environment_for_torch(info: RankInfo) -> dict[str, str]:
    """Give the variables that `torch.distributed.init_process_group("env://")` and its users read."""
    return {
        "RANK": str(info.rank),
        "WORLD_SIZE": str(info.world_size),
        "LOCAL_RANK": str(info.local_rank),
        "LOCAL_WORLD_SIZE": str(info.local_world_size),
        "MASTER_ADDR": info.master_address,
        "MASTER_PORT": str(info.master_port),
    }
