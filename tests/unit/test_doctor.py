import io
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch.distributed as dist
from rich.console import Console

from disttrain.config.problems import RefusedInput
from disttrain.doctor import (
    Diagnosis,
    Gpu,
    LinkSpeed,
    RankFacts,
    bus_bandwidth,
    contradictions,
    diagnose,
    notes,
    render,
)
from disttrain.doctor.contradictions import why_not_met
from disttrain.launch import RankInfo, detect, network
from disttrain.parallel import world

ALONE = RankInfo("none", 0, 1, 0, 1, 0, 1, "127.0.0.1", 0)
LAUNCHER_VARIABLES = ("RANK", "WORLD", "LOCAL", "MASTER", "OMPI", "PMI", "HOROVOD", "SLURM", "TORCHELASTIC", "CROSS")


@pytest.fixture(autouse=True)
def outside_any_launcher(monkeypatch):
    """Neither does a launcher around the tests matter, nor do variables of one test reach the next."""
    for name in list(os.environ):
        if name.startswith(LAUNCHER_VARIABLES):
            monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def rendered(diagnosis):
    console = Console(file=io.StringIO(), width=140)
    render(diagnosis, console)
    return console.file.getvalue()


def facts(rank, host="node0", local_rank=None, gpus=0, **changes):
    """Facts of a made-up rank; its host has `gpus` GPUs."""
    local_rank = rank if local_rank is None else local_rank
    seen = tuple(Gpu("NVIDIA H100", f"{host}-{index}", 80 * 1024**3) for index in range(gpus))
    versions = {"python": "3.11.7", "torch": "2.13.0", "cuda": "", "nccl": "", "disttrain": "0.1.0"}
    made = RankFacts(
        rank=rank,
        local_rank=local_rank,
        host=host,
        device=f"cuda:{local_rank}" if local_rank < gpus else "cpu",
        gpus=seen,
        cores=4,
        bound_to=(0, 1, 2, 3),
        versions=versions,
    )
    return replace(made, **changes)


def world_of(size, nodes, launcher="torchrun"):
    return RankInfo(launcher, 0, size, 0, size // nodes, 0, nodes, "node0", 29500)


def test_doctor_of_a_plain_process():
    diagnosis = diagnose()
    assert diagnosis.info == ALONE
    assert diagnosis.problems == [] and diagnosis.links == []
    own = diagnosis.ranks[0]
    assert own.host == socket.gethostname() and own.pid == os.getpid() and own.cpu
    assert "gloo" in own.backends and own.memory_bytes > 2**28 and own.disk_free_bytes > 0
    text = rendered(diagnosis)
    for word in ("launcher none", "world of 1", own.host, "python", "torch", "gloo", "GLOO_SOCKET_IFNAME", "GiB",
                 "deepspeed", "horovod", "mpi4py", "OMP_NUM_THREADS", "No contradictions"):  # fmt: skip
        assert word in text, word
    assert not dist.is_initialized()


def test_contradictory_environment_is_a_diagnosis_not_a_traceback(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "4")
    monkeypatch.setenv("WORLD_SIZE", "1")
    diagnosis = diagnose()
    assert diagnosis.info is None
    text = rendered(diagnosis)
    assert "WORLD_SIZE=1" in text and "rank 0 of 1" in text and "fix:" in text and "No contradictions" not in text


def test_ranks_that_do_not_meet_are_a_problem():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        lonely = replace(ALONE, launcher="env", rank=1, world_size=2, master_port=taken.getsockname()[1])
        diagnosis = diagnose(lonely, timeout_s=1)
    assert len(diagnosis.problems) == 1
    assert f"MASTER_PORT={lonely.master_port}" in diagnosis.problems[0].settings
    assert "rank 1 of 2" in diagnosis.problems[0].message
    assert not dist.is_initialized()


TWO_RANKS = """
import json, os, sys
from dataclasses import asdict
from disttrain.doctor import diagnose
diagnosis = diagnose()
with open(os.path.join(sys.argv[1], f"rank{diagnosis.info.rank}.json"), "w") as file:
    json.dump(asdict(diagnosis), file)
if diagnosis.info.rank == 0:
    from disttrain.doctor import render
    from rich.console import Console
    render(diagnosis, Console(width=140, file=open(os.path.join(sys.argv[1], "text"), "w")))
sys.exit(1 if diagnosis.problems else 0)
"""


def test_doctor_of_two_ranks(tmp_path):
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, str(script), str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first["ranks"] == second["ranks"] and first["links"] == second["links"]
    assert first["info"]["launcher"] == "torchrun" and first["info"]["world_size"] == 2
    assert [rank["rank"] for rank in first["ranks"]] == [0, 1]
    assert len({rank["pid"] for rank in first["ranks"]}) == 2
    assert [link["message_bytes"] for link in first["links"]] == [8, 65536, 1048576, 16777216]
    for link in first["links"]:
        assert 0 < link["seconds"] < 30
        assert link["bus_bytes_per_second"] == pytest.approx(link["message_bytes"] / link["seconds"])
    text = (tmp_path / "text").read_text()
    assert "world of 2 on 1 node" in text and "bus bandwidth = 2 (n - 1) / n" in text
    assert "latency" in text and "us (8 bytes), bandwidth" in text and "backend gloo" in text
    for rank in first["ranks"]:
        assert str(rank["pid"]) in text
        assert rank["gloo_interface"] in rank["interfaces"]
        assert f"{rank['gloo_interface']} {rank['gloo_address']}" in text


def test_bus_bandwidth():
    assert bus_bandwidth(4, 1_000_000, 0.5) == pytest.approx(3_000_000)
    text = rendered(
        Diagnosis(ALONE, [facts(0)], [LinkSpeed("gloo", 8, 25e-6, 0), LinkSpeed("gloo", 1048576, 1e-3, 2e9)])
    )
    assert "2.000 GB/s" in text and "1,048,576" in text
    assert "latency 25 us (8 bytes), bandwidth 2.000 GB/s (1,048,576 bytes)" in text


def test_equal_ranks_have_no_contradiction():
    ranks = [facts(0, gpus=2), facts(1, gpus=2), facts(2, "node1", 0, gpus=2), facts(3, "node1", 1, gpus=2)]
    assert contradictions(world_of(4, 2), ranks) == []


def only_problem(info, ranks):
    (problem,) = contradictions(info, ranks)
    return " ".join((*problem.settings, problem.message)), problem


def test_different_versions_are_named_with_their_ranks():
    old = facts(2).versions | {"torch": "2.11.0"}
    text, _ = only_problem(world_of(3, 1), [facts(0), facts(1), facts(2, versions=old)])
    assert "torch 2.13.0: 0, 1" in text and "torch 2.11.0: 2" in text


def test_patch_releases_of_python_may_differ_minor_ones_may_not():
    patch, minor = (facts(1).versions | {"python": version} for version in ("3.11.9", "3.12.1"))
    assert contradictions(world_of(2, 1), [facts(0), facts(1, versions=patch)]) == []
    assert "python 3.12" in only_problem(world_of(2, 1), [facts(0), facts(1, versions=minor)])[0]


def test_rank_without_a_gpu_beside_one_with():
    text, _ = only_problem(world_of(2, 2), [facts(0, gpus=1), facts(1, "node1", 0)])
    assert "rank 1: local rank 0 of node1, 0 GPUs" in text and "1 of 2 ranks have no GPU" in text


def test_gpus_hidden_from_the_ranks():
    ranks = [facts(rank, gpus=4, device="cpu") for rank in range(2)]
    ranks = [replace(own, gpus=own.gpus[own.rank : own.rank + 1]) for own in ranks]
    text, problem = only_problem(world_of(2, 1), ranks)
    assert "node0 has 2 GPUs" in text and "--gpu-bind=none" in problem.fix


def test_fewer_gpus_than_ranks_is_a_note():
    ranks = [facts(rank, gpus=1, device="cpu") for rank in range(2)]
    assert contradictions(world_of(2, 1), ranks) == []
    (note,) = notes(world_of(2, 1), ranks)
    assert "1 GPUs to 2 ranks" in note


def test_two_ranks_with_one_local_rank_on_a_host():
    text, _ = only_problem(world_of(2, 1), [facts(0), facts(1, local_rank=0)])
    assert "node0, local rank 0: ranks 0, 1" in text


def test_number_of_hosts_is_not_the_number_of_nodes():
    assert "2 nodes" in only_problem(world_of(2, 2), [facts(0), facts(1)])[0]
    unknown = replace(world_of(2, 2), nodes=None)
    assert contradictions(unknown, [facts(0), facts(1)]) == []


def test_hosts_are_counted_where_the_launcher_does_not_tell():
    ranks = [facts(0), facts(1, "node1", 0)]
    assert "world of 2 on 2 nodes" in rendered(Diagnosis(replace(world_of(2, 2), nodes=None), ranks))


def test_notes_about_threads_and_binding():
    assert notes(world_of(2, 1), [facts(0, threads=2), facts(1, threads=2)]) == []
    (crowded,) = notes(world_of(2, 1), [facts(0, threads=4), facts(1, threads=4)])
    assert "8 threads on 4 cores" in crowded and "OMP_NUM_THREADS=2" in crowded
    bound = [facts(0, bound_to=(0,)), facts(1, bound_to=(1,))]
    assert notes(world_of(2, 1), bound) == []
    (binding,) = notes(world_of(2, 1, "openmpi"), bound)
    assert "2 of 4 cores" in binding and "--bind-to none" in binding


def test_different_packages_and_mpi_libraries_are_named():
    packages = [{"horovod": "0.28.1", "wandb": "0.31.0"}, {"horovod": "0.28.0", "wandb": "0.30.0"}]
    text, _ = only_problem(world_of(2, 1), [facts(rank, packages=packages[rank]) for rank in range(2)])
    assert "horovod 0.28.0: 1" in text and "wandb" not in text
    libraries = [facts(0, mpi_library="Open MPI v4.1.4"), facts(1, mpi_library="MPICH Version: 5.0.2")]
    assert "MPI library MPICH Version: 5.0.2: 1" in only_problem(world_of(2, 1), libraries)[0]


def test_horovod_without_what_the_launcher_needs_is_a_note():
    def said(launcher, built, gpus=0):
        own = facts(0, packages={"horovod": "0.28.1"}, horovod_built=built, gpus=gpus)
        return notes(world_of(1, 1, launcher), [own])

    assert said("openmpi", ("mpi", "gloo")) == said("horovodrun", ("gloo",)) == []
    for launcher in ("openmpi", "mpich"):
        (note,) = said(launcher, ("gloo",))
        assert "built without MPI" in note and "rank 0 of 1" in note
    assert "install_horovod.sh" in said("openmpi", ())[0]
    assert "without NCCL" in said("horovodrun", ("gloo",), gpus=1)[0]
    text = rendered(Diagnosis(ALONE, [facts(0, packages={"horovod": "0.28.1"}, horovod_built=("mpi", "gloo"))]))
    assert "0.28.1 with mpi, gloo" in text


def test_networks_that_were_hardly_meant_are_notes():
    apart = [facts(rank, f"node{rank}", 0, gloo_interface="eth0", master_interface="ib0") for rank in range(2)]
    assert "On node0 gloo speaks through eth0, while the route to rank 0 is ib0" in notes(world_of(2, 2), apart)[0]
    together = [replace(own, host="node0") for own in apart]
    assert notes(world_of(2, 1), together) == []
    named = facts(0, variables={"NCCL_SOCKET_IFNAME": "ib9"}, interfaces=("lo", "eth0"))
    assert "NCCL_SOCKET_IFNAME=ib9 takes no interface of node0: lo, eth0" in notes(world_of(1, 1), [named])[0]


REASONS = {
    "no such interface": (
        {"variables": {"GLOO_SOCKET_IFNAME": "eth9"}, "gloo_interface": "", "master_interface": "eth0"},
        "GLOO_SOCKET_IFNAME=eth9", "Set GLOO_SOCKET_IFNAME=eth0",
    ),
    "loopback as master": (
        {"master_interface": "lo", "master_is_loopback": True}, "MASTER_ADDR=node0", "that all hosts reach",
    ),
    "no route": ({"master_interface": ""}, "MASTER_ADDR=node0", "common network"),
    "own name is the loopback": (
        {"master_interface": "eth0", "gloo_is_loopback": True, "gloo_address": "127.0.1.1"},
        "host name node1, which resolves to 127.0.1.1", "export GLOO_SOCKET_IFNAME=eth0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("changes, setting, fix", REASONS.values(), ids=REASONS)
def test_why_the_ranks_did_not_meet(changes, setting, fix):
    second = replace(world_of(2, 2), rank=1, node_rank=1)
    own = facts(1, "node1", 0, **{"gloo_interface": "eth0", "interfaces": ("lo", "eth0"), **changes})
    (problem,) = why_not_met(second, own)
    assert setting in "; ".join(problem.settings) and fix in problem.fix
    good = facts(1, "node1", 0, gloo_interface="eth0", master_interface="eth0")
    assert why_not_met(second, good) == []


def test_an_interface_that_does_not_exist_is_explained(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuchinterface0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        lonely = replace(ALONE, launcher="env", world_size=2, local_world_size=2, master_port=free.getsockname()[1])
    diagnosis = diagnose(lonely, timeout_s=1)
    said = [problem for problem in diagnosis.problems if "GLOO_SOCKET_IFNAME=nosuchinterface0" in problem.settings]
    assert len(said) == 1 and "interfaces that are up: " in said[0].settings[2]
    assert diagnosis.is_for_this_rank


def test_which_ranks_show_the_diagnosis():
    ranks = [facts(0), facts(1)]
    shown = {
        (rank, local, met): Diagnosis(
            replace(world_of(4, 2), rank=rank, local_rank=local), [facts(i) for i in range(4)] if met else ranks[:1]
        ).is_for_this_rank
        for rank, local, met in ((0, 0, True), (0, 0, False), (2, 0, True), (2, 0, False), (3, 1, False))
    }
    assert [place for place, yes in shown.items() if yes] == [(0, 0, True), (0, 0, False), (2, 0, False)]


def test_interfaces_of_this_host(monkeypatch):
    loopback = network.interface_of("127.0.0.1")
    assert loopback is not None and loopback.is_loopback and network.route_to("127.0.0.1") == loopback
    assert network.route_to("no-such-host.invalid") is None
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", loopback.name)
    assert network.gloo_interface(os.environ) == loopback
    assert network.gloo_interface({"GLOO_SOCKET_IFNAME": "nosuchinterface0"}) is None
    assert "127.0.0.1" not in network.reachable_candidates({})


@pytest.mark.parametrize(
    "variable, taken",
    [("", ["ib0"]), ("eth", ["eth0", "eth1"]), ("=eth1", ["eth1"]), ("^docker,lo", ["eth0", "eth1", "ib0"]), ("x", [])],
)
def test_interfaces_that_nccl_takes(monkeypatch, variable, taken):
    made = [network.Interface(name, (f"10.0.0.{index}",)) for index, name in enumerate(("eth0", "eth1", "ib0"), 1)]
    made += [network.Interface("docker0", ("172.17.0.1",)), network.Interface("lo", ("127.0.0.1",))]
    monkeypatch.setattr(network, "interfaces", lambda: made)
    assert list(network.nccl_interfaces({"NCCL_SOCKET_IFNAME": variable})) == taken


def test_world_of_one_has_a_working_group_and_no_network(monkeypatch):
    monkeypatch.setattr(dist, "TCPStore", None)
    world.start(ALONE, "cpu", 10)
    try:
        assert dist.get_world_size() == 1 and dist.get_backend() == "gloo"
        assert os.environ["WORLD_SIZE"] == "1" and detect(os.environ) == ALONE
    finally:
        world.stop()
    world.stop()
    assert not dist.is_initialized()


def test_unknown_network_interface_is_refused(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuchinterface0")
    with pytest.raises(RefusedInput, match="MASTER_ADDR"):
        world.start(ALONE, "cpu", 10)
    world.stop()


def test_doctor_imports_torch_only_when_asked():
    code = "import sys, disttrain.doctor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
