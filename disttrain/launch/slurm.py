"""Slurm's notations: host lists, tasks per node, step numbers."""

import re

from disttrain.launch.reader import Reader

# Steps that srun did not start are numbered from the top: extern, batch script and interactive shell (slurm.h).
_FIRST_SPECIAL_STEP = 0xFFFFFFF0


def is_srun_step(reader: Reader) -> bool:
    """Whether srun started this process: a batch script has SLURM_PROCID too, but no step of its own."""
    step = reader.integer("SLURM_STEP_ID")
    return step is not None and step < _FIRST_SPECIAL_STEP and reader.has("SLURM_PROCID")


def expand_hostlist(hostlist: str) -> list[str]:
    """Expand, for example, `node[01-03,07],gpu5`, in order. Raises ValueError when malformed."""
    hosts: list[str] = []
    words = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", hostlist)
    if not words or ",".join(words) != hostlist:
        raise ValueError(f"not a host list: {hostlist!r}")
    for word in words:
        expanded = [""]
        for literal, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", word):
            expanded = [head + tail for head in expanded for tail in ([literal] if literal else _numbers(ranges))]
        hosts += expanded
    return hosts


def _numbers(ranges: str) -> list[str]:
    """Expand the inside of brackets: `01-03,07` is 01, 02, 03, 07 (zero padding kept)."""
    numbers: list[str] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"not a range of numbers: {part!r}")
        first, last = match[1], match[2] or match[1]
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def tasks_on_node(reader: Reader, name: str, node: int) -> int | None:
    """Tasks on one node of this step, from a variable like `2(x3),1`; None when not told, a Problem if malformed."""
    counts: list[int] = []
    for part in reader.text(name).split(",") if reader.has(name) else []:
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            reader.refuse([name], "this is not Slurm's notation of tasks per node.", f"Correct {name}.")
            return None
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[node] if node < len(counts) else None
