"""Horovod's world: imported, started by whatever launcher made the ranks, and held to the world they are in."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch.distributed as dist

from disttrain.config import horovod_checks
from disttrain.config.problems import Problem, RefusedInput
from disttrain.config.schema import Config
from disttrain.launch import detect
from disttrain.parallel.collectives import gather_objects
from disttrain.parallel.groups import Groups, ranks_along


def start(config: Config, groups: Groups) -> tuple[Any, Any]:
    """Start Horovod on all ranks together: `horovod.torch`, and the process set of this rank's data group.

    torch's process group is there already. Raises RefusedInput where Horovod is missing or broken, or sees another world.
    """
    launcher = _launcher(groups)
    found = horovod_checks.launcher_problems(config, launcher, os.environ)
    hvd = None if found else _load(found)
    if found or hvd is None:
        raise RefusedInput(found)
    os.environ.update(horovod_checks.variables(config))
    sets = [hvd.ProcessSet(list(ranks)) for ranks in ranks_along(groups.mesh, ("replicate", "shard", "context"))]
    sets = sets if len(sets) > 1 else []  # one that holds every rank is there already
    again = hvd.is_initialized()  # a second engine in this process
    if again and sets:
        hvd.shutdown()
    met = launcher == "horovodrun" or _over_mpi(config, launcher, hvd)
    if not again or sets:
        with nullcontext() if met and not again else _meeting():
            hvd.init(process_sets=sets)
    seen, size = (hvd.rank(), hvd.size()), groups.world.size
    if seen != (groups.rank, size):
        hvd.shutdown()
        raise RefusedInput([Problem((f"Horovod rank {seen[0]} of {seen[1]}", f"rank {groups.rank} of {size}",
                                     f"launcher {launcher}"),
                                    "Horovod does not see the ranks that the launcher started: it was built for another MPI",
                                    "use horovod.transport=gloo, or build Horovod where mpicc is that of this mpirun "
                                    "(launchers/install_horovod.sh)")])  # fmt: skip
    return hvd, next((each for each in sets if each.included()), hvd.global_process_set)


def _launcher(groups: Groups) -> str:
    """Who started these ranks; "none" where they were forked from a process that a launcher started or none did."""
    info = detect(os.environ)
    return info.launcher if info.world_size == groups.world.size else "none"


def _load(found: list[Problem]) -> Any:
    """Horovod for torch; what keeps it from working is added to `found`."""
    found += horovod_checks.installation_problems()
    if found:
        return None
    try:
        import horovod.torch as hvd  # pyright: ignore[reportMissingImports]
    except Exception as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        found.append(Problem(("engine=horovod",), f"Horovod is broken: {reason}", horovod_checks.INSTALL))
        return None
    if not hasattr(hvd, "init") or not (hvd.gloo_built() or hvd.mpi_built()):
        found.append(Problem(("engine=horovod",), "Horovod's native code does not load", horovod_checks.INSTALL))
        return None
    return hvd


def _over_mpi(config: Config, launcher: str, hvd: Any) -> bool:
    """Whether MPI carries the gradients. Raises RefusedInput where it must and cannot, or Horovod has no gloo."""
    asked = config.horovod.transport
    needs = asked == "mpi" or config.horovod.adasum
    if needs and not hvd.mpi_built():
        because = "horovod.adasum=true" if config.horovod.adasum else "horovod.transport=mpi"
        fix = f"install an MPI with its mpicc (Debian: libopenmpi-dev) and {horovod_checks.INSTALL}"
        raise RefusedInput([Problem((because,), "this Horovod was built without MPI", fix)])
    mpi = needs or (asked == "auto" and hvd.mpi_built() and horovod_checks.offers_mpi(launcher, os.environ))
    if not mpi and not hvd.gloo_built():
        raise RefusedInput([Problem((f"launcher {launcher}",), "this Horovod was built without gloo",
                                    horovod_checks.INSTALL)])  # fmt: skip
    return mpi


@contextmanager
def _meeting() -> Iterator[None]:
    """Give Horovod's gloo what horovodrun would have given it: places, and a rendezvous server inside rank 0."""
    from horovod.runner.common.util.hosts import SlotInfo  # pyright: ignore[reportMissingImports]
    from horovod.runner.http.http_server import RendezvousServer  # pyright: ignore[reportMissingImports]

    server = RendezvousServer() if dist.get_rank() == 0 else None
    port = server.start() if server else 0
    everyone = gather_objects((socket.gethostname(), port))
    hosts = [host for host, _ in everyone]
    if server:
        server.init([SlotInfo(**place) for place in places(hosts)])
    dist.barrier()
    one_host = len(set(hosts)) == 1
    given = {
        "CONTROLLER": "gloo",
        "CPU_OPERATIONS": "gloo",
        "GLOO_RENDEZVOUS_ADDR": "127.0.0.1" if one_host else os.environ.get("MASTER_ADDR", hosts[0]),
        "GLOO_RENDEZVOUS_PORT": everyone[0][1],
        "GLOO_IFACE": os.environ.get("GLOO_SOCKET_IFNAME") or ("lo" if one_host else ""),
        **{name.upper(): value for name, value in places(hosts)[dist.get_rank()].items()},
    }
    before = dict(os.environ)
    os.environ.update({f"HOROVOD_{name}": str(value) for name, value in given.items()})
    try:
        yield
        dist.barrier()  # every rank has met the others
    finally:
        for name in given:  # a process started from here is no rank of Horovod's
            if f"HOROVOD_{name}" not in before:
                del os.environ[f"HOROVOD_{name}"]
        if server:
            server.stop()


def places(hosts: list[str]) -> list[dict[str, Any]]:
    """Horovod's place of each rank, from the host of each: cross ranks count the hosts that have this local rank."""
    local = [hosts[:rank].count(host) for rank, host in enumerate(hosts)]
    return [
        {
            "hostname": host,
            "rank": rank,
            "size": len(hosts),
            "local_rank": local[rank],
            "local_size": hosts.count(host),
            "cross_rank": local[:rank].count(local[rank]),
            "cross_size": local.count(local[rank]),
        }
        for rank, host in enumerate(hosts)
    ]
