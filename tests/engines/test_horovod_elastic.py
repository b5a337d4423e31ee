"""horovodrun's elastic mode: a rank is killed, a host is added, and the training goes on as if nothing had happened."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from disttrain import elastic, failures
from disttrain.interruption import Interruption
from tests.components import BIN, need
from tests.parallel.test_data_parallel import config_for
from tests.runs.conftest import Workplace

WORDS = ("engine=horovod", "train.steps=500", "train.eval_every=0", "checkpoint.every=50")


class Job:
    """An elastic job whose hosts are the lines of a file: names of this machine, each with one slot."""

    def __init__(self, place: Workplace, *hosts: str):
        self.place, self.hosts = place, place.folder / "hosts.txt"
        self.give(*hosts)
        script = place.folder / "discover.sh"
        script.write_text(f"#!/bin/sh\ncat {self.hosts}\n")
        script.chmod(0o755)
        elastic_job = ("-np", "2", "--min-np", "1", "--max-np", "2", "--host-discovery-script", str(script))
        command = ["horovodrun", "--gloo", "--network-interface", "lo", *elastic_job, "python", "-m", "disttrain", "train",
                   "run.yaml", *WORDS]  # fmt: skip
        environment = {**place.environment, "PATH": f"{BIN}:{os.environ['PATH']}"}
        self.log = place.folder / "job.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=place.folder, env=environment, stdout=log, stdin=subprocess.DEVNULL,
                                            stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip

    def give(self, *hosts: str) -> None:
        part = self.hosts.with_suffix(".part")
        part.write_text("".join(f"{host}:1\n" for host in hosts))
        part.rename(self.hosts)

    def wait(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 240
        while not reached():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def worlds(self) -> list[int]:
        return [header["world_size"] for header in self.place.records("run", "header")]

    def step(self) -> int:
        return max((record["step"] for record in self.place.records("run", "step")), default=0)

    def rank_on(self, host: str) -> psutil.Process:
        for process in psutil.process_iter(["cmdline"]):
            with contextlib.suppress(psutil.Error):
                words, here = process.info["cmdline"] or [], str(self.place.folder)
                ours = words[1:3] == ["-m", "disttrain"] and process.cwd() == here
                if ours and process.environ().get("HOROVOD_HOSTNAME") == host:
                    return process
        raise AssertionError(f"no rank on {host}\n{self.log.read_text()}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_rank_and_a_new_host(tmp_path: Path) -> None:
    need("horovod")
    place = Workplace(tmp_path)
    place.run("train", "run.yaml", *WORDS[1:], "--nproc", "2", "run.name=undisturbed")
    job = Job(place, "localhost", "127.0.0.1")
    try:
        job.wait(lambda: job.step() > 70)
        job.rank_on("127.0.0.1").send_signal(signal.SIGKILL)
        job.wait(lambda: job.worlds()[-1:] == [1] and job.step() > 120)
        job.give("localhost", "127.0.0.1", socket.gethostname())
        assert job.process.wait(240) == 0, job.log.read_text()
    finally:
        job.process.kill()
        subprocess.run(["pkill", "-9", "-f", "--", f"--host-discovery-script {tmp_path}"], check=False)
    assert job.worlds() == [2, 1, 2], job.log.read_text()
    ours, expected = place.curve("run"), place.curve("undisturbed")
    assert [row[0] for row in ours] == [row[0] for row in expected] == list(range(1, 501))
    assert [row[1] for row in ours[:100]] == pytest.approx([row[1] for row in expected[:100]], rel=1e-4)
    assert [row[3:] for row in ours] == [row[3:] for row in expected]


def test_what_cannot_change_its_ranks_is_refused() -> None:
    horovod = config_for("gpt", **{"engine": "horovod", "checkpoint.every": 10})
    assert elastic._problems(horovod) == []
    for key, value in (
        ("engine", "native"),
        ("parallel.tensor", 2),
        ("checkpoint.every", 0),
        ("checkpoint.resume", "never"),
    ):
        changed = config_for("gpt", **{"engine": "horovod", "checkpoint.every": 10, key: value})
        (problem,) = elastic._problems(changed)
        assert any(setting.startswith(f"{key}={value}") for setting in problem.settings)


def test_who_starts_again() -> None:
    assert failures.lost_a_peer(RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1"))
    assert not failures.lost_a_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    asked, told = Interruption(), Interruption()
    asked.signal, told.hosts_changed = signal.SIGTERM, True
    assert asked.requested and not told.requested  # data that is being prepared is not given up for a new host
    assert not elastic.goes_on(130, asked) and elastic.goes_on(130, told) and not elastic.goes_on(0, told)
