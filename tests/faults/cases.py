"""The faults of the table in docs/faults.md: each strikes a real run, and tells what became of it."""

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from disttrain import checkpoint
from disttrain.data.files import sha256_file
from disttrain.data.shards import INDEX, read_index, shard_name
from tests.components import PRESENT
from tests.faults.job import (
    EVERY,
    Job,
    WentWrong,
    fill_the_disk,
    flip_a_bit_of,
    kill_a_rank,
    last_step,
    leave_half_written,
    newest,
    records,
    refuse_the_disk,
    torchrun,
)
from tests.faults.place import EXACTLY, HIT, STEPS, Place, Row, event
from tests.launchers.hosts import Hosts

TIME_OUT_S = 6
DICE = random.Random(1)


def rank_killed(place: Place, name: str) -> Row:
    job, struck = place.reached(name), time.time()
    kill_a_rank(job, DICE)
    noticed = place.says(job, "was killed by SIGKILL")
    place.ends(job, 1)
    return Row("the message", noticed - struck, 1, again=place.lost(job), gave=place.resumes(name))


def rank_killed_under_torchrun(place: Place, name: str) -> Row:
    launcher = torchrun("--standalone", "--nproc-per-node", "2", "--max-restarts", "2")
    job = place.reached(name, launcher=launcher)
    try:
        struck = time.time()
        os.kill(max(ranks_below(job.process.pid or 0)), signal.SIGKILL)
        noticed = place.wait(job, lambda: "exitcode: -9" in job.said, 20)
        job.ended(120)
    finally:
        job.kill()
    if job.process.exitcode != 0:
        raise WentWrong(f"torchrun ended with {job.process.exitcode}:\n{job.said}")
    place.is_exact(name)
    back = event(job, "rewound")
    again = back["details"]["reached_step"] - back["step"]
    return Row("torchrun's message", noticed - struck, 0, "went on by itself, exactly", again)


def ranks_below(pid: int) -> list[int]:
    """Processes of disttrain below a launcher."""
    return [p.pid for p in psutil.Process(pid).children(recursive=True) if "disttrain" in p.cmdline()]


def rank_stopped(place: Place, name: str) -> Row:
    limit = f"run.timeout_s={TIME_OUT_S}"
    job = place.reached(name, limit)
    struck, rank = time.time(), sorted(job.ranks())[1]
    os.kill(rank, signal.SIGSTOP)
    try:
        noticed = place.says(job, "Rank 1 (host", TIME_OUT_S + 10)
    except BaseException:
        job.kill()
        raise
    place.ends(job, 1)
    if "Rank 1 (host" not in (told := place.command("explain", f"runs/{name}")):
        raise WentWrong(f"explain does not name the rank:\n{told}")
    return Row("the message, and `disttrain explain`", noticed - struck, 1, again=place.lost(job),
               gave=place.resumes(name, limit))  # fmt: skip


def host_cut_off(place: Place, name: str) -> Row:
    limit = f"run.timeout_s={TIME_OUT_S}"
    with Hosts(place.folder) as hosts:

        def started() -> list[Job]:
            meeting = ["--master-addr", hosts.addresses[0], "--master-port", "29519"]
            return [place.start(name, limit, launcher=[*hosts.on(host, 'env GLOO_SOCKET_IFNAME=eth0 "$@"'), "sh",
                                *torchrun("--nnodes", "2", "--node-rank", str(host), "--nproc-per-node", "1", *meeting)])
                    for host in range(2)]  # fmt: skip

        jobs = started()
        try:
            place.wait(jobs[0], lambda: last_step(jobs[0].run) >= HIT, 120)
            hosts.cut(1)
            struck = time.time()
            noticed = max(place.says(job, "disttrain: ", TIME_OUT_S + 10) for job in jobs)
            for job in jobs:
                job.ended(TIME_OUT_S + 60)
        finally:
            for job in jobs:
                job.kill()
        if [job.process.exitcode for job in jobs] != [1, 1]:
            raise WentWrong("\n".join(job.said for job in jobs))
        again = place.lost(jobs[0])
        hosts.join(1)
        jobs = started()
        try:
            codes = [job.ended(120) for job in jobs]
        finally:
            for job in jobs:
                job.kill()
    if codes != [0, 0]:
        raise WentWrong("\n".join(job.said for job in jobs))
    place.is_exact(name)
    return Row("a message on each host", noticed - struck, 1, EXACTLY + ", with the link back", again)


def checkpoint_refused(place: Place, name: str) -> Row:
    """The log of the rank can grow no more either."""
    job, struck = place.reached(name), time.time()
    with (job.run / "logs" / "rank_0001.log").open("a") as log:
        log.write("\n" * 5000)
    refuse_the_disk(job, DICE)
    noticed = place.says(job, "could not be written: ")
    place.ends(job, 1)
    return Row("the message", noticed - struck, 1, again=place.lost(job), gave=place.resumes(name))


def metrics_refused(place: Place, name: str) -> Row:
    job, struck = place.reached(name), time.time()
    fill_the_disk(job)
    noticed = place.says(job, "metrics.jsonl: ")
    place.ends(job, 1)
    return Row("the message", noticed - struck, 1, again=place.lost(job), gave=place.resumes(name))


def shard_spoiled(place: Place, name: str) -> Row:
    job = place.reached(name, step=2 * EVERY + 2)
    place.wait(job, lambda: len(checkpoint.checkpoints(job.run / "checkpoints")) > 1, 20)
    job.kill()
    good = newest(job.run)
    assert good is not None
    flip_a_bit_of(next(good.glob("*.safetensors")), DICE)
    again, gave = place.lost(job), place.resumes(name)
    if "checksum" not in event(job, "checkpoint_damaged")["message"]:
        raise WentWrong(job.said)
    return Row("event `checkpoint_damaged` of the next start", None, -9, gave + ", from the checkpoint before", again)


def half_written(place: Place, name: str) -> Row:
    job = place.reached(name)
    job.kill()
    good = newest(job.run)
    assert good is not None
    leave_half_written(good, DICE)
    again, gave = place.lost(job), place.resumes(name)
    if list((job.run / "checkpoints").glob("*.writing")):
        raise WentWrong("what was half-written is still there")
    return Row("the next start, which removes it", None, -9, gave, again)


def rank_slow(place: Place, name: str) -> Row:
    job = place.start(name, "train.steps=33", "checkpoint.every=0", options="data_sleeps: 0.06")
    place.ends(job, 0)
    told = event(job, "slow_rank")
    if (told["details"]["rank"], told["details"]["cause"]) != (1, "data"):
        raise WentWrong(str(told))
    return Row("event `slow_rank`, with the cause", place.since_struck(told["time"]), 0, "went on")


def nan_gradient(policy: str) -> Callable[[Place, str], Row]:
    def strike(place: Place, name: str) -> Row:
        words = (f"watch.on_nonfinite={policy}",)
        job = place.start(name, *words, options=f"nan_from: {HIT - 1}, nan_to: {HIT - 1}")
        place.ends(job, 1 if policy == "stop" else 0)
        seen = event(job, "update_skipped" if policy == "skip" else "not_finite")
        return judged(place, job, policy, seen)

    return strike


def judged(place: Place, job: Job, policy: str, seen: dict) -> Row:
    """The row of a run whose numbers have gone wrong."""
    row = Row(f"event `{seen['event']}`", place.since_struck(seen["time"]), job.process.exitcode or 0, "")
    steps = [record["step"] for record in records(job.run, "step")]
    if policy == "rollback":
        back = event(job, "rolled_back")["details"]
        row.again = back["from_step"] - back["to_step"]
        row.gave = "went back to the newest checkpoint, and on without these batches"
        assert steps[-1] == STEPS and len(steps) == STEPS + row.again
    elif policy == "stop":
        row.gave = "stopped; no checkpoint has the bad numbers"
        good = newest(job.run)
        assert good is None or checkpoint.step_of(good) < seen["step"]
    elif policy == "skip":
        row.gave = "went on without this update, on all ranks"
        assert steps == list(range(1, STEPS + 1)) and records(job.run, "step")[-1]["skipped_steps"] == 1
    else:
        row.gave = "went on"
        assert steps == list(range(1, STEPS + 1))
    return row


def nan_of_the_model(place: Place, name: str) -> Row:
    job = place.start(name, options=f"nan_input_at: {HIT - 1}")
    place.ends(job, 1)
    return judged(place, job, "stop", event(job, "not_finite"))


def token_out_of_range(place: Place, name: str) -> Row:
    """Ids of 65535 in the second half of a shard, with wrong checksums, and with right ones, as of another program."""
    place.command("data", "prepare", "hit.yaml", "--out", f"tokens_{name}")
    folder = place.folder / f"tokens_{name}"
    tokens = read_index(folder).shards[0]["train"]["tokens"]
    with (folder / shard_name(0)).open("r+b") as file:
        file.seek(tokens)  # two bytes each
        file.write(b"\xff" * (tokens // 2))
    words = ("data.corpus=tokens", f"data.path={folder.name}")
    place.ends(place.start(name, *words), 2)
    index = json.loads((folder / INDEX).read_text())
    index["shards"][0]["sha256"] = sha256_file(folder / shard_name(0))
    (folder / INDEX).write_text(json.dumps(index))
    job = place.start(name, *words)
    noticed = place.says(job, "which is no token of the tokenizer")
    place.ends(job, 1)
    first = records(job.run, "header")[-1]["time"]
    return Row("the message, with the folder", noticed - first, 1, "stopped before the step that has them; "
               "refused at the start (2) where a checksum is wrong")  # fmt: skip


def exploding(policy: str) -> Callable[[Place, str], Row]:
    def strike(place: Place, name: str) -> Row:
        job = place.start(name, f"watch.on_spike={policy}", options="explodes_at: 21")
        place.ends(job, 1 if policy == "stop" else 0)
        return judged(place, job, policy, event(job, "loss_spike"))

    return strike


def asked_to_stop(number: signal.Signals) -> Callable[[Place, str], Row]:
    def strike(place: Place, name: str) -> Row:
        job, struck = place.reached(name), time.time()
        os.kill(job.process.pid or 0, number)
        place.ends(job, 130)
        ended = time.time()
        if place.lost(job):
            raise WentWrong(f"{place.lost(job)} steps were lost:\n{job.said}")
        return Row("the end of the job", ended - struck, 130, again=0, gave=place.resumes(name))

    return strike


def asked_twice(place: Place, name: str) -> Row:
    """The disk hangs while the checkpoint of the first signal is written."""
    job = place.reached(name)
    with slow_disk(place):
        os.kill(job.process.pid or 0, signal.SIGTERM)
        place.wait(job, lambda: any((job.run / "checkpoints").glob("*.writing")), 20)
        time.sleep(2.5)  # a signal that comes sooner is taken for the same one
        struck = time.time()
        os.kill(job.process.pid or 0, signal.SIGTERM)
        noticed = place.says(job, "stopped at once; the last checkpoint is kept")
        place.ends(job, 130)
    return Row("the message", noticed - struck, 130, again=place.lost(job), gave=place.resumes(name))


def killed_while_it_saves(place: Place, name: str) -> Row:
    """The disk hangs while a thread writes a checkpoint beside training."""
    job = place.reached(name)
    with slow_disk(place):
        place.wait(job, lambda: last_step(job.run) > 2 * EVERY + 1, 20)  # it trains on
        writing = checkpoint.path_of(job.run / "checkpoints", 2 * EVERY)
        if not writing.with_name(f"{writing.name}.writing").exists():
            raise WentWrong(f"nothing is being written:\n{job.said}")
        job.kill()
    again, gave = place.lost(job), place.resumes(name)
    return Row("the next start, which removes it", None, -9, gave + ", from the newest whole checkpoint", again)


@contextmanager
def slow_disk(place: Place) -> Iterator[None]:
    """A block in which the last files of a checkpoint are not written."""
    (place.folder / "slow_disk").touch()
    try:
        yield
    finally:
        (place.folder / "slow_disk").unlink()


@dataclass(frozen=True)
class Case:
    """A fault, and how long it may take until it is noticed, seconds; generous, since a machine may be busy."""

    strike: Callable[[Place, str], Row]
    bound_s: float = 20.0
    needs_root: bool = False


CASES = {
    "a rank killed (-9), local ranks": Case(rank_killed),
    "the same under torchrun `--max-restarts 2`": Case(rank_killed_under_torchrun),
    f"a rank stopped (SIGSTOP), `run.timeout_s={TIME_OUT_S}`": Case(rank_stopped, TIME_OUT_S + 10),
    f"one of two hosts cut off, torchrun, `run.timeout_s={TIME_OUT_S}`": Case(host_cut_off, TIME_OUT_S + 10, True),
    "disk full for a checkpoint": Case(checkpoint_refused),
    "disk full for `metrics.jsonl`": Case(metrics_refused),
    "a shard of the newest checkpoint corrupt": Case(shard_spoiled),
    "a half-written checkpoint": Case(half_written),
    "kill -9 of all while a thread writes a checkpoint": Case(killed_while_it_saves),
    "a slow rank": Case(rank_slow, 60),
    "NaN in one rank's gradient, `watch.on_nonfinite=stop`": Case(nan_gradient("stop")),
    "the same, `skip`": Case(nan_gradient("skip")),
    "the same, `rollback`": Case(nan_gradient("rollback")),
    "a model that gives NaN on one rank": Case(nan_of_the_model),
    "token ids beyond the vocabulary": Case(token_out_of_range),
    "an exploding loss, `watch.on_spike=event`": Case(exploding("event")),
    "the same with `rollback`": Case(exploding("rollback")),
    "the same with `stop`": Case(exploding("stop")),
    "SIGTERM": Case(asked_to_stop(signal.SIGTERM)),
    "SIGUSR1": Case(asked_to_stop(signal.SIGUSR1)),
    "a second SIGTERM while the checkpoint is written": Case(asked_twice),
}
"""By what stands in the table, in its order."""


def refused_here(case: Case) -> str | None:
    """Why a fault cannot strike on this machine; None if it can."""
    present, install = PRESENT["namespaces"]
    return f"needs emulated hosts: {install}" if case.needs_root and not present() else None
