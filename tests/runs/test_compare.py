"""`disttrain compare`, the real command: two strategies trained and reported, an interruption, and what it refuses."""

import signal
import time
from pathlib import Path

import psutil
import yaml

from disttrain.compare.report import FILES
from tests.runs.conftest import Workplace
from tests.unit.compare import made_up

PROGRAM = str(Path(made_up.__file__))


def sweep(workplace: Workplace, strategies: dict, **more) -> None:
    tree = {"config": "run.yaml", "repeats": 1, **more, "strategies": strategies}
    (workplace.folder / "sweep.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))


def made_up_sweep(workplace: Workplace, strategies: dict, **more) -> None:
    """A sweep whose runs are made up in milliseconds."""
    sweep(workplace, strategies, launcher=["{python}", PROGRAM, "{nproc}"], **more)


def test_two_strategies_are_trained_and_reported(workplace: Workplace) -> None:
    sweep(workplace, {"ddp": {"nproc": 2}, "single": None, "pp": {"layout": "pp2-1f1b", "optional": True}})
    short = ("train.steps=5", "train.eval_every=0", "checkpoint.every=0")
    done = workplace.run("compare", "sweep.yaml", *short)
    folder = workplace.folder / "runs/sweep"
    assert {name: len(workplace.records(f"sweep/runs/{name}", "step")) for name in ("ddp-1", "single-1")} == {
        "ddp-1": 5, "single-1": 5}  # fmt: skip
    assert workplace.records("sweep/runs/ddp-1", "header")[0]["world_size"] == 2
    first = {name: (folder / name).read_bytes() for name in FILES}
    page = first["report.html"].decode()
    assert all(f"{name}</td>" in page or f"{name} <span" in page for name in ("ddp", "single"))
    assert "What could not run, and why" in page and "layers" in page  # one layer makes no pipeline of two
    assert "1/2  ddp-1" in done.stdout and "Fastest: " in done.stdout
    again = workplace.run("compare", "sweep.yaml", *short)
    assert again.stdout.count("done before") == 2 and len(workplace.records("sweep/runs/ddp-1", "header")) == 1
    workplace.run("report", "runs/sweep")
    assert {name: (folder / name).read_bytes() for name in FILES} == first
    workplace.run("report", "runs/sweep/runs/single-1", "runs/sweep/runs/ddp-1", "--out", "both")
    assert sorted(path.name for path in (workplace.folder / "both").iterdir()) == sorted(FILES)
    refused = workplace.run("compare", "sweep.yaml", "train.steps=6", *short[1:], code=2)
    assert "train.steps=6" in refused.stderr and "cannot be mixed" in refused.stderr and "--out" in refused.stderr


def test_ctrl_c_saves_and_the_same_command_goes_on(workplace: Workplace) -> None:
    sweep(workplace, {"long": {"settings": {"train.steps": 100000, "train.eval_every": 0, "checkpoint.every": 0}}})
    process = workplace.start("compare", "sweep.yaml")
    while not workplace.records("sweep/runs/long-1", "step"):
        assert process.poll() is None, process.output.read_text()
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command goes on" in output, output
    assert children and not psutil.wait_procs(children, timeout=10)[1]
    assert list((workplace.folder / "runs/sweep/runs/long-1/checkpoints").glob("step_*"))


def test_runs_one_by_one_as_tasks_of_an_array(workplace: Workplace) -> None:
    made_up_sweep(workplace, {"a": None, "bad": {"settings": {"optim.lr": 0.3}}, "three": {"nproc": 3, "optional": True}},
                  repeats=2, nproc=2, slurm={"gpus_per_node": 0, "ranks_per_node": 2, "time": "20"})  # fmt: skip
    listed = workplace.run("compare", "sweep.yaml", "--list").stdout
    assert [line.split()[:3] for line in listed.splitlines()[1:4]] == [
        ["1", "a-1", "2"],
        ["2", "bad-1", "2"],
        ["3", "three-1", "3"],
    ]
    assert "three is left out" in listed and not (workplace.folder / "runs").exists()
    script = workplace.run("compare", "sweep.yaml", "--array").stdout
    assert "#SBATCH --array=1-6%1\n" in script and "#SBATCH --ntasks-per-node=2\n" in script
    assert "COMPARE=(sweep.yaml --out runs/sweep)\n" in script
    assert '-m disttrain compare "${COMPARE[@]}" --task "$SLURM_ARRAY_TASK_ID" &\n' in script
    assert (workplace.folder / "runs/sweep/compare.json").exists()
    for task, code in ((1, 0), (2, 1), (3, 0), (4, 0)):
        workplace.run("compare", "sweep.yaml", "--task", str(task), code=code)
    assert (workplace.folder / "order.txt").read_text().split() == ["a-1", "bad-1", "a-2"]
    shown = workplace.run("compare", "sweep.yaml", "--report-only").stdout
    assert "bad refused: repeat 1: they differ" in shown and "three refused" in shown
    assert "there are 6 runs" in workplace.run("compare", "sweep.yaml", "--task", "7", code=2).stderr


def test_a_failure_is_in_the_report_and_in_the_exit_code(workplace: Workplace) -> None:
    made_up_sweep(workplace, {"a": None, "bad": {"settings": {"optim.lr": 0.2}}}, nproc=2)
    shown = workplace.run("compare", "sweep.yaml", "--out", "there", code=1).stdout
    assert "bad out of memory" in shown and (workplace.folder / "there/report.html").exists()
    assert not (workplace.folder / "runs").exists()
    made_up_sweep(workplace, {"bad": {"settings": {"optim.lr": 0.2}}}, nproc=2)
    shown = workplace.run("compare", "sweep.yaml", code=1).stdout
    assert "bad-1  out of memory" in shown and "no run is done; what they printed is in runs/sweep/logs" in shown


def test_what_is_refused_leaves_nothing_behind(workplace: Workplace) -> None:
    made_up_sweep(workplace, {"a": {"nproc": 3}, "b": {"settings": {"optim.lrr": 1}}})
    said = workplace.run("compare", "sweep.yaml", code=2).stderr
    assert "strategy a" in said and "strategy b, optim.lrr" in said and "did you mean 'optim.lr'?" in said
    assert "does not exist" in workplace.run("compare", "sweeep.yaml", code=2).stderr
    assert "--report-only" in workplace.run("compare", "sweep.yaml", "--report-only", "--list", code=2).stderr
    assert "cannot be read" in workplace.run("compare", "sweep.yaml", "--report-only", code=2).stderr
    assert not (workplace.folder / "runs").exists()
