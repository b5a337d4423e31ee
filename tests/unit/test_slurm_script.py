"""Scripts for Slurm without a Slurm: the shipped ones, what the command writes and what it refuses."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from disttrain.config.load import load
from disttrain.config.problems import RefusedInput
from disttrain.slurm_script import Job, launcher_for, problems, render, seconds, submit, sweep_problems
from tests.runs.conftest import Workplace

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/gpt_tiny.yaml"
ACCOUNT = "my_account"
SHIPPED: dict[str, tuple[Job, list[str]]] = {
    "train.sbatch": (Job(account=ACCOUNT, launcher="torchrun"), [CONFIG]),
    "train_srun.sbatch": (Job(account=ACCOUNT), [CONFIG]),
    "train_deepspeed.sbatch": (Job(account=ACCOUNT), [CONFIG, "engine=deepspeed"]),
    "train_horovod.sbatch": (Job(account=ACCOUNT, launcher="mpirun"), [CONFIG, "engine=horovod"]),
    "sweep.sbatch": (Job(account=ACCOUNT, nodes=1, sweep=("slurm/sweep.txt", 2)), [CONFIG]),
}
"""The scripts in slurm/; `python -m tests.unit.test_slurm_script` writes them anew."""

CPUS = Job(nodes=2, gpus_per_node=0, ranks_per_node=2)


def shipped(name: str) -> str:
    job, words = SHIPPED[name]
    return render(job, "gpt_tiny", words)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_scripts_are_what_the_command_writes(name: str) -> None:
    assert (ROOT / "slurm" / name).read_text() == shipped(name)
    subprocess.run(["bash", "-n", str(ROOT / "slurm" / name)], check=True)


def test_there_is_no_other_script() -> None:
    assert {path.name for path in (ROOT / "slurm").iterdir()} == {*SHIPPED, "sweep.txt"}


@pytest.mark.parametrize(
    "name, options",
    [
        ("train.sbatch", ["--launcher", "torchrun"]),
        ("train_srun.sbatch", []),
        ("sweep.sbatch", ["--nodes", "1", "--sweep", "slurm/sweep.txt"]),
    ],
)
def test_command_writes_the_shipped_scripts(name: str, options: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "disttrain", "slurm", CONFIG, "--account", ACCOUNT, "--python", "python", *options]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (printed.stdout, printed.returncode) == (shipped(name), 0), printed.stderr
    out = tmp_path / "job.sbatch"
    written = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (written.stdout, out.read_text()) == ("", shipped(name))


def test_commands_of_the_manual(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "slurm.md").read_text()
    commands = re.findall(r"^disttrain (slurm .*)$", text, flags=re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        words = [word for word in shlex.split(command) if word != "--submit"]  # submitted in tests/cluster
        words = [str(tmp_path / word) if word.endswith(".sbatch") else word for word in words]
        done = subprocess.run([sys.executable, "-m", "disttrain", *words], cwd=ROOT, capture_output=True, text=True,
                              check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
    for name in re.findall(r"^\| `(\w+\.sbatch)`", text, flags=re.MULTILINE):
        assert name in SHIPPED


def test_options_reach_the_script() -> None:
    job = Job(4, 0, 3, 5, "me", "cpu,spare", "2:00:00", "torchrun", requeue=False)
    script = render(job, "small", ["my runs/a.yaml", "data.path=[a b, c]"], "/opt/my env/bin/python")
    for line in ("#SBATCH --nodes=4", "#SBATCH --ntasks-per-node=1", "#SBATCH --cpus-per-task=15", "#SBATCH --account=me",
                 "#SBATCH --partition=cpu,spare", "#SBATCH --time=2:00:00", "#SBATCH --job-name=small",
                 "#SBATCH --no-requeue", "CONFIG=('my runs/a.yaml' 'data.path=[a b, c]')",
                 "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-5}"):  # fmt: skip
        assert line in script.splitlines()
    assert "'/opt/my env/bin/python' --nnodes \"$SLURM_NNODES\" --nproc-per-node 3 " in script
    assert "gpus" not in script and "scontrol requeue" not in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    monkeypatch.chdir(tmp_path)
    return Workplace(tmp_path)


REFUSED = {
    "no ranks": (Job(gpus_per_node=0), [], "--ranks-per-node"),
    "ranks and GPUs": (Job(gpus_per_node=2, ranks_per_node=2), [], "one rank for each of its GPUs"),
    "GPUs not used": (Job(gpus_per_node=2), ["run.device=cpu"], "does not use"),
    "no GPU": (CPUS, ["run.device=cuda"], "asks for no GPU"),
    "account": (Job(2, 0, 2, account="a b"), [], "sacctmgr"),
    "partition": (Job(2, 0, 2, partition=""), [], "sinfo"),
    "time": (Job(2, 0, 2, time="1 day"), [], "D-HH:MM:SS"),
    "short": (Job(2, 0, 2, time="9:59"), [], "at least 10 minutes"),
    "resume never": (CPUS, ["checkpoint.resume=never"], "--no-requeue"),
    "batch does not divide": (Job(3, 0, 2), [], "global batch"),
}


@pytest.mark.parametrize("job, overrides, said", REFUSED.values(), ids=REFUSED)
def test_what_would_not_work_is_refused(workplace: Workplace, job: Job, overrides: list[str], said: str) -> None:
    found = problems(load("run.yaml", overrides), job)
    assert any(said in each.message + each.fix for each in found), found


def test_each_engine_has_its_launcher(workplace: Workplace) -> None:
    found = {
        engine: launcher_for(load("run.yaml", [f"engine={engine}"])) for engine in ("native", "deepspeed", "horovod")
    }
    assert found == {"native": "srun", "deepspeed": "srun", "horovod": "mpirun"}


def test_good_jobs_are_good(workplace: Workplace) -> None:
    assert problems(load("run.yaml"), CPUS) == []
    assert problems(load("run.yaml", ["checkpoint.resume=never"]), Job(2, 0, 2, time="5", requeue=False)) == []


def test_every_line_of_a_sweep_is_checked(workplace: Workplace) -> None:
    lines = workplace.folder / "sweep.txt"
    lines.write_text("optim.lr=1e-3 run.seed=3\noptim.lrr=1\n\ntrain.global_batch_size=6\n")
    found = sweep_problems(lines, Path("run.yaml"), [], CPUS)
    assert {each.settings[0].split(", ")[-1] for each in found} == {"line 2", "line 3", "line 4"}
    lines.write_text("")
    assert "is empty" in workplace.run("slurm", "run.yaml", "--sweep", "sweep.txt", code=2).stderr
    assert "cannot be read" in workplace.run("slurm", "run.yaml", "--sweep", "none.txt", code=2).stderr


def test_submitting_without_slurm_is_one_problem(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(workplace.folder))
    with pytest.raises(RefusedInput) as caught:
        submit("#!/bin/bash\n")
    assert ["login node" in each.fix for each in caught.value.problems] == [True]


def test_out_that_cannot_be_written_is_refused(workplace: Workplace) -> None:
    done = workplace.run("slurm", "run.yaml", "--gpus-per-node", "0", "--ranks-per-node", "2", "--out", "no/f", code=2)
    assert "--out no/f" in done.stderr


@pytest.mark.parametrize(
    "time, expected",
    [("90", 5400), ("90:30", 5400), ("1:30:00", 5400), ("2-3", 183600), ("2-3:10", 184200), ("2-3:10:05", 184200),
     ("", None), ("1:2:3:4", None), ("-1", None)],
)  # fmt: skip
def test_time_limits(time: str, expected: int | None) -> None:
    assert seconds(time) == expected


if __name__ == "__main__":
    for each in SHIPPED:
        (ROOT / "slurm" / each).write_text(shipped(each))
