"""The ranks of an MPI job meet through mpi4py where variables do not tell how: real Open MPI and MPICH."""

import shlex
import signal
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.components import MPICH, need
from tests.launchers.conftest import LAUNCHERS, OPENMPI, SMALL, Place
from tests.launchers.hosts import Hosts

pytestmark = pytest.mark.timeout(900)

LOCATE = """
import os, subprocess, sys, threading
from dataclasses import asdict
from disttrain.config.problems import RefusedInput
from disttrain.launch.mpi import locate
try:
    info = locate(os.environ, keep="keep" in sys.argv)
except RefusedInput as refused:
    for problem in refused.problems:
        print("REFUSED", *problem.settings, problem.message, problem.fix, flush=True)
    sys.exit(2)
from mpi4py import MPI
assert MPI.Is_finalized() == ("keep" not in sys.argv)
child = os.fork()  # as a dataloader's workers
if child == 0:
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert subprocess.run(["true"]).returncode == 0
thread = threading.Thread(target=lambda: None)
thread.start(), thread.join()
sys.stdout.write(f"RANK {asdict(info)}\\n")
sys.stdout.flush()
if "fail" in sys.argv and info.rank == 1:
    sys.exit(int(sys.argv[-1]))
if "fail" in sys.argv:
    import time
    time.sleep(400 if info.launcher == "openmpi" else 1)
"""
WITHOUT = {
    "openmpi": "OMPI_COMM_WORLD_LOCAL_RANK OMPI_COMM_WORLD_LOCAL_SIZE",
    "mpich": "MPI_LOCALRANKID MPI_LOCALNRANKS",
}
"""Without these it is not known that all ranks are on one host."""


def silenced(name: str, *words: str, library: str = "") -> tuple[list[str], dict[str, str]]:
    """A command on three ranks of a launcher that does not tell where they run."""
    for component in (*LAUNCHERS[name].needs, "mpi4py"):
        need(component)
    mpirun = f"{MPICH}/bin/mpiexec" if name == "mpich" else "mpirun.openmpi"
    variables = {key: text for key, text in LAUNCHERS[name].variables.items() if key != "MASTER_PORT"}
    if library:
        variables["MPI4PY_LIBMPI"] = library
    inner = f"unset {WITHOUT[name]}; exec {shlex.join([sys.executable, *words])}"
    return [mpirun, "-n", "3", "sh", "-c", inner], variables


def ranks_in(said: str) -> list[dict]:
    """What the ranks printed, in order of rank."""
    found = [eval(line.split("RANK ", 1)[1]) for line in said.splitlines() if line.startswith("RANK ")]
    return sorted(found, key=lambda info: info["rank"])


@pytest.mark.parametrize("keep", ["", "keep"])
@pytest.mark.parametrize("name", WITHOUT)
def test_ranks_meet(place: Place, name: str, keep: str) -> None:
    command, variables = silenced(name, "-c", LOCATE, keep)
    said = place.launched(command, place.environment_for(variables)).stdout
    ranks = ranks_in(said)
    assert [info["rank"] for info in ranks] == [info["local_rank"] for info in ranks] == [0, 1, 2], said
    assert {info["launcher"] for info in ranks} == {name}
    places = {tuple(info[key] for key in ("world_size", "local_world_size", "nodes", "node_rank", "master_address"))
              for info in ranks}  # fmt: skip
    assert places == {(3, 3, 1, 0, "127.0.0.1")}
    (port,) = {info["master_port"] for info in ranks}
    assert port > 1023


@pytest.mark.parametrize("code", [1, 2, 130])
@pytest.mark.parametrize("name", WITHOUT)
def test_a_rank_that_fails_after_the_meeting_gives_the_job_its_code(place: Place, name: str, code: int) -> None:
    """Open MPI ends the other ranks; MPICH's mpiexec waits for them, as it does without any MPI in the ranks."""
    command, variables = silenced(name, "-c", LOCATE, "fail", str(code))
    place.launched(command, place.environment_for(variables), code=code)


def libmpi(name: str) -> str:
    """The library of an MPI, by its name or path."""
    return f"{MPICH}/lib/libmpi.so.12" if name == "mpich" else "libmpi.so.40"


@pytest.mark.parametrize("name, other", [("openmpi", "mpich"), ("mpich", "openmpi")])
def test_an_mpi4py_of_another_mpi_is_refused(place: Place, name: str, other: str) -> None:
    for component in LAUNCHERS[other].needs:
        need(component)
    command, variables = silenced(name, "-c", LOCATE, library=libmpi(other))
    said = place.launched(command, place.environment_for(variables), code=2).stdout
    assert "each process would be rank 0 of 1" in said and "MPI4PY_LIBMPI" in said
    assert "Aborting" not in said and "Traceback" not in said


def test_a_missing_mpi4py_is_one_problem(place: Place) -> None:
    hidden = "import sys; sys.modules['mpi4py'] = None\n"
    command, variables = silenced("openmpi", "-c", hidden + LOCATE)
    said = place.launched(command, place.environment_for(variables), code=2).stdout
    assert "pip install mpi4py, or set MASTER_ADDR" in said and "Traceback" not in said


def test_mpi4py_is_not_needed_where_all_is_known(place: Place) -> None:
    need("mpirun")
    lookup = "import sys; sys.modules['mpi4py'] = None\nimport os\nfrom disttrain.launch.mpi import locate\n" \
             "assert locate(os.environ).world_size == 2"  # fmt: skip
    place.launched(["mpirun.openmpi", "-n", "2", sys.executable, "-c", lookup], place.environment_for(OPENMPI))


def test_training_after_the_meeting_is_the_same(place: Place, local_curve: list[tuple]) -> None:

    command, variables = silenced("openmpi", "-m", "disttrain", "train", "run.yaml", *SMALL, "run.name=met")
    command[command.index("3")] = "2"
    place.launched(command, place.environment_for(variables))
    assert place.curve("met") == local_curve


def test_usr1_of_plain_mpirun_saves_a_checkpoint(place: Place) -> None:
    need("mpirun")
    command = ["mpirun.openmpi", "-n", "2", sys.executable, "-m", "disttrain"]
    code, said = place.stopped(command, place.environment_for(OPENMPI), "usr1", signal.SIGUSR1)
    assert place.saved_all("usr1"), said
    assert code == 130, said


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    for component in ("namespaces", "mpirun", "mpi4py"):
        need(component)
    with Hosts(tmp_path) as two:
        yield two


def test_two_hosts_without_master_addr(place: Place, hosts: Hosts, local_curve: list[tuple]) -> None:
    """Hosts with names, networks and host files of their own; nobody says where rank 0 runs."""
    start = ["mpirun.openmpi", *hosts.options, "-n", "2", sys.executable]
    environment = place.environment_for(OPENMPI)
    told = ranks_in(place.launched([*start, "-c", textwrap.dedent(LOCATE)], environment).stdout)
    assert [(info["node_rank"], info["nodes"], info["local_rank"]) for info in told] == [(0, 2, 0), (1, 2, 0)]
    assert {info["master_address"] for info in told} == {hosts.addresses[0]}
    said = place.launched([*start, "-m", "disttrain", "doctor"], environment).stdout
    assert "launcher openmpi: world of 2 on 2 nodes" in said and f"eth0 {hosts.addresses[1]}" in said, said
    place.launched([*start, "-m", "disttrain", "train", "run.yaml", *SMALL, "run.name=two_hosts"], environment)
    assert place.curve("two_hosts") == local_curve
    fooled = {**environment, "MASTER_ADDR": "127.0.0.1"}
    said = place.launched([*start, "-m", "disttrain", "doctor"], fooled, code=1).stdout
    assert "every node would look for rank 0 on itself" in " ".join(said.split())


def test_only_rank_0_gives_the_right_answer() -> None:
    """The answer on the other side is checked: somebody else may listen at that address."""
    from disttrain.launch import mpi

    answering = mpi._Answering()
    candidates, port, token, reason = answering.offer(["127.0.0.1"], 0)
    try:
        assert (candidates, reason) == (["127.0.0.1"], "")
        assert mpi._answers("127.0.0.1", port, token)
        assert not mpi._answers("127.0.0.1", port, b"x" * 16)
        taken = mpi._Answering().offer(["127.0.0.1"], port)
        assert taken[0] == [] and f"cannot listen on port {port}" in taken[3]
    finally:
        answering.stop()
    assert not mpi._answers("127.0.0.1", port, token)
