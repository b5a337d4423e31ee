"""What cannot be right about a world, seen from all its ranks together."""

from collections import defaultdict

from disttrain.config.problems import Problem
from disttrain.doctor.facts import RankFacts
from disttrain.launch import RankInfo


def contradictions(info: RankInfo, ranks: list[RankFacts]) -> list[Problem]:
    """Problems of the whole world: versions, devices, hosts."""
    return [*_versions(ranks), *_devices(ranks), *_places(info, ranks)]


def why_not_met(info: RankInfo, own: RankFacts) -> list[Problem]:
    """What on this rank explains that it did not meet the others: the interface, the loopback as master."""
    problems: list[Problem] = []
    named = own.variables.get("GLOO_SOCKET_IFNAME")
    up = f"interfaces that are up: {', '.join(own.interfaces)}"
    if named and not own.gloo_interface:
        problems.append(
            Problem(
                (f"GLOO_SOCKET_IFNAME={named}", f"host {own.host}", up),
                "there is no network interface of this name, or it is down, and gloo opens its sockets on it.",
                f"Set GLOO_SOCKET_IFNAME={own.master_interface or 'NAME'}, or unset it.",
            )
        )
    if info.nodes == 1 or info.local_world_size == info.world_size:
        return problems
    master = (f"MASTER_ADDR={info.master_address}", f"host {own.host}")
    if not own.master_interface:
        message = "this host has no route to the master address, or does not know the name."
        problems.append(Problem((*master, up), message, "Set MASTER_ADDR to an address of rank 0 in a common network."))
    elif own.master_is_loopback and info.node_rank != 0:
        message = "the master address means the own host here, where rank 0 is not."
        problems.append(Problem(master, message, "Set MASTER_ADDR to an address of rank 0 that all hosts reach."))
    if own.gloo_is_loopback:
        source = (
            f"GLOO_SOCKET_IFNAME={named}" if named else f"host name {own.host}, which resolves to {own.gloo_address}"
        )
        message = "gloo would listen on the loopback, where ranks of other hosts cannot reach it."
        common = own.master_interface if not own.master_is_loopback else ""
        problems.append(Problem((source, up), message, f"export GLOO_SOCKET_IFNAME={common or 'NAME'} on this host."))
    return problems


def notes(info: RankInfo, ranks: list[RankFacts]) -> list[str]:
    """What is not wrong but likely slow, or wrong with one engine only."""
    return [*_slow(info, ranks), *_networks(ranks), *_horovod(info, ranks[0])]


def _networks(ranks: list[RankFacts]) -> list[str]:
    """Interfaces that were hardly meant."""
    found: list[str] = []
    several = len(_by_host(ranks)) > 1
    for host, local in _by_host(ranks).items():
        own = local[0]
        if several and own.gloo_interface and own.master_interface and own.gloo_interface != own.master_interface:
            found.append(
                f"On {host} gloo speaks through {own.gloo_interface}, while the route to rank 0 is "
                f"{own.master_interface}: export GLOO_SOCKET_IFNAME for the faster one."
            )
        named = own.variables.get("NCCL_SOCKET_IFNAME")
        if named and not own.nccl_interfaces:
            found.append(f"NCCL_SOCKET_IFNAME={named} takes no interface of {host}: {', '.join(own.interfaces)}.")
    return found


def _horovod(info: RankInfo, own: RankFacts) -> list[str]:
    """A Horovod that was built without what this launcher needs."""
    if not own.packages.get("horovod"):
        return []
    if not own.horovod_built:
        return ["Horovod is installed without native code for this torch: run launchers/install_horovod.sh."]
    found: list[str] = []
    if "mpi" not in own.horovod_built and info.launcher in ("openmpi", "mpich"):
        found.append(
            "Horovod is built without MPI: with engine=horovod each process would be rank 0 of 1 under mpirun. Start "
            "with horovodrun, or build it again where MPI is installed."
        )
    if own.gpus and "nccl" not in own.horovod_built:
        found.append("Horovod is built without NCCL and would reduce GPU gradients through host memory.")
    return found


def _slow(info: RankInfo, ranks: list[RankFacts]) -> list[str]:
    """Threads, cores and devices that do not fit."""
    found: list[str] = []
    for host, local in _by_host(ranks).items():
        bound_to = {core for facts in local for core in facts.bound_to}
        threads = sum(facts.threads for facts in local)
        if len(local) > 1 and threads > len(bound_to):
            found.append(
                f"The {len(local)} ranks of {host} compute with {threads} threads on {len(bound_to)} cores: export "
                f"OMP_NUM_THREADS={max(1, len(bound_to) // len(local))}."
            )
        if info.launcher == "openmpi" and len(bound_to) < local[0].cores:
            found.append(
                f"mpirun bound the ranks of {host} to {len(bound_to)} of {local[0].cores} cores: add --bind-to none."
            )
        if local[0].gpus and local[0].device == "cpu":
            found.append(
                f"{host} shows {len(local[0].gpus)} GPUs to {len(local)} ranks: they would train on the CPU. Start as "
                "many ranks as there are GPUs."
            )
    return found


def _versions(ranks: list[RankFacts]) -> list[Problem]:
    """Ranks with different versions of anything that speaks to the other ranks."""
    problems: list[Problem] = []
    for name in ("disttrain", "torch", "python", "cuda", "nccl", "deepspeed", "horovod", "mpi4py", "MPI library"):
        holders: dict[str, list[int]] = defaultdict(list)
        for facts in ranks:
            version = {**facts.versions, **facts.packages, "MPI library": facts.mpi_library}.get(name, "")
            # Patch releases of Python work together.
            holders[".".join(version.split(".")[:2]) if name == "python" else version].append(facts.rank)
        if len(holders) > 1:
            settings = tuple(
                f"{name} {version or 'none'}: {_listed(held)}" for version, held in sorted(holders.items())
            )
            problems.append(
                Problem(settings, f"the ranks run different versions of {name}.", "Use one environment on all hosts.")
            )
    return problems


def _devices(ranks: list[RankFacts]) -> list[Problem]:
    """Ranks without a GPU beside ranks with one, and GPUs that are hidden from the ranks."""
    problems: list[Problem] = []
    without = [facts for facts in ranks if facts.device == "cpu"]
    if without and len(without) < len(ranks):
        settings = tuple(
            f"rank {facts.rank}: local rank {facts.local_rank} of {facts.host}, {len(facts.gpus)} GPUs"
            for facts in without[:8]
        )
        message = f"{len(without)} of {len(ranks)} ranks have no GPU while others have one."
        problems.append(Problem(settings, message, "Start at most as many local ranks as GPUs, or use run.device=cpu."))
    for host, local in _by_host(ranks).items():
        seen = {gpu.uuid for facts in local for gpu in facts.gpus}
        if len(seen) >= len(local) and all(len(facts.gpus) < len(local) for facts in local):
            settings = tuple(f"rank {facts.rank} of {host} sees {len(facts.gpus)} GPUs" for facts in local[:8])
            message = f"{host} has {len(seen)} GPUs, but each rank is shown a part of them, and takes the CPU."
            fix = (
                "Show every rank all GPUs of its host (srun: --gpus-per-node with --gpu-bind=none, no --gpus-per-task)."
            )
            problems.append(Problem(settings, message, fix))
    return problems


def _by_host(ranks: list[RankFacts]) -> dict[str, list[RankFacts]]:
    """Ranks of each host."""
    hosts: dict[str, list[RankFacts]] = defaultdict(list)
    for facts in ranks:
        hosts[facts.host].append(facts)
    return hosts


def _places(info: RankInfo, ranks: list[RankFacts]) -> list[Problem]:
    """Two ranks with one local rank on a host, and a number of hosts that is not the launcher's number of nodes."""
    problems: list[Problem] = []
    holders: dict[tuple[str, int], list[int]] = defaultdict(list)
    for facts in ranks:
        holders[facts.host, facts.local_rank].append(facts.rank)
    twice = {place: held for place, held in holders.items() if len(held) > 1}
    if twice:
        settings = tuple(f"{host}, local rank {local}: ranks {_listed(held)}" for (host, local), held in twice.items())
        problems.append(
            Problem(
                settings[:8],
                "several ranks of one host have the same local rank, and would use the same GPU.",
                "Start one agent of the launcher a host, or give all ranks of a host one numbering.",
            )
        )
    hosts = sorted({facts.host for facts in ranks})
    if info.nodes is not None and info.nodes != len(hosts):
        problems.append(
            Problem(
                (f"nodes {info.nodes}", f"hosts {', '.join(hosts[:8])}"),
                f"{info.launcher} tells of {info.nodes} nodes, but the {len(ranks)} ranks run on {len(hosts)} hosts.",
                "Check the launcher's host list and number of nodes, and that every host has its own name.",
            )
        )
    return problems


def _listed(ranks: list[int]) -> str:
    """Ranks as text, the first eight of many."""
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
