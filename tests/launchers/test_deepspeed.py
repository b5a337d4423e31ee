"""The deepspeed launcher's ways of reaching several hosts: a host file, one launcher a host without ssh, mpirun."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.components import need
from tests.launchers.conftest import OPENMPI, SMALL, Place, free_port
from tests.launchers.hosts import Hosts

pytestmark = pytest.mark.timeout(900)


def deepspeed(place: Place, hosts: dict[str, int], *words: str, name: str) -> list[str]:
    """A run of this name under deepspeed, with a host file of these hosts and their numbers of ranks."""
    need("deepspeed")
    file = place.folder / f"{name}.hosts"
    file.write_text("".join(f"{host} slots={slots}\n" for host, slots in hosts.items()))
    return ["deepspeed", "--hostfile", str(file), *words, "--no_local_rank", "--module", "disttrain", "train", "run.yaml",
            *SMALL, f"run.name={name}"]  # fmt: skip


def test_a_host_file_decides_on_the_ranks(place: Place, local_curve: list[tuple]) -> None:
    words = ("--no_ssh_check", "--master_addr", "127.0.0.1", "--master_port", str(free_port()))
    place.launched(deepspeed(place, {"localhost": 2}, *words, name="hostfile"), place.environment_for({}))
    assert place.records("hostfile", "header")[0]["launcher"] == "deepspeed"
    assert place.curve("hostfile") == local_curve


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    need("namespaces")
    with Hosts(tmp_path) as two:
        yield two


def test_two_hosts_without_ssh(place: Place, hosts: Hosts, local_curve: list[tuple]) -> None:
    """One launcher on each host, told its number; the ranks meet on the first host's address."""
    environment = place.environment_for({})
    started = []
    for number, host in enumerate(hosts.names):
        words = ("--no_ssh", "--node_rank", str(number), "--master_addr", hosts.addresses[0])
        command = deepspeed(place, dict.fromkeys(hosts.names, 1), *words, name="no_ssh")
        inside = ["ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host]
        with (place.folder / f"no_ssh_{number}.log").open("w") as log:
            started.append(subprocess.Popen([*inside, *command], cwd=place.folder, env=environment, stdout=log,
                                            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL))  # fmt: skip
    codes = [process.wait(500) for process in started]
    assert codes == [0, 0], "\n".join(path.read_text() for path in place.folder.glob("no_ssh_*.log"))
    header = place.records("no_ssh", "header")[0]
    assert (header["launcher"], header["world_size"]) == ("deepspeed", 2)
    assert place.curve("no_ssh") == local_curve


def test_through_mpirun(place: Place, local_curve: list[tuple]) -> None:
    """deepspeed hands over to mpirun, whose variables then tell the ranks."""
    need("mpirun")
    words = ("--no_ssh_check", "--master_addr", "127.0.0.1", "--launcher", "openmpi", "--force_multi",
             "--launcher_args", "--mca btl_tcp_if_include lo")  # fmt: skip
    place.launched(deepspeed(place, {"localhost": 2}, *words, name="by_mpirun"), place.environment_for(OPENMPI))
    assert place.records("by_mpirun", "header")[0]["launcher"] == "openmpi"
    assert place.curve("by_mpirun") == local_curve
