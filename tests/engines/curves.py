"""One small GPT, 20 steps, under every launcher and engine: the table of docs/engines.md.

``python -m tests.engines.curves`` runs all of it on this machine (real launchers, a real Slurm of two nodes; about ten
minutes on two cores) and writes the table anew between the markers of docs/engines.md. `tests/install.sh` installs what
it needs.
"""

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.cluster.conftest import Login
from tests.cluster.slurm import Cluster
from tests.launchers.conftest import LAUNCHERS, OPENMPI, Launcher, Place

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "engines.md"
BEGIN, END = "<!-- curves: python -m tests.engines.curves -->\n", "<!-- /curves -->\n"
CONFIG = ROOT / "configs" / "gpt_20_steps.yaml"
HEAD = ("launched by", "engine", "ranks", "loss, step 1", "loss, step 20", "held-out loss", "largest difference")

HOROVOD_MPI = Launcher("horovodrun.sh", "--mpi -np 2", ("horovod", "mpirun"), OPENMPI)
LOCAL: list[tuple[str, str, Launcher | None, list[str]]] = [
    # launched by, engine, launcher (none: disttrain itself), settings
    ("disttrain --nproc", "native", None, []),
    ("torchrun", "native", LAUNCHERS["torchrun"], []),
    ("deepspeed", "native", LAUNCHERS["deepspeed"], []),
    ("mpirun (Open MPI)", "native", LAUNCHERS["openmpi"], []),
    ("mpiexec (MPICH)", "native", LAUNCHERS["mpich"], []),
    *(("deepspeed", f"deepspeed, ZeRO {zero}", LAUNCHERS["deepspeed"], ["engine=deepspeed", f"parallel.zero={zero}"])
      for zero in range(4)),
    ("torchrun", "deepspeed, ZeRO 2", LAUNCHERS["torchrun"], ["engine=deepspeed", "parallel.zero=2"]),
    ("horovodrun --gloo", "horovod", LAUNCHERS["horovodrun"], ["engine=horovod"]),
    ("horovodrun --mpi", "horovod", HOROVOD_MPI, ["engine=horovod"]),
    ("mpirun (Open MPI)", "horovod", LAUNCHERS["openmpi"], ["engine=horovod"]),
    ("mpiexec (MPICH)", "horovod, over gloo", LAUNCHERS["mpich"], ["engine=horovod", "horovod.transport=gloo"]),
    ("torchrun", "horovod", LAUNCHERS["torchrun"], ["engine=horovod"]),
    ("disttrain --nproc", "horovod", None, ["engine=horovod"]),
]  # fmt: skip
SLURM: list[tuple[str, str, list[str]]] = [
    ("train.sbatch", "native", []),
    ("train_srun.sbatch", "native", []),
    ("train_deepspeed.sbatch", "deepspeed, ZeRO 2", ["engine=deepspeed", "parallel.zero=2"]),
    ("train_horovod.sbatch", "horovod", ["engine=horovod"]),
]


def row(place: Place | Login, run: str, one: list[tuple], launched: str, engine: str) -> str:
    """A row of the table, from a run's own records."""
    curve = place.curve(run)
    assert len(curve) == len(one) == 20, (run, len(curve))
    worst = max(abs(ours[1] - theirs[1]) / theirs[1] for ours, theirs in zip(curve, one, strict=True))
    (_, held_out), *_ = place.evaluations(run)
    ranks = place.records(run, "header")[0]["world_size"]
    cells = (
        launched,
        engine,
        str(ranks),
        f"{curve[0][1]:.6f}",
        f"{curve[-1][1]:.6f}",
        f"{held_out:.6f}",
        f"{worst:.0e}",
    )
    return line(cells)


def line(cells: tuple[str, ...]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |\n"


def local_rows(place: Place) -> Iterator[str]:
    """One process, and two ranks under every launcher."""
    settings = ["train", str(CONFIG), "run.dir=runs"]
    place.run(*settings, "run.name=one")
    one = place.curve("one")
    yield row(place, "one", one, "one process", "native")
    for number, (launched, engine, launcher, words) in enumerate(LOCAL):
        run = f"local-{number}"
        if launcher is None:
            place.run(*settings, *words, f"run.name={run}", "--nproc", "2")
        else:
            LAUNCHERS[run] = launcher  # by the run's name, which names its script
            command, environment = place.script(run)
            place.launched([*command, *settings, *words, f"run.name={run}"], environment)
        yield row(place, run, one, launched, engine)


def slurm_rows(folder: Path, one: list[tuple]) -> Iterator[str]:
    """Two nodes of two ranks under the shipped scripts."""
    cluster = Cluster()
    try:
        login = Login(folder, cluster)
        cluster.start()
        for script, engine, words in SLURM:
            run = script.split(".")[0]
            login.edit(script, " ".join([str(CONFIG), "run.dir=runs", f"run.name={run}", *words]))
            login.finished(login.submit(script))
            yield row(login, run, one, f"`slurm/{script}`", engine)
    finally:
        cluster.stop()


def main() -> None:
    """Run everything and write the table."""
    rows = [line(HEAD), line(("---",) * len(HEAD))]
    with tempfile.TemporaryDirectory(prefix="disttrain-curves-") as name:
        folder = Path(name)
        for part in ("local", "slurm"):
            (folder / part).mkdir()
        place = Place(folder / "local")
        for found in local_rows(place):
            print(found, end="", flush=True)
            rows.append(found)
        for found in slurm_rows(folder / "slurm", place.curve("one")):
            print(found, end="", flush=True)
            rows.append(found)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + "".join(rows) + END + after)
    subprocess.run(["git", "diff", "--stat", "--", str(PAGE)], cwd=ROOT, check=False)


if __name__ == "__main__":
    main()
