"""The Horovod engine equals the native one, in forked ranks and under the real horovodrun and mpirun; what it refuses."""

import json
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from disttrain import engines
from disttrain.config import horovod_checks
from disttrain.config.load import with_values
from disttrain.config.schema import Config
from disttrain.doctor.software import horovod_built
from disttrain.engines.horovod_world import places
from disttrain.mesh import build_mesh
from disttrain.parallel.collectives import Traffic
from disttrain.parallel.groups import make_groups
from disttrain.verify.batches import micro_batches
from tests.components import BIN, need
from tests.parallel.test_data_parallel import config_for, global_batch
from tests.ranks import disagreeing, gathered, run_ranks
from tests.runs.conftest import Workplace

STEPS = 5
ROOT = Path(__file__).resolve().parent.parent.parent
IN_A_CONTAINER = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                  "OMPI_MCA_rmaps_base_oversubscribe": "1"}  # fmt: skip
HOROVODRUN, MPIRUN = ("horovodrun", "--gloo", "-np", "2"), ("mpirun", "--bind-to", "none", "-n", "2")
HORIZON = ("train.steps=20", "train.micro_batch_size=2", "train.eval_every=0", "checkpoint.every=10")


def make(config: Config, rank: int, world: int) -> Any:
    groups = make_groups(build_mesh(config.parallel, world), rank, "cpu", Traffic())
    assert config.precision != "auto"
    return engines.build(config, groups, torch.device("cpu"), config.precision)


def train(rank: int, config: Config, world: int, family: str) -> dict[str, Any]:
    engine = make(config, rank, world)
    seen = []
    for step in range(STEPS):
        data_rank, data_ranks = engine.groups.mesh.data_rank(rank), engine.groups.mesh.data_ranks
        mine = micro_batches(global_batch(family, step), data_rank, data_ranks, config.train.micro_batch_size)
        result = engine.step(mine, step + 1, 0.01)
        losses = [float(loss.sum) / float(loss.count) for loss in result.losses.values()]
        seen.append([*losses, float(result.grad_norm), result.loss_scale, result.skipped])
    mine = micro_batches(
        global_batch(family, 99), engine.groups.mesh.data_rank(rank), engine.groups.mesh.data_ranks, None
    )
    scores = [float(total) / float(count) for total, count in engine.evaluate(mine).values()]
    found = {"seen": seen, "scores": scores, "traffic": engine.traffic(), "weights": gathered(engine, "weight"),
             "apart": disagreeing(engine, "weight")}  # fmt: skip
    engine.close()
    return found


def trained(config: Config, world: int, family: str = "gpt") -> list[dict[str, Any]]:
    return run_ranks(train, world, config, world, family, timeout_s=200)


@pytest.fixture(scope="module")
def references() -> dict[str, dict[str, Any]]:
    """One process, natively, by family."""
    return {family: trained(config_for(family), 1, family)[0] for family in ("gpt", "bert")}


def distance(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Largest difference between any two weights."""
    return max(float((w - expected["weights"][name]).abs().max()) for name, w in found["weights"].items())


CASES = [
    # family, ranks, settings
    ("gpt", 1, {}),
    ("gpt", 2, {"train.micro_batch_size": 1, "parallel.recompute": "full"}),
    ("gpt", 4, {"horovod.gradient_predivide": 3.0, "horovod.fusion_threshold_mib": 0.001, "horovod.cycle_time_ms": 0.5}),
    ("gpt", 4, {"parallel.tensor": 2, "parallel.sequence": True, "train.micro_batch_size": 2}),
    ("gpt", 2, {"parallel.context": 2}),
    ("bert", 2, {"train.micro_batch_size": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "world", "values"), CASES)
def test_equals_one_process(references: dict, family: str, world: int, values: dict) -> None:
    """float64, 1e-10: losses, norms, scores and weights after 5 clipped steps, by gloo and without any launcher."""
    need("horovod")
    found = trained(config_for(family, engine="horovod", **values), world, family)
    expected = references[family]
    assert min(step[-3] for step in found[0]["seen"]) > 0.5  # every step is clipped
    for ours in found:
        for got, want in zip(ours["seen"], expected["seen"], strict=True):
            assert got == pytest.approx(want, rel=1e-10)
        assert ours["scores"] == pytest.approx(expected["scores"], rel=1e-10)
    assert distance(found[0], expected) < 1e-10
    assert found[0]["apart"] == []


def test_fp16_compression_halves_the_gradients(references: dict) -> None:
    need("horovod")
    plain, half = (
        trained(config_for("gpt", engine="horovod", precision="fp32", **{"horovod.compression": codec}), 2)[0]
        for codec in ("none", "fp16")
    )
    for got, want in zip(half["seen"], references["gpt"]["seen"], strict=True):
        assert got == pytest.approx(want, rel=1e-3)
    gradients = STEPS * sum(weight.nbytes for weight in plain["weights"].values())
    (plain_sent, plain_whole, _), (sent, whole, _) = plain["traffic"], half["traffic"]
    assert plain_sent == plain_whole == whole
    assert plain_sent - sent == gradients / 2
    assert distance(half, plain) > 0  # it really was compressed


def test_overflow_is_skipped_by_all_ranks_as_natively() -> None:
    need("horovod")
    values = {"precision": "fp16", "loss_scale.initial": 2.0**19, "train.micro_batch_size": 2}
    native = trained(config_for("gpt", **values), 2)
    horovod = trained(config_for("gpt", engine="horovod", **values), 2)
    assert native[0]["seen"][0][-1] and not native[0]["seen"][-1][-1]
    for ours, theirs in zip(horovod, native, strict=True):
        assert [step[-2:] for step in ours["seen"]] == [step[-2:] for step in theirs["seen"]]
        assert [step[0] for step in ours["seen"]] == pytest.approx([step[0] for step in theirs["seen"]], rel=1e-5)
    assert horovod[0]["apart"] == []


def reduce_unused(rank: int) -> list[float | None]:
    """One parameter in use on both ranks, one on rank 1 only, one nowhere."""
    from disttrain.engines import horovod_world
    from disttrain.engines.horovod import Summed

    config = config_for("gpt", engine="horovod")
    groups = make_groups(build_mesh(config.parallel, 2), rank, "cpu", Traffic())
    both, one, nowhere = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(3))
    reduction = Summed(config, groups, *horovod_world.start(config, groups))
    parameters = [("both", both), ("one", one), ("nowhere", nowhere)]
    reduction.attach(torch.optim.SGD([p for _, p in parameters], lr=1.0), parameters)
    (both.sum() * (rank + 1) + (one.sum() * 5 if rank == 1 else 0)).backward()
    reduction.complete()
    reduction.update()
    reduction.close()
    return [None if p.grad is None else float(p.grad[0]) for _, p in parameters]


def test_a_parameter_that_some_or_no_ranks_use() -> None:
    need("horovod")
    assert run_ranks(reduce_unused, 2, timeout_s=120) == [[3.0, 5.0, None]] * 2


# under the real launchers


def launched(folder: Path, words: tuple[str, ...], *arguments: str, code: int = 0, **variables: str) -> str:
    """Run a Python program by a launcher, to its end."""
    environment = {**os.environ, **IN_A_CONTAINER, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
                   "PATH": f"{BIN}:{os.environ['PATH']}", **variables}  # fmt: skip
    done = subprocess.run([*words, sys.executable, *arguments], cwd=folder, env=environment, check=False, timeout=280,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    assert done.returncode == code, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """One workplace for all runs; "native" has run in it on two local ranks, with a checkpoint in the middle."""
    place = Workplace(tmp_path_factory.mktemp("horovod"))
    place.run("train", "run.yaml", *HORIZON, "--nproc", "2", "run.name=native")
    return place


def train_with(place: Workplace, words: tuple[str, ...], name: str, *settings: str) -> list[tuple]:
    launched(place.folder, words, "-m", "disttrain", "train", "run.yaml", *HORIZON, f"run.name={name}", *settings)
    return place.curve(name)


def equal(curve: list[tuple], expected: list[tuple]) -> None:
    """float32: the same steps, and losses and norms to 1e-5."""
    assert len(curve) == len(expected) >= 10
    for got, want in zip(curve, expected, strict=True):
        assert got == pytest.approx(want, rel=1e-5)


def test_horovodrun_trains_as_natively_and_its_checkpoint_goes_on_natively(place: Workplace) -> None:
    need("horovod")
    native = place.curve("native")
    horovod = train_with(place, HOROVODRUN, "horovod", "engine=horovod")
    equal(horovod, native)
    saved = "checkpoint.resume=runs/horovod/checkpoints/step_00000010"
    place.run("train", "run.yaml", *HORIZON, "run.name=onwards", "--nproc", "2", saved)
    equal(place.curve("onwards"), native[10:])


def test_mpirun_goes_on_from_a_native_checkpoint_exactly_and_writes_the_timeline(place: Workplace) -> None:
    need("horovod")
    need("mpirun")
    saved = "checkpoint.resume=runs/native/checkpoints/step_00000010"
    onwards = train_with(place, MPIRUN, "mpi", "engine=horovod", "horovod.timeline=true", saved)
    equal(onwards, place.curve("native")[10:])
    events = json.loads((place.folder / "runs/mpi/timeline.json").read_text())
    names = {event.get("name") for event in events} | {event.get("args", {}).get("name") for event in events}
    assert {"MPI_ALLREDUCE", "allreduce.blocks.0.attn.qkv.weight"} <= names


def test_gloo_under_mpirun_resumes_bit_for_bit(place: Workplace) -> None:
    """The same engine, ranks and thread: a resumed run repeats the one that saved the checkpoint."""
    need("horovod")
    need("mpirun")
    whole = train_with(place, MPIRUN, "whole", "engine=horovod", "horovod.transport=gloo")
    saved = "checkpoint.resume=runs/whole/checkpoints/step_00000010"
    again = train_with(place, MPIRUN, "again", "engine=horovod", "horovod.transport=gloo", saved)
    assert again == whole[10:]


def test_adasum_follows_its_formula_and_resumes(tmp_path: Path) -> None:
    need("horovod")
    need("mpirun")
    launched(tmp_path, MPIRUN, "-m", "tests.engines.horovod_adasum", "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    formula = found["formula"]
    assert formula["error"] < 1e-12 < 1e-4 < formula["from_the_mean"]
    assert formula["norm"] == pytest.approx(formula["norm_of_ranks"], rel=1e-10)
    assert formula["apart"] == []
    assert found["resume"] == {"repeated": True, "moments_agree": True, "apart": []}


def test_refused_by_the_ranks_before_they_train(place: Workplace) -> None:
    need("horovod")
    words = ("-m", "disttrain", "train", "run.yaml", "engine=horovod")
    said = launched(place.folder, (), *words, "--nproc", "2", "run.name=refused", "horovod.adasum=true", code=2)
    assert "not started by MPI" in said and "fix: start them with mpirun" in said
    said = launched(place.folder, HOROVODRUN, *words, "run.name=twice", "horovod.cycle_time_ms=3", code=1,
                    HOROVOD_CYCLE_TIME="5")  # fmt: skip
    assert "HOROVOD_CYCLE_TIME=5" in said and "fix: give one of them only" in said  # the traceback is horovodrun's own


def test_doctor_knows_what_it_was_built_with() -> None:
    need("horovod")
    parts = horovod_built()
    assert "gloo" in parts and set(parts) <= {"mpi", "gloo", "nccl"}


# refused by `check`


def settings_of(config: Config, world: int = 2) -> list[str]:
    return [", ".join(problem.settings) for problem in horovod_checks.problems(config, world)]


def test_what_adasum_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(horovod_checks, "installation_problems", list)
    config = config_for("gpt", engine="horovod", **{"horovod.adasum": True})
    assert settings_of(config) == []
    assert settings_of(config, 6) == ["horovod.adasum=true, world size 6"]
    for key, value, text in (
        ("parallel.tensor", 2, "parallel.tensor=2"),
        ("horovod.transport", "gloo", "horovod.transport=gloo"),
        ("horovod.compression", "fp16", "horovod.compression=fp16"),
        ("horovod.gradient_predivide", 2.0, "horovod.gradient_predivide=2.0"),
    ):
        assert settings_of(with_values(config, {key: value})) == [f"horovod.adasum=true, {text}"]


def test_a_missing_or_broken_horovod_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec: ModuleSpec | None = None
    monkeypatch.setattr(horovod_checks, "find_spec", lambda name: spec)

    def said() -> list[str]:
        found = horovod_checks.problems(config_for("gpt", engine="horovod"), 2)
        assert all("launchers/install_horovod.sh" in problem.fix for problem in found)
        return [problem.message for problem in found]

    assert said() == ["Horovod is not installed"]
    spec = ModuleSpec("horovod", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    assert said() == ["Horovod is installed without its native code for torch"]
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "mpi_lib_v2.so").touch()
    (tmp_path / "metadata.json").write_text('{"pytorch": "1.0"}')
    assert said() == ["Horovod was built for torch 1.0"]


def test_what_the_launcher_must_give() -> None:
    config = config_for("gpt", engine="horovod", **{"horovod.fusion_threshold_mib": 64.0, "horovod.timeline": True})

    def settings(config: Config, launcher: str, **environ: str) -> list[tuple[str, ...]]:
        return [problem.settings for problem in horovod_checks.launcher_problems(config, launcher, environ)]

    assert settings(config, "horovodrun", HOROVOD_FUSION_THRESHOLD="67108864") == []
    assert settings(config, "horovodrun", HOROVOD_FUSION_THRESHOLD="0", HOROVOD_TIMELINE="t.json") == [
        ("horovod.fusion_threshold_mib=64.0", "HOROVOD_FUSION_THRESHOLD=0"),
        ("horovod.timeline=true", "HOROVOD_TIMELINE=t.json"),
    ]
    mpi = with_values(config, {"horovod.transport": "mpi"})
    assert settings(mpi, "openmpi") == settings(mpi, "srun", PMIX_RANK="0") == []
    assert settings(mpi, "srun") == [("horovod.transport=mpi", "launcher srun")]
    assert settings(mpi, "horovodrun") == [("horovod.transport=mpi", "launcher horovodrun")]


def test_places_count_as_horovodrun_does() -> None:
    found = [(p["local_rank"], p["local_size"], p["cross_rank"], p["cross_size"]) for p in places(["a", "a", "b"])]
    assert found == [(0, 2, 0, 2), (1, 2, 0, 1), (0, 1, 1, 2)]
