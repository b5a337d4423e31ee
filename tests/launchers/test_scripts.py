"""Every launcher script trains the curve of local ranks, runs doctor, and ends with the right exit code."""

import signal
import subprocess

import pytest

from tests.chosen import ALL
from tests.launchers.conftest import LAUNCHERS, SCRIPTS, SMALL, STEPS, Place

pytestmark = pytest.mark.timeout(900)

EXIT_CODES = {
    "torchrun": {"refused": 1, "failed": 1, "interrupted": 1},
    "deepspeed": {"refused": 2, "failed": 1, "interrupted": 130},
    "horovodrun": {"refused": 1, "failed": 1, "interrupted": 1},
    "openmpi": {"refused": 2, "failed": 1, "interrupted": 130},
    "mpich": {"refused": 2, "failed": 1, "interrupted": 130},
}
"""What each launcher makes of the ranks' 2, 1 and 130; docs/launchers.md has the same table."""


ENDS = list(LAUNCHERS) if ALL else ["mpich"]
"""Of these a run goes to its end; of the others in test_deepspeed.py, test_mpi.py, tests/engines/test_horovod.py and, of
torchrun, tests/test_readme.py."""


@pytest.mark.parametrize("name", ENDS)
def test_a_run_ends_as_local_ranks_do(place: Place, local_curve: list[tuple], name: str) -> None:
    command, environment = place.script(name)
    place.launched([*command, "train", "run.yaml", *SMALL, f"run.name={name}"], environment)
    assert len(local_curve) == STEPS
    assert place.curve(name) == local_curve


@pytest.mark.parametrize("name", LAUNCHERS)
def test_doctor_names_launcher_and_world(place: Place, name: str) -> None:
    command, environment = place.script(name)
    said = place.launched([*command, "doctor"], environment).stdout
    for words in (f"launcher {name}: world of 2 on 1 node", "backend gloo", "gloo speaks through", "latency", "GB/s",
                  "No contradictions"):  # fmt: skip
        assert words in said, said


@pytest.mark.parametrize("name", LAUNCHERS)
def test_exit_codes(place: Place, name: str) -> None:
    command, environment = place.script(name)
    refused = place.launched([*command, "train", "run.yaml", "train.steps=none"], environment, code=None)
    assert refused.stdout.count("nothing was started") == 1, refused.stdout
    diverges = ("optim.lr=1e30", "optim.warmup_steps=0", "train.clip_grad_norm=null", f"run.name={name}_diverges")
    failed = place.launched([*command, "train", "run.yaml", *SMALL, *diverges], environment, code=None)
    assert "lower optim.lr" in failed.stdout, failed.stdout
    expected = EXIT_CODES[name]
    assert (refused.returncode, failed.returncode) == (expected["refused"], expected["failed"]), failed.stdout


@pytest.mark.parametrize(
    "name, number",
    [*((name, signal.SIGINT) for name in LAUNCHERS), ("torchrun", signal.SIGTERM), ("openmpi", signal.SIGTERM)],
)
def test_trains_as_local_ranks_do_until_an_interruption_which_leaves_a_checkpoint(
    place: Place, local_curve: list[tuple], name: str, number: signal.Signals
) -> None:
    command, environment = place.script(name)
    run = f"{name}_{number.name}"
    code, said = place.stopped(command, environment, run, number, step=STEPS)
    header = place.records(run, "header")[0]
    assert (header["launcher"], header["world_size"]) == (name, 2)
    assert place.curve(run)[:STEPS] == local_curve  # bit for bit
    assert place.saved_all(run), said
    assert code == EXIT_CODES[name]["interrupted"], said


def test_scripts_are_short_and_have_two_lines_to_edit() -> None:
    scripts = [path for path in SCRIPTS.glob("*.sh") if not path.name.startswith("install_")]
    assert sorted(path.name for path in scripts) == ["deepspeed.sh", "horovodrun.sh", "mpirun.sh", "torchrun.sh"]
    for path in scripts:
        lines = path.read_text().splitlines()
        assert len(lines) <= 20 and path.stat().st_mode & 0o111
        assert [line.split("=")[0] for line in lines[2:4]] == ["CONFIG", "WORLD"]
        subprocess.run(["bash", "-n", path], check=True)
