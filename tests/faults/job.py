"""A job that is to be hit: the command in processes of its own, what it has recorded, and ways to harm it."""

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from disttrain import checkpoint
from tests import warm
from tests.launchers.hosts import Hosts

ROOT = Path(__file__).resolve().parents[2]
EVERY = 5
"""Steps between checkpoints."""
PATIENCE_S = 120.0
"""For a start, and for the end of a job that must end by itself."""
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


class WentWrong(AssertionError):
    """The run did not survive what it must survive."""


@dataclass
class Job:
    """The command, started once."""

    folder: Path
    process: BaseProcess
    output: Path
    name: str = "hit"
    hosts: Hosts | None = None
    """Where its ranks run, if not all on this machine's own network."""

    @property
    def run(self) -> Path:
        """Its run folder."""
        return self.folder / "runs" / self.name

    @property
    def said(self) -> str:
        """What it has printed."""
        return self.output.read_text() if self.output.exists() else ""

    def ranks(self) -> list[int]:
        """Process ids of its ranks."""
        return [child.pid for child in psutil.Process(self.process.pid).children()]

    def kill(self) -> None:
        """End all that is left of it."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.join()
        deadline = time.monotonic() + 5
        with suppress(ProcessLookupError):
            while time.monotonic() < deadline:  # its lock is free when the last one is gone
                os.killpg(self.process.pid or 0, 0)
                time.sleep(0.01)

    def ended(self, seconds: float) -> int | None:
        """Its exit code, or None after so many seconds."""
        self.process.join(seconds)
        return self.process.exitcode


def start(folder: Path, *words: str, ranks: int, name: str = "hit") -> Job:
    """`disttrain train hit.yaml`, in a process group of its own."""
    several = ["--nproc", str(ranks)] if ranks > 1 else []
    output = _next_output(folder)
    train = ["train", "hit.yaml", f"run.name={name}", *words, *several]
    return Job(folder, warm.start(train, folder, _environment(), output, output, apart=True), output, name)


def start_on(hosts: Hosts, folder: Path, *words: str, ranks: int) -> Job:
    """The same, so many ranks on each host, as a launcher of theirs would start them."""
    world, output = ranks * len(hosts.names), _next_output(folder)
    places = [warm.Place(name, {"RANK": str(host * ranks + local), "WORLD_SIZE": str(world), "LOCAL_RANK": str(local),
                                "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": hosts.addresses[0], "MASTER_PORT": "29519",
                                "GLOO_SOCKET_IFNAME": "eth0"})
              for host, name in enumerate(hosts.names) for local in range(ranks)]  # fmt: skip
    train = ["train", "hit.yaml", "run.name=hit", *words]
    process = warm.start(train, folder, _environment(), output, output, apart=True, places=places)
    return Job(folder, process, output, hosts=hosts)


def start_under(launcher: list[str], folder: Path, *words: str, name: str) -> Job:
    """The same under a launcher, which this starts by its words, in fresh processes."""
    output = _next_output(folder)
    command = [*launcher, "train", "hit.yaml", f"run.name={name}", *words]
    process = get_context("forkserver").Process(target=_become, args=(command, folder, _environment(), output))
    process.start()
    return Job(folder, process, output, name)


def torchrun(*words: str) -> list[str]:
    """Words that start disttrain under torchrun."""
    return [sys.executable, "-m", "torch.distributed.run", *words, "-m", "disttrain"]


def _become(command: list[str], folder: Path, environment: dict[str, str], output: Path) -> None:
    os.setsid()
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.execvpe(command[0], command, environment)


def _environment() -> dict[str, str]:
    """One thread a rank, so that sums are added in the same order in every run."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def _next_output(folder: Path) -> Path:
    return folder / f"output_{len(list(folder.glob('output_*.txt'))):03d}.txt"


def write_corpus(path: Path) -> None:
    """A text of ten words."""
    path.write_text("\n".join(" ".join(WORDS[i * j % 10] for j in range(1, 12)) for i in range(900)))


def records(run: Path, kind: str) -> list[dict]:
    """Whole records of a run."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [
        record for record in map(json.loads, (line for line in lines if line[-1] == "\n")) if record["kind"] == kind
    ]


def last_step(run: Path) -> int:
    return max((record["step"] for record in records(run, "step")), default=0)


def newest(run: Path) -> Path | None:
    return checkpoint.newest_good(run / "checkpoints")[0]


def kill_a_rank(job: Job, dice: random.Random) -> None:
    os.kill(dice.choice(job.ranks()), signal.SIGKILL)


def kill_the_job(job: Job, dice: random.Random) -> None:
    job.kill()


def ask_to_stop(job: Job, dice: random.Random) -> None:
    os.kill(job.process.pid or 0, signal.SIGTERM)


def stop_a_rank(job: Job, dice: random.Random) -> None:
    os.kill(dice.choice(job.ranks()), signal.SIGSTOP)


def cut_off_a_host(job: Job, dice: random.Random) -> None:
    assert job.hosts is not None
    job.hosts.cut(dice.randrange(len(job.hosts.names)))


def refuse_the_disk(job: Job, dice: random.Random) -> None:
    """No file of one rank may become longer than a few bytes; the first rank writes the records, and is spared."""
    rank = dice.choice(sorted(job.ranks())[1:])
    resource.prlimit(rank, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def fill_the_disk(job: Job) -> None:
    """The first rank, which writes the records, can make no file longer than metrics.jsonl is now."""
    length = (job.run / "metrics.jsonl").stat().st_size
    resource.prlimit(min(job.ranks()), resource.RLIMIT_FSIZE, (length, resource.RLIM_INFINITY))


def spoiled(harm: Callable[[Path, random.Random], None]) -> Callable[[Job, random.Random], None]:
    """Kill the job, then do something to the newest checkpoint."""

    def strike(job: Job, dice: random.Random) -> None:
        job.kill()
        if (path := newest(job.run)) is not None:
            harm(path, dice)

    return strike


def a_file(path: Path, dice: random.Random) -> Path:
    return dice.choice(sorted(file for file in path.iterdir() if file.is_file()))


def flip_a_bit(path: Path, dice: random.Random) -> None:
    flip_a_bit_of(a_file(path, dice), dice)


def flip_a_bit_of(file: Path, dice: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    file.write_bytes(content)


def truncate(path: Path, dice: random.Random) -> None:
    file = a_file(path, dice)
    os.truncate(file, dice.randrange(file.stat().st_size))


def delete_a_file(path: Path, dice: random.Random) -> None:
    a_file(path, dice).unlink()


def leave_half_written(path: Path, dice: random.Random) -> None:
    shutil.copytree(path, path.with_name(f"step_{checkpoint.step_of(path) + EVERY:08d}.writing"), dirs_exist_ok=True)
