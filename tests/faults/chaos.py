"""A run that is hit at random moments, again and again, in one layout after the other, must end as if nothing had been.

``python -m tests.faults.chaos --seconds 180 --seed 1`` trains a small GPT in float64 on four local ranks. Each start of the
same command ends by a blow: a rank or the whole job is killed, asked to stop, or stopped; the link of a host is cut; a
checkpoint is spoiled; a disk refuses. When time is up the run is finished, and compared with one process that nobody
disturbed.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml

from disttrain import checkpoint
from tests.components import PRESENT
from tests.faults.job import (
    EVERY,
    PATIENCE_S,
    Job,
    WentWrong,
    ask_to_stop,
    cut_off_a_host,
    delete_a_file,
    flip_a_bit,
    kill_a_rank,
    kill_the_job,
    last_step,
    leave_half_written,
    newest,
    records,
    refuse_the_disk,
    spoiled,
    start,
    start_on,
    stop_a_rank,
    truncate,
    write_corpus,
)
from tests.launchers.hosts import Hosts

BATCH, SEQUENCE = 8, 32
SETTINGS = {
    "run": {"name": "hit", "device": "cpu"},
    "model": {"family": "gpt", "layers": 4, "hidden_size": 64, "heads": 4, "max_positions": SEQUENCE, "dropout": 0.1},
    "data": {"corpus": "text", "path": "corpus.txt", "tokenizer": "bytes", "sequence_length": SEQUENCE,
             "cache_dir": "cache"},
    "train": {"steps": 1_000_000, "global_batch_size": BATCH, "eval_sequences": 8},
    "optim": {"schedule": "constant", "lr": 1.0e-3},
    "precision": "fp64", "checkpoint": {"every": EVERY}, "log": {"console": "plain"},
}  # fmt: skip
"""The rate is constant, so that the run may end at any step."""
PIPELINE = ("parallel.pipeline=2", "train.micro_batch_size=2")
LAYOUTS = [
    ("parallel.tensor=2", "parallel.zero=2"), PIPELINE, (*PIPELINE, "parallel.zero=1"), (*PIPELINE, "parallel.tensor=2"),
    ("parallel.zero=3",), ("train.micro_batch_size=1",), ("parallel.zero=2", "parallel.replicate=2"),
]  # fmt: skip
RANKS = 4
TOLERANCE = 1e-10


@dataclass
class Blow:
    """What was done to the run, and what became of it."""

    fault: str
    layout: str
    step: int
    """The last step that was recorded."""
    exit_code: int | None = None
    """None where the job had to be killed."""
    seconds_to_end: float = 0.0
    """From the blow until the job had ended."""
    steps_lost: int = 0
    """Recorded steps that had to be done again."""
    seconds_to_go_on: float | None = None
    """From the blow until the same command had recorded a step again."""


FAULTS: dict[str, tuple[Callable[[Job, random.Random], None], int | None]] = {
    "one rank killed": (kill_a_rank, 1),
    "all ranks killed": (kill_the_job, -9),
    "SIGTERM": (ask_to_stop, 130),
    "one rank stopped": (stop_a_rank, 1),
    "one of two hosts cut off": (cut_off_a_host, 1),
    "disk full for a rank": (refuse_the_disk, 1),
    "bit flipped": (spoiled(flip_a_bit), -9),
    "file cut off": (spoiled(truncate), -9),
    "file deleted": (spoiled(delete_a_file), -9),
    "half-written folder": (spoiled(leave_half_written), -9),
}
"""What happens to the job, and the exit code that it must end with."""
WAIT_IS_SHORT = ["one rank stopped", "one of two hosts cut off"]


def possible() -> list[str]:
    """The faults that can strike on this machine."""
    emulated, _ = PRESENT["namespaces"]
    return [fault for fault in sorted(FAULTS) if FAULTS[fault][0] is not cut_off_a_host or emulated()]


def chaos(folder: Path, seed: int, goes_on: Callable[[int, float], bool]) -> list[Blow]:
    """Blows at a run in an empty folder, every kind in turn, while `goes_on` says so of their number and of the seconds
    since the first start; then its end. Raises WentWrong."""
    dice, began, faults = random.Random(seed), time.monotonic(), possible()
    blows: list[Blow] = []
    (folder / "hit.yaml").write_text(yaml.safe_dump(SETTINGS))
    write_corpus(folder / "corpus.txt")
    waiting: list[str] = []
    struck = 0.0
    while goes_on(len(blows), time.monotonic() - began):
        waiting = waiting or dice.sample(faults, len(faults))
        fault, layout = waiting.pop(), dice.choice(LAYOUTS)
        limit = ["run.timeout_s=5"] if fault in WAIT_IS_SHORT else []
        with _job(folder, fault, *layout, *limit) as job:
            _goes_on(job, blows, struck, dice)
            struck = time.monotonic()
            blows.append(_hit(job, fault, " ".join(layout), dice))
        print(json.dumps(asdict(blows[-1])), flush=True)
    _finish(folder, blows, struck, dice)
    return blows


@contextmanager
def _job(folder: Path, fault: str, *words: str) -> Iterator[Job]:
    """The job for a fault, on this machine or on two hosts; gone afterwards, as the hosts are."""
    with ExitStack() as after:
        if FAULTS[fault][0] is cut_off_a_host:
            hosts = after.enter_context(Hosts(folder))
            job = start_on(hosts, folder, *words, ranks=RANKS // len(hosts.names))
        else:
            job = start(folder, *words, ranks=RANKS)
        after.callback(job.kill)
        yield job


def _goes_on(job: Job, blows: list[Blow], struck: float, dice: random.Random) -> None:
    """Wait until the job has done some steps, a random number of them."""
    good = newest(job.run)
    begins = checkpoint.step_of(good) if good else 0
    headers, more, deadline = (
        len(records(job.run, "header")),
        dice.randint(1, 2 * EVERY + 2),
        time.monotonic() + PATIENCE_S,
    )
    while True:
        gone_on = len(records(job.run, "header")) > headers or headers > len(blows)
        step = last_step(job.run) if gone_on else 0
        if blows and blows[-1].seconds_to_go_on is None and step > begins:
            blows[-1].seconds_to_go_on = time.monotonic() - struck
        if step >= begins + more:
            time.sleep(dice.random() * 0.2)
            return
        if not job.process.is_alive() or time.monotonic() > deadline:
            raise WentWrong(f"the run did not get from step {begins} to {begins + more}:\n{job.said}")
        time.sleep(0.03)


def _hit(job: Job, fault: str, layout: str, dice: random.Random) -> Blow:
    strike, expected = FAULTS[fault]
    blow, began = Blow(fault, layout, last_step(job.run)), time.monotonic()
    strike(job, dice)
    blow.exit_code = job.ended(PATIENCE_S)
    blow.seconds_to_end = time.monotonic() - began
    job.kill()
    if blow.exit_code != expected:
        raise WentWrong(f"{fault}: exit code {blow.exit_code}, not {expected}:\n{job.said}")
    said = job.said
    if fault in ("SIGTERM", "one of two hosts cut off", "disk full for a rank") and "Traceback" in said:
        raise WentWrong(f"{fault}: a traceback:\n{said}")
    blow.step, good = last_step(job.run), newest(job.run)
    blow.steps_lost = blow.step - (checkpoint.step_of(good) if good else 0)
    if fault == "SIGTERM" and blow.steps_lost:
        raise WentWrong(f"{blow.steps_lost} steps were lost when the run was asked to stop:\n{said}")
    return blow


def _finish(folder: Path, blows: list[Blow], struck: float, dice: random.Random) -> None:
    """Let the run end, and compare it with one that nobody disturbed."""
    run, alone = folder / "runs" / "hit", folder / "runs" / "alone"
    good = newest(run)
    steps = (checkpoint.step_of(good) if good else 0) + 2 * EVERY + 3
    layout = dice.choice(LAYOUTS)
    for name, words, ranks in ("hit", layout, RANKS), ("alone", (), 1):
        job = start(folder, *words, f"train.steps={steps}", ranks=ranks, name=name)
        if (code := job.ended(600)) != 0:
            job.kill()
            raise WentWrong(f"exit code {code} of the last part:\n{job.said}")
        if blows and blows[-1].seconds_to_go_on is None:
            blows[-1].seconds_to_go_on = time.monotonic() - struck
    ours, theirs = records(run, "step"), records(alone, "step")
    if [record["step"] for record in ours] != list(range(1, steps + 1)):
        raise WentWrong(f"steps are missing or there twice: {[record['step'] for record in ours]}")
    for one, other in zip(ours, theirs, strict=True):
        if one["tokens_seen"] != one["step"] * BATCH * SEQUENCE:
            raise WentWrong(f"step {one['step']} counts {one['tokens_seen']} tokens")
        for key in ("loss", "grad_norm"):
            if abs(one[key] - other[key]) > TOLERANCE * abs(other[key]):
                raise WentWrong(f"step {one['step']}: {key} is {one[key]}, and {other[key]} in one process")
    if records(run, "summary")[-1]["tokens_seen"] != steps * BATCH * SEQUENCE:
        raise WentWrong("the summary counts other tokens")
    compare(run / "checkpoints" / f"step_{steps:08d}", alone / "checkpoints" / f"step_{steps:08d}")


def compare(one: Path, other: Path) -> None:
    """Raises WentWrong where weights or moments differ."""
    ours, theirs = checkpoint.read(one), checkpoint.read(other)
    if ours.keys() != theirs.keys():
        raise WentWrong(f"tensors: {sorted(ours.keys() ^ theirs.keys())}")
    for name, tensor in theirs.items():
        apart = float((ours[name].double() - tensor.double()).abs().max())
        if not apart <= TOLERANCE * max(1.0, float(torch.as_tensor(tensor).double().abs().max())):
            raise WentWrong(f"{name} differs by {apart}")


def table(blows: list[Blow]) -> str:
    """One line for each kind of fault, in Markdown."""
    lines = [
        "| fault | times | s to end, mean (largest) | s to go on | steps lost | exit codes |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for fault in FAULTS:
        hit = [blow for blow in blows if blow.fault == fault]
        if hit:
            cells = [_mean([b.seconds_to_end for b in hit]), _mean([b.seconds_to_go_on or 0.0 for b in hit])]
            lost = _mean([float(b.steps_lost) for b in hit])
            codes = ", ".join(sorted({"killed" if b.exit_code is None else str(b.exit_code) for b in hit}))
            lines.append(f"| {fault} | {len(hit)} | {' | '.join(cells)} | {lost} | {codes} |")
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    return f"{sum(values) / len(values):.1f} ({max(values):.1f})"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180.0, help="how long the run is hit")
    parser.add_argument("--seed", type=int, default=1, help="of the faults, their moments and the layouts")
    parser.add_argument("--json", type=Path, help="write every blow here")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="disttrain-chaos-") as name:
        blows = chaos(Path(name), asked.seed, lambda _, seconds: seconds < asked.seconds)
    for fault in sorted(set(FAULTS) - set(possible())):
        print(f"not done: {fault}, which needs emulated hosts: {PRESENT['namespaces'][1]}")
    print(
        f"\n{table(blows)}\n\n{len(blows)} blows, and the weights are those of one undisturbed process (to {TOLERANCE:g})"
    )
    if asked.json:
        asked.json.write_text(json.dumps([asdict(blow) for blow in blows], indent=1))


if __name__ == "__main__":
    main()
