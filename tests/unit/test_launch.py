import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from disttrain.config.problems import RefusedInput
from disttrain.launch import RankInfo, detect, environment_for_torch, expand_hostlist
from disttrain.launch.mpi import locate

RECORDINGS = {
    path.stem: json.loads(path.read_text()) for path in Path(__file__).parent.glob("launch_environments/*.json")
}
PROCESSES = [
    pytest.param(process, id=f"{name}-{index}")
    for name, recording in sorted(RECORDINGS.items())
    for index, process in enumerate(recording["processes"])
]
ACCEPTED = {name: r for name, r in sorted(RECORDINGS.items()) if "expected" in r["processes"][0]}


def recorded(name, process=0, **changes):
    """A recorded environment with variables changed; None removes one."""
    environ = {**RECORDINGS[name]["processes"][process]["environment"], **changes}
    return {key: value for key, value in environ.items() if value is not None}


def refusal(environ):
    with pytest.raises(RefusedInput) as caught:
        detect(environ)
    for problem in caught.value.problems:
        assert problem.settings and problem.message.endswith(".") and problem.fix.endswith(".")
    return caught.value.problems


def test_there_are_recordings_of_every_launcher():
    assert len(RECORDINGS) >= 30
    launchers = {process["expected"]["launcher"] for r in ACCEPTED.values() for process in r["processes"]}
    assert launchers == {"none", "torchrun", "deepspeed", "horovodrun", "openmpi", "mpich", "srun"}
    assert all(recording["recorded"] for recording in RECORDINGS.values())


@pytest.mark.parametrize("process", PROCESSES)
def test_recorded_environment(process):
    if "expected" in process:
        info = detect(process["environment"])
        assert asdict(info) == process["expected"]
        # What start() exports for torch must not look like a contradiction, or another launcher, afterwards.
        assert detect({**process["environment"], **environment_for_torch(info)}) == info
    else:
        assert [list(problem.settings) for problem in refusal(process["environment"])] == process["refused"]


@pytest.mark.parametrize("name", ACCEPTED)
def test_recorded_processes_form_one_world(name):
    infos = [detect(process["environment"]) for process in ACCEPTED[name]["processes"]]
    assert [info.rank for info in infos] == list(range(infos[0].world_size))
    shared = {(i.launcher, i.world_size, i.nodes, i.master_address, i.master_port, i.restart_count) for i in infos}
    assert len(shared) == 1
    if infos[0].nodes is not None:
        places = {(info.node_rank, info.local_rank) for info in infos}
        assert len(places) == infos[0].world_size
        assert {node for node, _ in places} == set(range(infos[0].nodes))
        for info in infos:
            assert info.local_world_size == sum(other.node_rank == info.node_rank for other in infos)


def test_plain_process():
    assert detect({"PATH": "/bin", "OMP_NUM_THREADS": "2"}) == RankInfo("none", 0, 1, 0, 1, 0, 1, "127.0.0.1", 0)


def test_world_of_one_exported_by_hand_is_a_plain_process():
    assert detect({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}).launcher == "none"


def test_torch_variables_set_by_hand():
    environ = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    info = detect({**environ, "MASTER_ADDR": "node0", "MASTER_PORT": "29400"})
    assert info == RankInfo("env", 3, 4, 1, 2, None, None, "node0", 29400)
    assert environment_for_torch(info) == {**environ, "MASTER_ADDR": "node0", "MASTER_PORT": "29400"}
    assert [problem.settings for problem in refusal(environ)] == [
        ("MASTER_ADDR is not set",),
        ("MASTER_PORT is not set",),
    ]


def test_rank_and_world_size_exported_from_slurm_agree_with_srun():
    environ = recorded("srun_in_sbatch", 3, RANK="3", WORLD_SIZE="4", LOCAL_RANK="1")
    assert detect(environ).launcher == "srun"


def test_srun_port_follows_job_step_and_requeue():
    ports = {
        detect(recorded("srun_in_sbatch", **changes)).master_port
        for changes in (
            {},
            {"SLURM_JOB_ID": "4711"},
            {"SLURM_STEP_ID": "1"},
            {"SLURM_RESTART_COUNT": "1"},
        )
    }
    assert len(ports) == 4
    assert all(1024 < port < 32768 for port in ports)
    assert detect(recorded("srun_in_sbatch", SLURM_RESTART_COUNT="2")).restart_count == 2


def test_srun_with_one_torchrun_a_node_is_torchrun_also_when_slurm_has_more_tasks_elsewhere():
    assert detect(recorded("torchrun_in_srun", 3)).launcher == "torchrun"
    assert detect(recorded("torchrun_in_srun", 3, SLURM_STEP_NUM_TASKS="1")).launcher == "torchrun"


def test_mpi_rank_from_pmix_without_a_world_is_refused():
    problems = refusal({"PMIX_RANK": "0", "PMIX_NAMESPACE": "job"})
    assert "PMIX_RANK=0" in problems[0].settings


CONTRADICTIONS = {
    "not an integer": (recorded("torchrun_2", RANK="one"), "RANK=one", "not an integer"),
    "negative": (recorded("mpich_2", PMI_RANK="-1"), "PMI_RANK=-1", "not an integer"),
    "rank outside the world": (recorded("torchrun_2", RANK="2"), "RANK=2", "does not exist"),
    "local rank outside the node": (recorded("deepspeed_2", LOCAL_RANK="2"), "LOCAL_SIZE=2", "does not exist"),
    "node rank outside the nodes": (recorded("torchrun_in_srun", GROUP_RANK="2"), "GROUP_RANK=2", "does not exist"),
    "more local ranks than ranks": (recorded("openmpi_4_2", OMPI_COMM_WORLD_LOCAL_SIZE="4"), "more than", "more than"),
    "empty world": (recorded("mpich_2", PMI_SIZE="0"), "PMI_SIZE=0", "at least one"),
    "another world size": (recorded("srun_2", WORLD_SIZE="8"), "WORLD_SIZE=8", "one thing"),
    "every task rank 0": (recorded("srun_2", 1, RANK="0"), "RANK=0", "told to be rank 0"),
    "every process alone": (recorded("openmpi_5_2", WORLD_SIZE="1"), "WORLD_SIZE=1", "rank 0 of 1"),
    "every slot alone": (recorded("horovodrun_2", WORLD_SIZE="1"), "HOROVOD_SIZE=2", "rank 0 of 1"),
    "another local rank": (recorded("mpich_2", 1, LOCAL_RANK="0"), "MPI_LOCALRANKID=1", "one thing"),
    "world size only": ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4", "no launcher"),
    "rank only": ({"RANK": "1"}, "RANK=1", "no launcher"),
    "local rank only": ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1", "no launcher"),
    "missing size": (recorded("torchrun_2", WORLD_SIZE=None), "WORLD_SIZE is not set", "not told"),
    "missing local rank": (recorded("torchrun_2", LOCAL_RANK=None), "LOCAL_RANK is not set", "not told"),
    "missing master address": (recorded("torchrun_2", MASTER_ADDR=None), "MASTER_ADDR is not set", "cannot meet"),
    "missing master port": (recorded("deepspeed_2", MASTER_PORT=None), "MASTER_PORT is not set", "common port"),
    "port too large": (recorded("torchrun_2", MASTER_PORT="70000"), "MASTER_PORT=70000", "65535"),
    "port 0": (recorded("torchrun_2", MASTER_PORT="0"), "MASTER_PORT=0", "65535"),
    "own host as master of two nodes": (recorded("openmpi_2_nodes", MASTER_ADDR="127.0.0.1"), "MASTER_ADDR", "itself"),
    "localhost as master of srun": (recorded("srun_in_sbatch", MASTER_ADDR="localhost"), "MASTER_ADDR", "itself"),
    "malformed host list": (recorded("srun_in_sbatch", SLURM_STEP_NODELIST="n[1-"), "SLURM_STEP_NODELIST", "host list"),
    "arbitrary order of hosts": (
        recorded("srun_in_sbatch", SLURM_DISTRIBUTION="arbitrary"), "MASTER_ADDR is not set", "cannot meet",
    ),
    "malformed tasks": (recorded("srun_in_sbatch", SLURM_STEP_TASKS_PER_NODE="2*2"), "TASKS_PER_NODE=2*2", "notation"),
    "horovodrun in mpirun": (
        {**recorded("openmpi_4_2"), **recorded("horovodrun_2", 1)}, "OMPI_COMM_WORLD_SIZE=2", "nested",
    ),
    "deepspeed in srun": ({**recorded("srun_2"), **recorded("deepspeed_2")}, "SLURM_STEP_NUM_TASKS=2", "nested"),
    "mpirun in srun tasks": ({**recorded("srun_2", 1), **recorded("openmpi_4_2")}, "SLURM_STEP_NUM_TASKS", "nested"),
    "torchrun in horovodrun over nodes": (
        {**recorded("horovodrun_2_nodes"), **recorded("torchrun_2", GROUP_WORLD_SIZE="2")}, "HOROVOD_SIZE=4", "nested",
    ),
}  # fmt: skip


@pytest.mark.parametrize("environ, setting, message", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradiction_is_refused_with_its_cause(environ, setting, message):
    said = [" ".join((*problem.settings, problem.message)) for problem in refusal(environ)]
    assert any(setting in text and message in text for text in said), said


def test_all_problems_are_told_at_once():
    problems = refusal(recorded("torchrun_2", RANK="x", LOCAL_RANK="5", MASTER_ADDR=None))
    assert len(problems) == 3


def test_fix_of_a_missing_master_names_the_option_of_the_launcher():
    assert "mpirun -x MASTER_ADDR" in refusal(recorded("openmpi_2_nodes_no_master"))[0].fix
    assert "mpiexec -genv MASTER_ADDR" in refusal(recorded("mpich_2_nodes_no_master"))[0].fix
    assert detect(recorded("mpich_2_nodes_no_master", MASTER_ADDR="node0")).world_size == 4


@pytest.mark.parametrize("name", ACCEPTED)
def test_mpi_is_not_asked_where_variables_tell_all(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # importing it would fail
    for process in ACCEPTED[name]["processes"]:
        assert locate(process["environment"]) == detect(process["environment"])


@pytest.mark.parametrize("name", ["openmpi_2_nodes_no_master", "mpich_2_nodes_no_master", "mpich_gforker_2"])
def test_mpi_is_asked_where_the_launcher_does_not_tell(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(RefusedInput) as caught:
        locate(recorded(name))
    (problem,) = caught.value.problems
    assert "pip install mpi4py, or set MASTER_ADDR" in problem.fix
    assert f"launcher {name.split('_')[0]}" in problem.settings


@pytest.mark.parametrize(
    "changes, message", [({"WORLD_SIZE": "1"}, "rank 0 of 1"), ({"MASTER_ADDR": "localhost"}, "itself")]
)
def test_contradictions_are_told_before_mpi_is_started(changes, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(RefusedInput, match=message):
        locate(recorded("openmpi_2_nodes_no_master", **changes))


@pytest.mark.parametrize(
    "hostlist, hosts",
    [
        ("node0", ["node0"]),
        ("node[01-03,07],gpu5", ["node01", "node02", "node03", "node07", "gpu5"]),
        ("gpu5,node[9-11]", ["gpu5", "node9", "node10", "node11"]),
        ("r[1-2]n[0,8]-ib", ["r1n0-ib", "r1n8-ib", "r2n0-ib", "r2n8-ib"]),
        ("node-a.cluster.example", ["node-a.cluster.example"]),
    ],
)
def test_hostlist(hostlist, hosts):
    assert expand_hostlist(hostlist) == hosts


@pytest.mark.parametrize("hostlist", ["", "node[", "node[1-", "node]1[", "node[a-b]", "node[3-1]", "a,,b", "a,"])
def test_malformed_hostlist(hostlist):
    with pytest.raises(ValueError, match="not a"):
        expand_hostlist(hostlist)


def test_launch_imports_no_torch():
    code = "import sys, disttrain.launch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_recordings_name_no_real_machine():
    for name, recording in RECORDINGS.items():
        for process in recording["processes"]:
            for variable, value in process["environment"].items():
                assert "/" not in value and not re.search(r"\d+\.\d+\.\d+\.\d+\b(?<!127\.0\.0\.1)", value), (
                    name,
                    variable,
                )
