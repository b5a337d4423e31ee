"""What happens to a run that is hit, measured: the table at the top of docs/faults.md.

``python -m tests.faults.table`` strikes every fault once and prints the table; ``--write`` puts it into the page.
"""

import argparse
import os
import re
import tempfile
from datetime import date
from pathlib import Path

import psutil
import torch

from tests.faults.cases import CASES, refused_here
from tests.faults.job import ROOT
from tests.faults.place import Place, Row

PAGE = ROOT / "docs" / "faults.md"
BEGIN, END = "<!-- python -m tests.faults.table --write -->\n", "<!-- end -->\n"
HEAD = """| fault | noticed by | after, s | exit code | what the run then gave | steps done again |
|---|---|--:|--:|---|--:|
"""


ELSEWHERE = {
    "a node of a Slurm job dies, or the job is preempted": Row(
        "Slurm", None, "", "queued again by itself, resumed exactly (`tests/cluster`)"
    ),
    "a rank killed, horovodrun elastic": Row(
        "Horovod", None, "", "the others went on from the newest checkpoint (`tests/engines`)"
    ),
}
"""What other tests hold to."""


def line(fault: str, row: Row | str) -> str:
    """A line of the table, or why there is none."""
    if isinstance(row, str):
        return f"| {fault} | {row} |  |  |  |  |\n"
    seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
    again = "" if row.again is None else row.again
    return f"| {fault} | {row.noticed} | {seconds} | {row.exit_code} | {row.gave} | {again} |\n"


def documented(page: str) -> dict[str, tuple[str, str, str]]:
    """What the page says of each fault: noticed by what, exit code, and what the run gave."""
    rows = (
        re.split(r" *\| *", text)[1:-1] for text in page.split(BEGIN)[1].split(END)[0].splitlines() if text[:1] == "|"
    )
    return {fault: (noticed, code, gave) for fault, noticed, _, code, gave, _ in rows}


def measured(folder: Path, wanted: str) -> str:
    """The lines of the faults whose names contain a word; prints each when it is there."""
    place, lines = Place(folder), []
    for number, (fault, case) in enumerate(CASES.items()):
        if wanted in fault:
            lines.append(line(fault, refused_here(case) or case.strike(place, f"hit_{number}")))
            print(lines[-1], end="", flush=True)
    return "".join([*lines, *(line(fault, row) for fault, row in ELSEWHERE.items())])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/faults.md")
    parser.add_argument("--only", default="", help="a word of the faults that are wanted")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="disttrain-faults-") as name:
        lines = measured(Path(name), asked.only)
    memory = psutil.virtual_memory().total / 2**30
    machine = (
        f"{os.cpu_count()} CPU cores, {memory:.0f} GiB, no GPU, torch {torch.__version__}, {date.today().isoformat()}"
    )
    if asked.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\nMeasured on {machine}:\n\n{HEAD}{lines}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
