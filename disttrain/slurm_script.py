"""A batch script for Slurm from a config and a few options, and its submission. Imports no torch.

The scripts in `slurm/` are rendered here too; `tests/unit/test_slurm_script.py` holds them to it.
"""

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from disttrain import preflight
from disttrain.config.load import load
from disttrain.config.problems import Problem, RefusedInput
from disttrain.config.schema import Config

Launcher = Literal["srun", "torchrun", "mpirun"]

WARNING_S = 120
"""How long before the time limit Slurm says so: the time there is to write a checkpoint."""
SHORTEST_S = 600
"""Least time limit of a job that is requeued: a job that is warned as soon as it starts would never get anywhere."""
NAME = r"[A-Za-z0-9_.@%+,-]+"
TIME = r"(\d+)-(\d+)(?::(\d+)(?::\d+)?)?|(?:(\d+):)?(\d+):\d+|\d+"
"""Days, hours and minutes; or hours and minutes; or minutes."""


@dataclass(frozen=True)
class Job:
    """What Slurm is asked for, and how the ranks are started there."""

    nodes: int = 2
    gpus_per_node: int = 8
    """0 trains on CPUs."""
    ranks_per_node: int | None = None
    """On CPUs only; with GPUs it is one rank a GPU."""
    cpus_per_rank: int = 4
    account: str | None = None
    partition: str | None = None
    time: str = "1-00:00:00"
    """Time limit in sbatch's notation."""
    launcher: Launcher = "srun"
    """srun: one task a rank. torchrun: one agent a node. mpirun: one daemon a node, for engines that speak MPI."""
    requeue: bool = True
    """Whether a job that is preempted, out of time or without one of its nodes goes back into the queue."""
    sweep: tuple[str, int] | None = None
    """A file of overrides and its number of lines: an array job, each task with the settings of one line."""
    array: str | None = None
    """Tasks of an array job in sbatch's notation, where no sweep says."""

    @property
    def ranks(self) -> int:
        """Ranks of a node."""
        return self.gpus_per_node or self.ranks_per_node or 1


def launcher_for(config: Config) -> Launcher:
    """The launcher that fits the engine best; Horovod can do all that it offers under mpirun only."""
    return "mpirun" if config.engine == "horovod" else "srun"


def problems(config: Config, job: Job) -> list[Problem]:
    """Every reason why the job would not do what it says."""
    found = [*preflight.problems(config, job.nodes * job.ranks), *_ranks(config, job)]
    return [*found, *words_problems(job), *_requeue(config, job)]


def sweep_problems(path: Path, config: Path, overrides: Sequence[str], job: Job) -> list[Problem]:
    """What is wrong with the lines of a sweep; each is a run of its own."""
    found: list[Problem] = []
    for number, line in enumerate(lines_of(path), start=1):
        try:
            if not line.split():
                raise RefusedInput([Problem((), "the line is empty", "every line is one run: remove it")])
            found += _named(problems(load(config, [*overrides, *line.split()]), job), path, number)
        except RefusedInput as refused:
            found += _named(refused.problems, path, number)
    return found


def lines_of(path: Path) -> list[str]:
    """Lines of a file of overrides. Raises RefusedInput where there are none."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise RefusedInput(
            [Problem((f"--sweep {path}",), f"it cannot be read: {error.strerror}", "check the path")]
        ) from error
    if not lines:
        raise RefusedInput(
            [Problem((f"--sweep {path}",), "the file is empty", "write the overrides of one run a line")]
        )
    return lines


def render(job: Job, name: str, words: Sequence[str], python: str = "python") -> str:
    """The text of the script; `words` are a config and its overrides, as `disttrain train` takes them."""
    ranks = '"$SLURM_GPUS_ON_NODE"' if job.gpus_per_node else str(job.ranks)
    first = "# Two lines to edit: --account and CONFIG, a config and settings that replace its own.\n"
    settings = f"CONFIG=({shlex.join(words)})\n"
    if job.sweep:
        settings += SWEEP.replace("<file>", shlex.quote(job.sweep[0]))
    start = START[job.launcher].replace("<python>", shlex.quote(python)).replace("<ranks>", ranks)
    return around(job, name, first, settings, start)


def around(job: Job, name: str, first: str, settings: str, start: str) -> str:
    """A script whose command, `start`, runs in the background: it gets the signals, and its exit code is the job's.

    `first` is the comment at the top, `settings` are the lines that the command needs.
    """
    parts = [
        f"#!/bin/bash\n{first}",
        *(f"#SBATCH --{option}\n" for option in _options(job, name)),
        f"\n{settings}",
        CPUS.replace("<cpus>", str(job.cpus_per_rank)),
        TRAP,
        start,
        WAIT,
        REQUEUE if job.requeue else "",
        'exit "$code"\n',
    ]
    return "".join(parts)


def _options(job: Job, name: str) -> list[str]:
    """What sbatch is asked for."""
    tasks = 1 if job.launcher == "torchrun" else job.ranks
    options = [
        ("account", job.account),
        ("job-name", name),
        ("partition", job.partition),
        ("array", f"1-{job.sweep[1]}" if job.sweep else job.array),
        ("nodes", job.nodes),
        ("ntasks-per-node", tasks),
        ("cpus-per-task", job.cpus_per_rank * job.ranks // tasks),
        ("gpus-per-node", job.gpus_per_node or None),
        ("time", job.time),
        ("output", "%x-%A_%a.log" if job.sweep or job.array else "%x-%j.log"),
        ("open-mode", "append"),
        ("signal", f"B:USR1@{WARNING_S}"),
    ]
    return [*(f"{key}={value}" for key, value in options if value), "requeue" if job.requeue else "no-requeue"]


def write(path: Path, script: str) -> None:
    """Write the script to a file. Raises RefusedInput where that cannot be done."""
    try:
        path.write_text(script)
    except OSError as error:
        raise RefusedInput(
            [Problem((f"--out {path}",), f"it cannot be written: {error.strerror}", "use another path")]
        ) from error


def submit(script: str) -> str:
    """Hand a script to sbatch; the job's id. Raises RefusedInput with what Slurm says where it does not take it."""
    if shutil.which("sbatch") is None:
        raise RefusedInput([Problem(("--submit", "PATH"), "there is no sbatch on this machine",
                                    "submit on a login node, or write the script with --out FILE")])  # fmt: skip
    done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().removeprefix("sbatch: error: ").replace("\nsbatch: error:", ";")
        raise RefusedInput([Problem(("--submit",), f"Slurm did not take the job: {said}",
                                    "correct the options; sinfo and sacctmgr show partitions and accounts")])  # fmt: skip
    return done.stdout.strip().split(";")[0]


SWEEP = """\
OVERRIDES=<file>  # one run a line, settings separated by blanks
read -ra LINE < <(sed -n "${SLURM_ARRAY_TASK_ID}p" "$OVERRIDES")
[ "${#LINE[@]}" -gt 0 ] || { echo "$OVERRIDES has no line $SLURM_ARRAY_TASK_ID" >&2; exit 2; }
CONFIG+=("run.name=$SLURM_JOB_NAME-$SLURM_ARRAY_TASK_ID" "${LINE[@]}")
"""
"""How a task of an array finds its settings; a run.name in its line is the last word."""

CPUS = """\
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-<cpus>}
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun does not take it from sbatch by itself

"""

TRAP = """\
# Slurm wants the nodes back soon: the ranks save a checkpoint and end.
trap 'asked=yes; kill -USR1 "$ranks"' USR1
"""

START: dict[Launcher, str] = {
    "srun": """\
srun --kill-on-bad-exit=0 --wait=600 <python> -m disttrain train "${CONFIG[@]}" &
""",
    "torchrun": """\
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((15000 + (SLURM_JOB_ID + 7919 * SLURM_RESTART_COUNT) % 14000))
srun --kill-on-bad-exit=0 --wait=600 bash -c '
    trap "" USR1  # which is for the ranks; they undo this
    exec "$0" -m torch.distributed.run --node-rank "$SLURM_NODEID" "$@"' \\
    <python> --nnodes "$SLURM_NNODES" --nproc-per-node <ranks> --master-addr "$HEAD" --master-port "$PORT" \\
    -m disttrain train "${CONFIG[@]}" &
""",
    "mpirun": """\
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
mpirun --bind-to none <python> -m disttrain train "${CONFIG[@]}" &
""",
}
"""How each launcher starts the ranks in the background.

A rank that ends first leaves the others ten minutes: rank 0 may have reports to write, and Slurm needs SlurmdTimeout (300 s
by default) to notice a dead node, before which srun must not give up.
"""

WAIT = """\
ranks=$!
wait "$ranks"; code=$?
while kill -0 "$ranks" 2>/dev/null; do wait "$ranks"; code=$?; done  # the signal ended the wait, not the ranks
"""

REQUEUE = """\

# Asked to end, or preempted: the job starts again from its newest checkpoint. After a node's death Slurm does it itself.
if [ "$code" -ne 0 ] &&
    { [ "$asked" ] || scontrol show job "$SLURM_JOB_ID" | grep -q ' PreemptTime=[0-9]'; }; then
    scontrol requeue "$SLURM_JOB_ID"
fi
"""


def _named(found: list[Problem], path: Path, number: int) -> list[Problem]:
    return [Problem((f"{path}, line {number}", *each.settings), each.message, each.fix) for each in found]


def _ranks(config: Config, job: Job) -> list[Problem]:
    """GPUs, ranks and the device of the config must say one thing."""
    gpus, ranks, device = (
        f"--gpus-per-node {job.gpus_per_node}",
        f"--ranks-per-node {job.ranks_per_node}",
        config.run.device,
    )
    found = []
    if not job.gpus_per_node and not job.ranks_per_node:
        found.append(Problem((gpus,), "nobody says how many ranks a node has", "add --ranks-per-node N"))
    if job.gpus_per_node and job.ranks_per_node:
        found.append(Problem((gpus, ranks), "a node has one rank for each of its GPUs",
                             "leave --ranks-per-node away, or train on CPUs with --gpus-per-node 0"))  # fmt: skip
    if job.gpus_per_node and device == "cpu":
        found.append(Problem((gpus, "run.device=cpu"), "the job would hold GPUs that it does not use",
                             "use --gpus-per-node 0 --ranks-per-node N, or run.device=auto"))  # fmt: skip
    if not job.gpus_per_node and device == "cuda":
        found.append(
            Problem((gpus, "run.device=cuda"), "the job asks for no GPU", "use run.device=auto or ask for GPUs")
        )
    return found


def words_problems(job: Job) -> list[Problem]:
    """What Slurm would not understand."""
    given = [("--account", job.account, NAME, "a name, as `sacctmgr show associations` lists it"),
             ("--partition", job.partition, NAME, "a name, as sinfo lists it"),
             ("--time", job.time, TIME, "sbatch's notation: minutes, H:MM:SS or D-HH:MM:SS")]  # fmt: skip
    return [Problem((f"{option} {value}",), "Slurm would not understand this", f"give {what}")
            for option, value, pattern, what in given if value is not None and not re.fullmatch(pattern, value)]  # fmt: skip


def _requeue(config: Config, job: Job) -> list[Problem]:
    """A job that starts again must find its checkpoint, and get further than the first time."""
    if not job.requeue:
        return []
    found = []
    if config.checkpoint.resume != "auto":
        found.append(Problem(("--requeue", f"checkpoint.resume={config.checkpoint.resume}"),
                             "a job that starts again would not go on from its own checkpoint",
                             "use checkpoint.resume=auto, or --no-requeue"))  # fmt: skip
    limit = seconds(job.time)
    if limit is not None and limit < SHORTEST_S:
        found.append(Problem((f"--time {job.time}", "--requeue"), f"Slurm asks the job to end {WARNING_S} s before its "
                             "limit, so that it would start again and again without getting far",
                             f"give it at least {SHORTEST_S // 60} minutes, or use --no-requeue"))  # fmt: skip
    return found


def seconds(time: str) -> int | None:
    """A time limit in sbatch's notation in seconds, rounded down to minutes; None where it is malformed."""
    match = re.fullmatch(TIME, time)
    if not match:
        return None
    days, day_hours, day_minutes, hours, minutes = (int(part or 0) for part in match.groups())
    if time.isdigit():
        minutes = int(time)
    return 60 * (minutes + day_minutes + 60 * (hours + day_hours + 24 * days))
