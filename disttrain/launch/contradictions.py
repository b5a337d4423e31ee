"""What cannot be true at once in the environment of one process."""

from disttrain.launch.launchers import ENV, HOROVODRUN, SRUN, TORCHRUN, View
from disttrain.launch.reader import Reader


def check_unknown_launcher(reader: Reader) -> None:
    """Refuse signs of a world whose size nobody tells."""
    if reader.has("PMIX_RANK"):
        reader.refuse(
            ["PMIX_RANK", "OMPI_COMM_WORLD_SIZE"],
            "a PMIx launcher started this process without telling the size of the world.",
            "Start with mpirun of Open MPI, or export RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and "
            "MASTER_PORT for each process.",
        )
    rank, world_size, local_rank = (reader.integer(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if rank or local_rank or (world_size is not None and world_size != 1):
        reader.refuse(
            ["RANK", "WORLD_SIZE", "LOCAL_RANK"],
            "a part of a world: no launcher gave this process both a rank and a world size, so that every process "
            "would take itself for rank 0 of 1.",
            "Unset what is exported, or start through a launcher (srun, mpirun, torchrun, ...) that sets all of it.",
        )


def check_nesting(reader: Reader, views: list[View]) -> None:
    """Refuse a launcher around another one where this starts several worlds; `views` has the innermost first."""
    inner = views[0]
    for outer in views[1:]:
        if outer.world_size is None or outer.world_size <= 1 or not _multiplied(inner, outer):
            continue
        reader.refuse(
            [outer.names.world_size, inner.names.nodes or inner.names.world_size],
            f"two nested launchers: {outer.names.command} started {outer.world_size} processes and "
            f"{inner.names.command} a world of {inner.world_size} around each, so that separate worlds would train "
            "the same run.",
            _how_to_start_one_world(inner, outer),
        )


def _multiplied(inner: View, outer: View) -> bool:
    """Whether the outer launcher starts several worlds of the inner one."""
    if inner.names.agents:
        return inner.nodes == 1 or outer.names is HOROVODRUN
    same_place = (inner.rank, inner.world_size) == (outer.rank, outer.world_size)
    # mpirun and mpiexec start one daemon a node through srun; these are not tasks that the user asked for.
    daemons = outer.names is SRUN and inner.nodes != 1
    return not same_place and not daemons


def _how_to_start_one_world(inner: View, outer: View) -> str:
    """Say what to do about nested launchers."""
    drop = f"Use one launcher: drop {inner.names.command} or {outer.names.command}."
    if inner.names is TORCHRUN and outer.names is not HOROVODRUN:
        return (
            f"{drop} Or start one torchrun a node, with --nnodes, --rdzv-backend c10d, --rdzv-id and --rdzv-endpoint."
        )
    return drop


def check_torch_variables(reader: Reader, view: View) -> None:
    """Refuse RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE that say something else than the launcher."""
    names = view.names
    if names.agents or names is ENV:
        return
    pairs = [
        (ENV.rank, names.rank, view.rank),
        (ENV.world_size, names.world_size, view.world_size),
        (ENV.local_rank, names.local_rank, view.local_rank),
        (ENV.local_world_size, names.local_world_size, view.local_world_size),
    ]
    differing = [pair for pair in pairs if pair[2] is not None and reader.integer(pair[0]) not in (None, pair[2])]
    if not differing:
        return
    message = f"{names.command} says one thing and torch's variables another."
    if (view.world_size or 0) > 1 and reader.integer(ENV.world_size) == 1:
        message = f"{names.command} started {view.world_size} processes, but each is told to be rank 0 of 1."
    elif differing[0][0] == ENV.rank and reader.integer(ENV.rank) == 0:
        message = f"{names.command} started {view.world_size} processes, but each is told to be rank 0."
    exported = ", ".join(pair[0] for pair in differing)
    reader.refuse(
        [name for pair in differing for name in pair[:2]],
        message,
        f"Unset {exported} before starting: {names.command} tells each process its rank.",
    )


def check_ranges(reader: Reader, view: View) -> None:
    """Refuse ranks outside their worlds."""
    names = view.names
    for name, value, size_name, size in (
        (names.rank, view.rank, names.world_size, view.world_size),
        (names.local_rank, view.local_rank, names.local_world_size, view.local_world_size),
        (names.node_rank, view.node_rank, names.nodes, view.nodes),
    ):
        if value is not None and size is not None and value >= size:
            reader.refuse(
                [name, size_name],
                f"rank {value} does not exist in a world of {size}: ranks count from 0.",
                f"Correct {name} or {size_name}, or let the launcher set both.",
            )
    for name, size in ((names.local_world_size, view.local_world_size), (names.nodes, view.nodes)):
        if size is not None and view.world_size is not None and size > view.world_size:
            reader.refuse(
                [name, names.world_size],
                f"{size} is more than the {view.world_size} processes of the whole world.",
                f"Correct {name} or {names.world_size}, or let the launcher set both.",
            )
    if view.world_size == 0 or view.local_world_size == 0:
        reader.refuse([names.world_size, names.local_world_size], "a world has at least one process.",
                      "Correct the size, or let the launcher set it.")  # fmt: skip
