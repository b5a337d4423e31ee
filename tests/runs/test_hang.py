"""A real run of which one rank stops: the others say which one, and the same command goes on."""

import os
import re
import signal
import time
from contextlib import suppress

from typer.testing import CliRunner, Result

from disttrain.cli import app
from disttrain.config.problems import RefusedInput
from tests.runs.conftest import Workplace
from tests.runs.test_train import ranks_of, wait_for_step
from tests.warm import Running

COMMAND = ("train", "run.yaml", "--nproc", "4", "parallel.tensor=2", "run.timeout_s=5", "train.steps=24",
           "train.eval_every=0", "checkpoint.every=4")  # fmt: skip
WAITING = r"Rank 3 \(host \S+\) did not arrive. Ranks? [0-2][^.]* ha(s|ve) waited for rank 3 since"
GROUP = r"(tensor \(ranks 2, 3|data \(ranks 1, 3|world \(ranks 0 to 3)\)"
WHERE = rf"in \w+ number \d+ of group {GROUP}.* at disttrain/\S+\.py:\d+"


def test_a_rank_that_is_stopped_is_named_and_the_run_resumes(workplace: Workplace) -> None:
    process = workplace.start(*COMMAND)
    wait_for_step(workplace, process, 5)
    stopped = ranks_of(process)[3]
    os.kill(stopped, signal.SIGSTOP)
    assert explained(workplace).stdout.startswith("Rank 3 (host ")  # before anything has timed out
    said = until_explained(process)
    with suppress(ProcessLookupError):  # the others have ended it, on a slow machine
        os.kill(stopped, signal.SIGKILL)
    output = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in output, output
    assert output.count("did not arrive") == 1
    assert re.search(WAITING, said), said
    assert re.search(WHERE, said), said
    assert "rank 3 left no word" in said
    assert "other ranks did not answer" in (workplace.folder / "runs/run/logs/rank_0000.log").read_text()
    again = explained(workplace).stdout
    assert "".join(said.removeprefix("disttrain: ").split()) == "".join(again.split("┏")[0].split())
    workplace.run(*COMMAND)
    assert workplace.records("run", "step")[-1]["step"] == 24
    assert isinstance(explained(workplace).exception, RefusedInput)


SLOW_REPORT = """
import time
from disttrain import run
from disttrain.cli import main

draw = run.draw
run.draw = lambda folder: (time.sleep(4), draw(folder))[1]
main()
"""


def test_a_report_may_take_longer_than_a_collective(workplace: Workplace) -> None:
    (workplace.folder / "slow.py").write_text(SLOW_REPORT)
    words = ("train", "run.yaml", "--nproc", "2", "run.timeout_s=3", "train.steps=3", "train.eval_every=0")
    process = Running(words, workplace.folder, workplace.environment, workplace.folder / "slow.py")
    output = process.communicate(timeout=100)
    assert process.returncode == 0, output
    assert "did not arrive" not in output
    assert (workplace.folder / "runs/run/loss_curve.png").exists()


def explained(workplace: Workplace) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["explain", str(workplace.folder / "runs/run")])


def until_explained(process: Running) -> str:
    """The first line that is no progress."""
    while True:
        ended = process.poll() is not None
        for line in process.output.read_text().splitlines(keepends=True):
            if line.startswith("disttrain: ") and line.endswith("\n"):
                return line
        assert not ended, "the run ended without an explanation"
        time.sleep(0.05)
