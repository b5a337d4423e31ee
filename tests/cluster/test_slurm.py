"""Shipped and written scripts on a real Slurm of two nodes: the same training, through every kind of end."""

import subprocess

import pytest
import yaml

from disttrain.checkpoint import damage
from tests.cluster.conftest import STEPS, Login
from tests.cluster.slurm import wait_until
from tests.components import BIN, need

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def same_as_one_process(login: Login, name: str, reference: Login) -> None:
    """Losses of 20 steps within rounding of one process, every step once."""
    ours, one = login.curve(name), reference.curve("one")
    assert [row[0] for row in ours] == list(range(1, 21))
    assert [row[1] for row in ours] == pytest.approx([row[1] for row in one], rel=1e-5)


def undisturbed(login: Login, name: str, reference: Login) -> None:
    """The run on four local ranks: every step once, bit for bit."""
    assert login.curve(name) == reference.curve("four")
    assert login.evaluations(name) == reference.evaluations("four")


@pytest.mark.parametrize("script, launcher", [("train.sbatch", "torchrun"), ("train_srun.sbatch", "srun")])
def test_two_nodes_train_like_one_process(script: str, launcher: str, login: Login, reference: Login) -> None:
    login.edit(script, "run.yaml train.steps=20")
    login.finished(login.submit(script))
    header = login.records("run", "header")[0]
    assert (header["launcher"], header["world_size"]) == (launcher, 4)
    same_as_one_process(login, "run", reference)


@pytest.mark.parametrize(
    "script, engine", [("train_deepspeed.sbatch", "deepspeed"), ("train_horovod.sbatch", "horovod")]
)
def test_other_engines_train_like_one_process(script: str, engine: str, login: Login, reference: Login) -> None:
    need(engine)
    login.edit(script, f"run.yaml train.steps=20 engine={engine}")
    login.finished(login.submit(script))
    same_as_one_process(login, "run", reference)


def test_the_deepspeed_launcher_hands_over_to_srun(login: Login, reference: Login) -> None:
    need("deepspeed")
    (login.folder / "hosts").write_text("n1 slots=2\nn2 slots=2\n")
    command = ["deepspeed", "--hostfile", "hosts", "--no_ssh_check", "--master_addr", "n1", "--launcher", "slurm",
               "--launcher_args", "--nodes=2 --ntasks-per-node=2", str(BIN / "disttrain"), "train", "run.yaml",
               "train.steps=20", "engine=deepspeed"]  # fmt: skip
    done = subprocess.run(command, cwd=login.folder, env=login.environment, stdin=subprocess.DEVNULL, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert login.records("run", "header")[0]["launcher"] == "srun"
    same_as_one_process(login, "run", reference)


def test_sweep_is_an_array_of_runs(login: Login) -> None:
    login.edit("sweep.sbatch", "run.yaml train.steps=12")
    (login.folder / "slurm" / "sweep.txt").write_text("optim.lr=1e-3\noptim.lr=2e-3 run.name=second\n")
    login.finished(login.submit("sweep.sbatch"))
    for name, rate in (("gpt_tiny-1", 1e-3), ("second", 2e-3)):
        assert login.records(name, "summary")[-1]["step"] == 12
        assert login.records(name, "step")[1]["learning_rate"] == pytest.approx(rate)


def test_a_comparison_is_an_array_of_tasks(login: Login, reference: Login) -> None:
    """Four ranks on both nodes and one rank on one, each as a task; the second is warned, queued again and goes on."""
    sweep = {"config": "run.yaml", "repeats": 1, "launcher": "srun", "strategies": {"four": {"nproc": 4}, "one": None},
             "slurm": {"nodes": 2, "gpus_per_node": 0, "ranks_per_node": 2, "cpus_per_rank": 2, "time": "20"}}  # fmt: skip
    (login.folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    job = login.run("compare", "sweep.yaml", "--array", "--submit").stdout.strip()
    login.wait_for_step("sweep/runs/one-1", 20)
    login.cluster("scancel", "--batch", "--signal=USR1", f"{job}_2")
    login.finished(job)
    assert [r["world_size"] for r in login.records("sweep/runs/four-1", "header")] == [4]
    assert len(login.records("sweep/runs/one-1", "header")) == 2
    undisturbed(login, "sweep/runs/four-1", reference)
    shown = login.run("compare", "sweep.yaml", "--report-only").stdout
    assert "2 ways to train" in shown and (login.folder / "runs/sweep/report.html").exists()


@pytest.mark.parametrize("script", ["train.sbatch", "train_horovod.sbatch"])
def test_a_warning_saves_and_requeues(script: str, login: Login, reference: Login) -> None:
    """SIGUSR1 to the batch script, as Slurm sends it before the time limit: checkpoint, queue, exactly on from there."""
    if script == "train_horovod.sbatch":  # of interest here is how mpirun ends
        need("mpirun")
    login.edit(script, "run.yaml")
    job = login.submit(script)
    login.wait_for_step("run", 20)
    login.cluster("scancel", "--batch", "--signal=USR1", job)
    wait_until(lambda: login.records("run", "summary") != [], 300, login.output)
    assert login.records("run", "summary")[0]["stop_reason"] == "interrupted"
    login.finished(job)
    assert "stopped at once" not in login.output()  # no launcher ends rank 0 while it writes its report
    undisturbed(login, "run", reference)
    assert login.cluster("scontrol", "show", "job", job).count("Restarts=1") == 1


def test_preemption_requeues(login: Login, reference: Login) -> None:
    """A job of a higher partition takes the nodes: SIGTERM reaches the ranks, and the job comes back afterwards."""
    login.edit("train_srun.sbatch", "run.yaml")
    job = login.submit("train_srun.sbatch")
    login.wait_for_step("run", 20)
    login.cluster("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 1", "--output=/dev/null")
    wait_until(lambda: login.records("run", "summary") != [], 300, login.output)
    login.finished(job)
    undisturbed(login, "run", reference)


def test_cancelling_leaves_a_good_checkpoint(login: Login) -> None:
    login.edit("train_srun.sbatch", "run.yaml")
    job = login.submit("train_srun.sbatch")
    login.wait_for_step("run", 20)
    login.cluster("scancel", job)
    login.finished(job, "CANCELLED")
    wait_until(lambda: login.records("run", "summary") != [], 300, login.output)
    last = login.records("run", "step")[-1]["step"]
    assert last < STEPS
    assert damage(login.folder / f"runs/run/checkpoints/step_{last:08d}") is None


def test_a_dead_node_is_survived(login: Login, reference: Login) -> None:
    """The second node is switched off in the middle; with it back, the job goes on from the last checkpoint."""
    login.edit("train_srun.sbatch", "run.yaml")
    job = login.submit("train_srun.sbatch")
    login.wait_for_step("run", 30)
    login.cluster.kill_node("n2")
    try:
        wait_until(lambda: login.cluster.state(job) == "PENDING", 300, login.output)
    finally:
        login.cluster.start_node("n2")
    login.finished(job)
    undisturbed(login, "run", reference)


def test_the_command_submits(login: Login) -> None:
    words = ["slurm", "run.yaml", "train.steps=12", "--gpus-per-node", "0", "--ranks-per-node", "2", "--time", "15"]
    done = login.run(*words, "--submit", "--out", "job.sbatch")
    login.finished(done.stdout.strip())
    assert len(login.records("run", "step")) == 12
    assert login.records("run", "header")[0]["world_size"] == 4
    refused = login.run(*words, "--partition", "none", "--submit", code=2)
    assert "invalid partition" in refused.stderr


def test_a_refused_run_is_not_requeued(login: Login) -> None:
    login.edit("train_srun.sbatch", "run.yaml train.global_batch_size=7")
    job = login.submit("train_srun.sbatch", "--nodes=1")
    login.finished(job, "FAILED")
    assert "1 problem" in login.output()
    assert "ExitCode=2:0" in login.cluster("scontrol", "show", "job", job)
