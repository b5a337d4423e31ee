"""The convergence study: its contestants, and what its tables say of made-up runs."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import get_args
from xml.etree import ElementTree

import pytest

from disttrain.config.load import load
from disttrain.config.schema import GradientCodec

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def convergence(monkeypatch) -> ModuleType:
    """benchmarks/convergence.py, which is in no package."""
    monkeypatch.syspath_prepend(BENCHMARKS)  # for the module it imports
    spec = importlib.util.spec_from_file_location("benchmark_convergence", BENCHMARKS / "convergence.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "benchmark_convergence", loaded)  # dataclasses look it up
    spec.loader.exec_module(loaded)
    return loaded


def made_up(module: ModuleType, name: str, seed: int, loss: float | None, sent: float, **changed: object) -> object:
    """A run of the GPT that ended with this loss."""
    values = {
        "contestant": name, "model": "gpt", "seed": seed, "state": "done", "message": "",
        "curve": [(10, 1000, 6.0), (20, 2000, loss)], "accuracy": None, "wire_bytes": sent, "seconds": 1.0,
        "overrides": [], "commit": "abc",
    }  # fmt: skip
    return module.Run(**values | changed)


def some_runs(module: ModuleType) -> list:
    broken = {"state": "diverged", "message": "the loss is nan", "curve": [(10, 1000, 6.5)]}
    return [
        made_up(module, "none", 1, 4.0, 100.0),
        made_up(module, "none", 2, 5.0, 100.0),
        made_up(module, "int8", 1, 4.04, 25.0),
        made_up(module, "int8", 2, 5.15, 27.0),
        made_up(module, "sign", 1, 7.0, 3.0),
        made_up(module, "sign", 2, None, 3.0, **broken),
        made_up(module, "topk", 1, None, 0.0, state="failed", message="no such file", curve=[], wire_bytes=None),
    ]


def test_differences_are_paired_by_seed_and_bytes_are_shares(convergence):
    none, int8, sign, topk = convergence.summarise(some_runs(convergence), "gpt")
    assert (none.contestant, none.losses, none.increases, none.share) == ("none", [4.0, 5.0], [0.0, 0.0], 1.0)
    assert int8.increases == pytest.approx([1.0, 3.0])  # a difference of means would be 2.11
    assert int8.share == pytest.approx(0.26)
    assert (sign.contestant, sign.losses, sign.diverged, sign.failed) == ("sign", [7.0], 2, 0)
    assert (topk.contestant, topk.losses, topk.share, topk.failed) == ("topk", [], None, 1)
    assert convergence.summarise(some_runs(convergence), "bert") == []


def test_results_survive_the_file_and_become_a_table_and_pictures(convergence, tmp_path):
    about = {"date": "2026-01-02", "cpu": "CPU", "cores": 2, "python": "3", "versions": {"torch": "2"}, "command": "it"}
    configs = {model: load(BENCHMARKS / file).model_dump() for model, file in convergence.MODELS.items()}
    runs = some_runs(convergence)
    convergence.write(tmp_path / "results", about, {"overrides": [], **configs}, runs)
    content, again = convergence.read(tmp_path / "results")
    assert content["about"] == about and {(r.contestant, r.seed, r.loss) for r in again} == {
        (r.contestant, r.seed, r.loss) for r in runs
    }
    text = (tmp_path / "results.md").read_text()
    assert "| int8 | 4.5950 ± 0.7849 | +2.00 ± 1.41 | 0.2600 | no |" in text
    assert "| sign | 7.0000 | +75.00 | 0.0300 | 2 of 2 |" in text
    assert "- GPT topk, seed 1: failed: no such file" in text
    for figure in (convergence.loss_figure(runs), convergence.bytes_figure(runs)):
        convergence.save(figure, tmp_path / "picture.svg")
        assert ElementTree.parse(tmp_path / "picture.svg").getroot().tag.endswith("svg")


def test_every_codec_is_a_contestant_and_every_contestant_a_legal_config(convergence):
    assert set(get_args(GradientCodec)) - {"auto"} <= set(convergence.CONTESTANTS)
    for file in convergence.MODELS.values():
        for words in convergence.CONTESTANTS.values():
            load(BENCHMARKS / file, words)
