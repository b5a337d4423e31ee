"""A private Slurm for each test process, and a folder that shipped scripts are submitted from."""

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.cluster.slurm import Cluster, wait_until
from tests.components import need
from tests.runs.conftest import SETTINGS, Workplace

ROOT = Path(__file__).resolve().parents[2]
STEPS = 80
"""Long enough to be caught in the middle."""


class Login(Workplace):
    """A workplace on the login node of a cluster: shipped scripts in `slurm/`, run.yaml with a longer run."""

    def __init__(self, folder: Path, cluster: Cluster):
        super().__init__(folder)
        self.cluster = cluster
        shutil.copytree(ROOT / "slurm", folder / "slurm")
        settings = {**SETTINGS, "model": {**SETTINGS["model"], "layers": 2}, "checkpoint": {"every": 25},
                    "train": {**SETTINGS["train"], "steps": STEPS, "eval_every": 50}}  # fmt: skip
        (folder / "run.yaml").write_text(yaml.safe_dump(settings))

    @property
    def environment(self) -> dict[str, str]:
        """What a user has after activating the environment; mpirun refuses root otherwise."""
        ours = {**self.cluster.environment, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
        ours["PATH"] = f"{Path(sys.executable).parent}:{ours['PATH']}"
        return ours | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}

    def edit(self, script: str, config: str) -> None:
        """Edit the line CONFIG of a shipped script, as a user does."""
        path = self.folder / "slurm" / script
        text, found = re.subn(r"^CONFIG=\(.*\)$", f"CONFIG=({config})", path.read_text(), flags=re.MULTILINE)
        assert found == 1
        path.write_text(text)

    def submit(self, script: str, *options: str) -> str:
        """Submit a script of slurm/ with two ranks a node; the job's id."""
        tasks = [] if script == "train.sbatch" else ["--ntasks-per-node=2"]
        small = ["--gpus-per-node=2", "--cpus-per-task=2", *tasks]
        return self.cluster("sbatch", "--parsable", *small, *options, f"slurm/{script}", cwd=self.folder,
                            env=self.environment)  # fmt: skip

    def finished(self, job: str, state: str = "COMPLETED") -> None:
        """Wait for the end of a job and hold it to its state."""
        assert self.cluster.wait(job) == state, self.output()

    def output(self) -> str:
        """What all jobs printed."""
        return "\n".join(path.read_text(errors="replace")[-20000:] for path in self.folder.glob("*.log"))

    def wait_for_step(self, name: str, step: int) -> None:
        """Wait until a run has recorded a step."""
        wait_until(lambda: any(r["step"] >= step for r in self.records(name, "step")), 600, self.output)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    need("slurm")
    running = Cluster()
    try:
        yield running.start()
    finally:
        running.stop()


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> Login:
    """The first 20 steps in one process, and the whole run on four local ranks, undisturbed."""
    login = Login(tmp_path_factory.mktemp("reference"), cluster)
    login.run("train", "run.yaml", "run.name=one", "train.steps=20")
    login.run("train", "run.yaml", "run.name=four", "--nproc", "4")
    return login


@pytest.fixture
def login(tmp_path: Path, cluster: Cluster) -> Iterator[Login]:
    yield Login(tmp_path, cluster)
    cluster("scancel", "--state=PENDING")
    cluster("scancel", "--state=RUNNING")  # what a failed test left
