"""The launcher scripts as a user edits them, and the real launchers behind them."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.components import BIN, MPICH, need
from tests.runs.conftest import Workplace

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "launchers"
LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_",
    "LOCAL_",
    "MASTER_",
    "OMPI_",
    "PMI",
    "HOROVOD_",
    "SLURM_",
    "TORCHELASTIC",
    "CROSS",
)
STEPS = 20
SMALL = (
    "model.layers=2",
    f"train.steps={STEPS}",
    "train.eval_every=0",
    "checkpoint.every=0",
    "optim.schedule=constant",
)
"""20 steps of a GPT of 2 layers, 32 wide, on sequences of 32 tokens, in fp32 (tests/runs/conftest.py has the rest)."""
LONG = (*SMALL, "train.steps=100000", "checkpoint.every=100000")
"""A run that somebody has to stop; its first steps are the same."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class Launcher:
    """A script, the line that a user edits in it, and what the machine needs for it."""

    script: str
    world: str
    needs: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)


OPENMPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}
"""What Open MPI wants in a container: to be root, and more ranks than cores."""
LAUNCHERS = {
    "torchrun": Launcher("torchrun.sh", "--standalone --nproc-per-node 2"),
    "deepspeed": Launcher("deepspeed.sh", "--num_accelerators 2 --master_port PORT", ("deepspeed",)),
    "horovodrun": Launcher("horovodrun.sh", "--gloo -np 2", ("horovod",)),
    "openmpi": Launcher("mpirun.sh", "-n 2", ("mpirun",), OPENMPI),
    "mpich": Launcher("mpirun.sh", "-n 2", ("mpich",), {
        "PATH": f"{MPICH}/bin:{BIN}:{os.environ['PATH']}", "LD_LIBRARY_PATH": f"{MPICH}/lib", "MASTER_PORT": "PORT",
    }),
}  # fmt: skip
"""By the name that disttrain gives each."""


class Place(Workplace):
    """A workplace whose commands are started by a launcher."""

    def environment_for(self, variables: dict[str, str]) -> dict[str, str]:
        outside = {name: text for name, text in self.environment.items() if not name.startswith(LAUNCHER_VARIABLES)}
        with_path = {"PATH": f"{BIN}:{os.environ['PATH']}", "COLUMNS": "160", "PYTHONIOENCODING": "utf-8"}
        return {
            **outside,
            **with_path,
            **{name: text.replace("PORT", str(free_port())) for name, text in variables.items()},
        }

    def script(self, name: str) -> tuple[list[str], dict[str, str]]:
        """A launcher's script with the two lines edited, and its environment."""
        launcher = LAUNCHERS[name]
        for component in launcher.needs:
            need(component)
        text = (SCRIPTS / launcher.script).read_text()
        for line, value in (("CONFIG", "run.yaml"), ("WORLD", f"({launcher.world.replace('PORT', str(free_port()))})")):
            text, edits = re.subn(rf"^{line}=.*$", f"{line}={value}", text, flags=re.MULTILINE)
            assert edits == 1
        path = self.folder / f"{name}.sh"
        path.write_text(text)
        path.chmod(0o755)
        return [str(path)], self.environment_for(launcher.variables)

    def launched(
        self, command: list[str], environment: dict[str, str], code: int | None = 0
    ) -> subprocess.CompletedProcess:
        """Run it to the end."""
        done = subprocess.run(command, cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, check=False, timeout=500)  # fmt: skip
        done.stdout = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)  # colours, where mpirun gives the ranks a terminal
        assert code is None or done.returncode == code, done.stdout
        return done

    def stopped(
        self, command: list[str], environment: dict[str, str], name: str, number: signal.Signals, step: int = 3
    ) -> tuple[int, str]:
        """Start the run of this name, send a signal to the launcher after so many steps; exit code and output."""
        log = self.folder / f"{name}.log"
        with log.open("w") as output:
            process = subprocess.Popen([*command, "train", "run.yaml", *LONG, f"run.name={name}"], cwd=self.folder,
                                       env=environment, stdin=subprocess.DEVNULL, stdout=output,
                                       stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        try:
            deadline = time.monotonic() + 300
            while len(self.records(name, "step")) < step:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)
            process.send_signal(number)
            return process.wait(200), log.read_text()
        finally:
            process.kill()
            for left in psutil.process_iter(["cmdline"]):  # a launcher that ends first leaves its ranks
                with contextlib.suppress(psutil.Error):
                    if f"run.name={name}" in (left.info["cmdline"] or []) and left.cwd() == str(self.folder):
                        left.kill()

    def saved_all(self, name: str) -> bool:
        """Whether the run ended with a checkpoint of its last step."""
        step = self.records(name, "step")[-1]["step"]
        reason = self.records(name, "summary")[-1]["stop_reason"]
        return (
            reason == "interrupted"
            and (self.folder / f"runs/{name}/checkpoints/step_{step:08d}/manifest.json").exists()
        )


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """One workplace for all, so that its data is prepared once; runs are told apart by their names."""
    return Place(tmp_path_factory.mktemp("launchers"))


@pytest.fixture(scope="session")
def local_curve(place: Place) -> list[tuple]:
    """The loss curve of the same run on two local ranks without any launcher."""
    place.run("train", "run.yaml", *SMALL, "--nproc", "2", "run.name=local")
    return place.curve("local")
