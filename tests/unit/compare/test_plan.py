"""Sweeps are checked altogether before anything starts, and their runs are interleaved."""

from pathlib import Path

import pytest
import yaml

from disttrain.compare import plan
from disttrain.compare.launching import command
from disttrain.compare.plan import changes
from disttrain.compare.schema import load_sweep, words_of
from disttrain.config.problems import Problem, RefusedInput
from tests.unit.compare.conftest import Place
from tests.unit.compare.made_up import records, step, write

ROOT = Path(__file__).resolve().parents[3]


def refused(text: str, folder: Path) -> list[Problem]:
    (folder / "s.yaml").write_text(text)
    with pytest.raises(RefusedInput) as caught:
        load_sweep(folder / "s.yaml")
    return caught.value.problems


def test_unknown_keys_are_refused_with_the_nearest(tmp_path: Path) -> None:
    text = (
        "config: c\nrepeat: 2\nstrategies:\n  a: {nprocs: 2}\n  b: {parallel.tensor: 2}\nslurm: {node: 2}\ntrain: {}\n"
    )
    found = {p.settings[0]: p.fix for p in refused(text, tmp_path)}
    assert found == {
        "repeat": "did you mean 'repeats'?",
        "strategies.a.nprocs": "did you mean 'strategies.a.nproc'?",
        "strategies.b.parallel.tensor": "settings of the config stand below 'settings:'",
        "slurm.node": "did you mean 'slurm.nodes'?",
        "train": "settings of the config stand below 'settings:'",
    }


@pytest.mark.parametrize(
    "text, message",
    [
        ("config: c\nstrategies: {'a b': {}}", "folders are named after strategies"),
        ("config: c\nstrategies: {}", "at least 1 item"),
        ("config: c\nstrategies: {a: {}}\nrepeats: 0", "greater than or equal to 1"),
        ("config: c\nstrategies: {a: {}}\nbaseline: b", "no strategy of this name"),
        ("config: c\nstrategies: {a: {}}\ncurrency: EUR", "nothing is priced"),
        ("strategies: {a: {}}", "this setting must be given"),
        ("config: c\nstrategies: {a: {env: {A: 1}}}", "valid string"),
        ("config: c\nstrategies: {a: {}, a: {}}", "stands twice"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, message: str, tmp_path: Path) -> None:
    assert any(message in p.message for p in refused(text, tmp_path))


def test_problems_of_all_strategies_are_told_at_once(place: Place) -> None:
    strategies = {
        "typo": {"settings": {"optim.learning": 1}},
        "three": {"nproc": 3},
        "layout": {"layout": "tpp2"},
        "ranks": {"layout": "tp2", "nproc": 4},
        "launcher": {"launcher": "torchrum"},
        "words": {"launcher": ["run"]},
        "good": {},
    }
    with pytest.raises(RefusedInput) as caught:
        place.plan(strategies)
    found = {p.settings[0]: p for p in caught.value.problems}
    assert list(found) == [f"strategy {name}" for name in strategies if name != "good"]
    assert "torchrun" in found["strategy launcher"].fix and "{nproc}" in found["strategy words"].fix
    assert not (place.folder / "out").exists()


def test_an_optional_strategy_may_be_refused_but_not_misspelt(place: Place) -> None:
    made = place.plan({"a": None, "three": {"nproc": 3, "optional": True}})
    assert [bool(s.refused) for s in made.strategies] == [False, True]
    assert not place.plan({"a": None}, optional=True).strategies[0].refused
    with pytest.raises(RefusedInput, match="unknown setting"):
        place.plan({"typo": {"settings": {"optim.learning": 1}, "optional": True}})
    gone = place.plan({"a": {"launcher": ["no-such-launcher", "{nproc}"], "optional": True}})
    assert "no-such-launcher" in gone.strategies[0].refused[0].message


def test_the_common_config_is_told_once(place: Place) -> None:
    with pytest.raises(RefusedInput) as caught:
        place.plan({"a": None, "b": None}, settings={"optim.lr": -1})
    assert len(caught.value.problems) == 1
    with pytest.raises(RefusedInput, match="goes on with its runs"):
        place.plan({"a": None}, settings={"checkpoint": {"resume": "never"}})


def test_runs_are_interleaved(place: Place) -> None:
    made = place.plan({"b": None, "a": None}, repeats=3)
    assert [task.name for task in made.tasks] == ["b-1", "a-1", "b-2", "a-2", "b-3", "a-3"]
    assert made.baseline == "b"


def test_words_of_a_run(place: Place) -> None:
    """Common settings, then the command line's, then a layout's, then the strategy's own; values read back."""
    strategies = {
        "x": {"layout": "tp2.sp.full.mb2", "settings": {"optim": {"lr": 0.001, "name": "lamb"}, "train.seconds": None}}
    }
    made = place.plan(strategies, ("train.steps=7",), settings={"train.steps": 5, "data.path": ["corpus"]})
    x = made.strategy("x")
    assert x.nproc == 2
    assert x.own == ["parallel.tensor=2", "parallel.sequence=true", "parallel.recompute=full", "train.micro_batch_size=2",
                     "optim.lr=0.001", "optim.name=lamb", "train.seconds=null"]  # fmt: skip
    assert x.words == ["train.steps=5", 'data.path=["corpus"]', "train.steps=7", *x.own]
    assert x.config["train"]["steps"] == 7 and x.config["optim"]["name"] == "lamb"
    assert "log" not in x.config and "name" not in x.config["run"]


def test_a_layout_takes_back_what_the_config_had(place: Place) -> None:
    made = place.plan({"single": {"layout": "single"}, "pp": {}},
                      settings={"parallel.pipeline": 2, "train.micro_batch_size": 2})  # fmt: skip
    assert (made.strategy("single").nproc, made.strategy("single").own) == (1, ["parallel.pipeline=1"])


def test_runs_in_wandb_are_one_group(place: Place) -> None:
    assert "log.wandb_group=out" in place.plan({"a": None}, settings={"log.wandb": True}).common
    named = place.plan({"a": None}, settings={"log": {"wandb": True, "wandb_group": "mine"}})
    assert named.common == ["log.wandb=true", "log.wandb_group=mine"]


def test_settings_may_be_nested_or_dotted() -> None:
    nested = {"a": {"b": 1, "c": {"d": [2]}}, "e.f": {}, "g": "text"}
    assert dict(words_of(nested)) == {"a.b": 1, "a.c.d": [2], "e.f": {}, "g": "text"}


def test_commands_of_launchers() -> None:
    def words(*given) -> list[str]:
        return command(*given)[1:]

    assert words("local", "c.yaml", 2, ["a=1"]) == ["-m", "disttrain", "train", "c.yaml", "--nproc", "2", "a=1"]
    assert words("torchrun", "c.yaml", 2, [])[:4] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    assert command("mpirun", "c.yaml", 4, [])[:5] == ["mpirun", "--bind-to", "none", "-n", "4"]
    assert command("srun", "c.yaml", 4, [], 2)[:5] == ["srun", "--nodes", "2", "--ntasks", "4"]
    assert command("srun", "c.yaml", 4, [])[:3] == ["srun", "--ntasks", "4"]
    assert command(["my", "-n={nproc}"], "c", 3, ["x=1"]) == ["my", "-n=3", "train", "c", "x=1"]


def test_a_plan_is_kept_and_read_back(place: Place) -> None:
    made = place.plan({"a": {"env": {"X": "1"}, "about": "it"}, "three": {"nproc": 3, "optional": True}},
                      price_per_rank_hour=2.0)  # fmt: skip
    (made.folder / plan.FILE).write_text(plan.save(made))
    assert plan.read(made.folder) == made
    for broken in ("{", "[]", "{}"):
        (made.folder / plan.FILE).write_text(broken)
        with pytest.raises(RefusedInput, match="no plan of a comparison"):
            plan.read(made.folder)
    (made.folder / plan.FILE).unlink()
    with pytest.raises(RefusedInput, match="cannot be read"):
        plan.read(made.folder)


def test_what_has_run_is_not_mixed_with_something_else(place: Place) -> None:
    before = place.plan({"a": None, "b": {"settings": {"optim.lr": 0.01}}, "c": None})
    for name in ("a-1", "b-1", "b-2"):
        write(before.folder / "runs" / name, records(name, [step(1, 1.0, 1.0)]))
    more = place.plan({"b": {"settings": {"optim.lr": 0.01}, "about": "new"}, "a": None, "d": None}, repeats=5,
                      timeout_s=5.0, price_per_rank_hour=1.0)  # fmt: skip
    assert changes(before, more) == []  # c has no run; more strategies, repeats and words do no harm
    now = place.plan({"a": {"nproc": 1}, "b": {"settings": {"optim.lr": 0.02}}})
    assert [p.settings for p in changes(before, now)] == [
        ("strategy a, nproc=1", f"{before.folder} has nproc=2"),
        ("strategy b, optim.lr=0.02", f"{before.folder} has optim.lr=0.01"),
    ]
    gone = place.plan({"a": None})
    (problem,) = changes(before, gone)
    assert problem.settings == ("strategy b",) and "--out" in problem.fix


def test_the_shipped_sweep_is_good(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """At least twelve strategies run on what every installation has."""
    monkeypatch.chdir(ROOT)
    path = ROOT / "configs/sweeps/strategies.yaml"
    made = plan.make(load_sweep(path), path, tmp_path / "out")
    able = [s for s in made.strategies if not s.refused]
    assert len(able) >= 18 and {s.nproc for s in able} == {1, 2, 4}
    assert all(s.about for s in made.strategies)
    optional = {name for name, s in yaml.safe_load(path.read_text())["strategies"].items() if s.get("optional")}
    assert optional == {"deepspeed-zero2", "horovod"}
