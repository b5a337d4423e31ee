"""Prints a diagnosis."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from disttrain.doctor.diagnosis import Diagnosis
from disttrain.doctor.facts import RankFacts
from disttrain.doctor.software import OPTIONAL

_GIB = 1024**3


def render(diagnosis: Diagnosis, console: Console) -> None:
    """Print launcher, ranks, versions, hardware, link speed, notes and problems."""
    if diagnosis.info is not None:
        _launcher(diagnosis, console)
    if diagnosis.ranks:
        _ranks(diagnosis.ranks, console)
        _host(diagnosis.ranks[0], console)
        _software(diagnosis.ranks[0], console)
    if diagnosis.links:
        _links(diagnosis, console)
    for note in diagnosis.notes:
        console.print(f"[yellow]note:[/] {escape(note)}")
    for problem in diagnosis.problems:
        console.print(f"[bold red]contradiction:[/] {escape('; '.join(problem.settings))}")
        console.print(f"  {escape(problem.message)}")
        console.print(f"  [green]fix:[/] {escape(problem.fix)}")
    if not diagnosis.problems:
        console.print("[green]No contradictions.[/]")


def _launcher(diagnosis: Diagnosis, console: Console) -> None:
    info = diagnosis.info
    if info is None:
        return
    number = info.nodes
    if number is None and len(diagnosis.ranks) == info.world_size:
        number = len({facts.host for facts in diagnosis.ranks})
    nodes = "an unknown number of nodes" if number is None else f"{number} node{'s' * (number != 1)}"
    world = f"world of {info.world_size} on {nodes}"
    meeting = f", meeting at {info.master_address}:{info.master_port}" if info.world_size > 1 else ""
    restarts = f", restart {info.restart_count}" if info.restart_count else ""
    console.print(f"[bold]launcher[/] {info.launcher}: {escape(world + meeting + restarts)}")
    gpus = bool(diagnosis.ranks) and all(facts.device != "cpu" for facts in diagnosis.ranks)
    console.print(f"[bold]backend[/] {'nccl on the GPUs, gloo on the CPU' if gpus else 'gloo'}")


def _ranks(ranks: list[RankFacts], console: Console) -> None:
    columns = ("rank", "host", "local rank", "device", "pid", "threads", "gloo speaks through")
    table = Table(*columns, title="ranks", title_justify="left")
    for facts in ranks:
        device = facts.device
        if device != "cpu":
            gpu = facts.gpus[int(device.removeprefix("cuda:"))]
            device = f"{device} {gpu.name}"
        numbers = (facts.rank, facts.local_rank, facts.pid, facts.threads)
        rank, local_rank, pid, threads = map(str, numbers)
        table.add_row(rank, escape(facts.host), local_rank, escape(device), pid, threads, escape(_interface(facts)))
    console.print(table)


def _interface(facts: RankFacts) -> str:
    """Name, address and speed of gloo's interface."""
    if not facts.gloo_interface:
        return "no interface"
    speed = facts.gloo_speed_megabits_per_second
    told = f", {speed:,} Mbit/s" if speed else ""
    return f"{facts.gloo_interface} {facts.gloo_address}{told}"


def _host(facts: RankFacts, console: Console) -> None:
    table = Table(
        "", "", title=f"host of rank {facts.rank}: {escape(facts.host)}", title_justify="left", show_header=False
    )
    bf16 = ", ".join(facts.cpu_flags) or "no native bf16"
    bound = f" (this process: {len(facts.bound_to)})" if len(facts.bound_to) < facts.cores else ""
    cores = f"{facts.cores} core{'s' * (facts.cores != 1)}{bound}"
    table.add_row("CPU", escape(f"{facts.cpu}, {cores}, {bf16}"))
    table.add_row("memory", f"{facts.memory_bytes / _GIB:.1f} GiB")
    table.add_row("disk free", f"{facts.disk_free_bytes / _GIB:.1f} GiB")
    for index, gpu in enumerate(facts.gpus):
        table.add_row(f"GPU {index}", escape(f"{gpu.name}, {gpu.memory_bytes / _GIB:.1f} GiB"))
    if not facts.gpus:
        table.add_row("GPU", "none")
    table.add_row("backends", ", ".join(facts.backends))
    table.add_row("interfaces", escape(", ".join(facts.interfaces)))
    table.add_row("route to rank 0", escape(facts.master_interface or "none"))
    if facts.gpus:
        table.add_row("NCCL's sockets", escape(", ".join(facts.nccl_interfaces) or "none"))
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "OMP_NUM_THREADS"):
        table.add_row(name, escape(facts.variables.get(name, "not set")))
    for name, value in facts.variables.items():
        if name not in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "OMP_NUM_THREADS"):
            table.add_row(name, escape(value))
    console.print(table)


def _software(facts: RankFacts, console: Console) -> None:
    table = Table("", "", title="versions", title_justify="left", show_header=False)
    for name, version in facts.versions.items():
        table.add_row(name, escape(version or "none"))
    parts = {"horovod": _built(facts), "mpi4py": f" with {facts.mpi_library or 'no MPI library'}"}
    for name, version in facts.packages.items():
        version += parts.get(name, "") if version else ""
        table.add_row(name, escape(version) if version else f"[dim]not installed: {escape(OPTIONAL[name])}[/]")
    console.print(table)


def _built(facts: RankFacts) -> str:
    """What Horovod was built with."""
    return f" with {', '.join(facts.horovod_built)}" if facts.horovod_built else " without native code for torch"


def _links(diagnosis: Diagnosis, console: Console) -> None:
    table = Table(
        "bytes", "time", "bus bandwidth", title=f"all-reduce, {diagnosis.links[0].backend}", title_justify="left"
    )
    for link in diagnosis.links:
        table.add_row(
            f"{link.message_bytes:,}",
            f"{link.seconds * 1e6:,.0f} us",
            "latency" if link.message_bytes < 1024 else f"{link.bus_bytes_per_second / 1e9:.3f} GB/s",
        )
    console.print(table)
    latency = min(diagnosis.links, key=lambda link: link.message_bytes)
    fastest = max(diagnosis.links, key=lambda link: link.bus_bytes_per_second)
    console.print(
        f"latency {latency.seconds * 1e6:,.0f} us ({latency.message_bytes} bytes), bandwidth "
        f"{fastest.bus_bytes_per_second / 1e9:.3f} GB/s ({fastest.message_bytes:,} bytes)"
    )
    console.print("bus bandwidth = 2 (n - 1) / n * bytes / seconds for n ranks; median time of the slowest rank")
