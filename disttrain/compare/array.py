"""A comparison as a Slurm array: one task a run, each by the same command. Imports no torch."""

import shlex
from collections.abc import Iterator, Sequence

from disttrain import slurm_script
from disttrain.compare.plan import Plan
from disttrain.compare.schema import SlurmArray, Sweep
from disttrain.config.problems import Problem, RefusedInput

FIRST = (
    "# By `disttrain compare SWEEP --array`: every task does one run, and goes on with it when it is queued again.\n"
)
START = """\
<python> -m disttrain compare "${COMPARE[@]}" --task "$SLURM_ARRAY_TASK_ID" &
"""


def script(sweep: Sweep, plan: Plan, words: Sequence[str], python: str) -> str:
    """The batch script; `words` are what `disttrain compare` was given. Raises RefusedInput where it could not work."""
    asked = sweep.slurm or SlurmArray()
    tasks = len(plan.tasks)
    job = slurm_script.Job(
        nodes=asked.nodes, gpus_per_node=asked.gpus_per_node, ranks_per_node=asked.ranks_per_node,
        cpus_per_rank=asked.cpus_per_rank, account=asked.account, partition=asked.partition, time=asked.time,
        array=f"1-{tasks}%{min(asked.at_once, tasks)}",
    )  # fmt: skip
    problems = [*_problems(plan, job), *slurm_script.words_problems(job)]
    if problems:
        raise RefusedInput(problems)
    settings = f"COMPARE=({shlex.join(words)})\n"
    return slurm_script.around(job, plan.folder.name, FIRST, settings, START.replace("<python>", shlex.quote(python)))


def _problems(plan: Plan, job: slurm_script.Job) -> Iterator[Problem]:
    room = job.nodes * job.ranks
    for s in [s for s in plan.strategies if not s.refused]:
        if s.nproc > room:
            yield Problem((f"strategy {s.name}, nproc={s.nproc}", f"slurm.nodes={job.nodes}"),
                          f"a task has room for {room} ranks", "give more nodes or ranks_per_node below slurm:")  # fmt: skip
        if s.launcher in ("local", "torchrun") and s.nproc > job.ranks:
            yield Problem((f"strategy {s.name}, nproc={s.nproc}", f"launcher={s.launcher}"),
                          f"this launcher stays on one node, which has {job.ranks}", "use launcher: srun")  # fmt: skip
    if not job.gpus_per_node and not job.ranks_per_node:
        yield Problem(("slurm.gpus_per_node=0",), "nobody says how many ranks a node has", "add slurm.ranks_per_node")
