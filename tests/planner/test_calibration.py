"""`disttrain calibrate`: what it makes of its measurements, and a small real one that a plan is made from."""

import json
import os
from pathlib import Path

import pytest
import torch

from disttrain.calibration import links, passes, products
from disttrain.calibration.links import COLLECTIVES, Point, fitted
from disttrain.calibration.timing import Timed, summary, timed
from disttrain.config.problems import RefusedInput
from disttrain.planner import speeds
from disttrain.planner.collectives import all_reduce, ring
from tests import warm
from tests.planner.machines import cpu

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SIZES = (8, 4 << 10, 1 << 20, 16 << 20)


def of_a_perfect_link(collective: links.Collective, ranks: int, gloo: bool, latency: float, rate: float) -> list[Point]:
    """Written out once more, from Thakur et al. 2005."""
    steps = {"all_reduce": 2 * (ranks - 1), "all_gather": ranks - 1, "send": 1,
             "reduce_scatter": (2 if gloo else 1) * (ranks - 1)}[collective]  # fmt: skip
    each = [size if collective == "send" else size / ranks for size in SIZES]
    return [Point(size, steps * (latency + part / rate), 0.0) for size, part in zip(SIZES, each, strict=True)]


@pytest.mark.parametrize("gloo", [True, False])
@pytest.mark.parametrize("ranks", [2, 8])
def test_a_perfect_link_is_found(ranks: int, gloo: bool) -> None:
    """From each collective alone, and from all together."""
    points = [(name, of_a_perfect_link(name, ranks, gloo, 2e-5, 3e9)) for name in COLLECTIVES]
    for chosen in (*([one] for one in points), points):
        link = fitted(chosen, ranks, gloo)
        assert (link.latency_seconds, link.bytes_per_second) == pytest.approx((2e-5, 3e9))


def test_a_link_is_what_the_planner_reads_it_as() -> None:
    """An all-reduce that the planner predicts over a fitted link takes what was measured."""
    machine = cpu(inside=fitted([("all_reduce", of_a_perfect_link("all_reduce", 4, True, 1e-5, 2e9))], 4, True))
    predicted = all_reduce(ring(machine, 4, 4, 1), float(1 << 20))
    assert predicted == pytest.approx(6 * (1e-5 + (1 << 18) / 2e9))


def test_no_link_is_better_than_nothing() -> None:
    """Latency and bandwidth stay possible where the points lie on no line that has both."""
    never_slower = fitted([("send", [Point(8, 1e-4, 0), Point(1 << 20, 1e-4, 0)])], 2, True)
    assert never_slower.latency_seconds == pytest.approx(1e-4, rel=0.01) and never_slower.bytes_per_second > 1e9
    no_latency = fitted([("send", [Point(8, 1e-9, 0), Point(1 << 20, 1e-3, 0)])], 2, True)
    assert no_latency.latency_seconds >= 0 and no_latency.bytes_per_second > 0


def test_one_slow_round_does_not_count() -> None:
    assert summary([3.0, 1.0, 100.0, 2.0, 4.0]) == Timed(3.0, 1.0)
    assert timed(lambda: sum(range(1000)), CPU).seconds > 0


def test_products_are_those_a_linear_layer_has() -> None:
    found = products.sizes(2 * 64 * 64 * 256)
    assert found[0] == (64, 64, 64) and set(found[1:]) == {
        size for a in (128, 256) for size in ((a, 64, 64), (64, a, 64), (64, 64, a))
    } | {(128, 128, 64), (128, 64, 128), (64, 128, 128)}
    shapes = [call().shape for call in products._calls(64, 128, 256, CPU, torch.float32)]
    assert shapes == [(64, 128)] * 3
    one = products.MeasuredProduct(10, 20, 50, (Timed(2e-6, 0), Timed(3e-6, 0), Timed(2e-6, 0)))
    assert one.product(1e-6).flops_per_second == pytest.approx(3 / (1 / 2e10 + 1 / 1e10 + 1 / 2e10))
    assert one.product(1.0).flops_per_second == pytest.approx(20000 / (7 / 3 * 1e-7))  # no more than ten times


def test_operators_move_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(passes.ELEMENTS, "cpu", 1 << 14)
    found = {p.operator: p for p in [*passes.measure(CPU, torch.bfloat16), passes.adamw(CPU)]}
    assert set(passes.PLAIN) < set(found) and found["cast to bfloat16"].moved_bytes == 6 << 14
    assert found["add"].moved_bytes == 12 << 14 and found["adamw"].moved_bytes == 28 << 14
    assert all(p.bytes_per_second > 0 for p in found.values())
    assert passes.operator(CPU).seconds > 0 and passes.call(CPU, torch.float32).seconds > 0
    (first, *_), rate = products.attention(1e9, CPU, torch.float32), products.rate(CPU, torch.float32)
    assert first.sequence_length == 128 and first.backward_flops_per_second > 0 and rate > 0


def test_precisions_stand_beside_each_other(tmp_path: Path) -> None:
    path, single, half = tmp_path / "speeds.json", cpu(), cpu(precision="bf16", operator_seconds=2.0)
    speeds.write(path, single)
    speeds.write(path, half, {"seconds": 3})
    assert (speeds.read(path), speeds.read(path, "fp32"), speeds.read(path, "bf16")) == (half, single, half)
    with pytest.raises(RefusedInput) as refused:
        speeds.read(path, "fp16")
    (problem,) = refused.value.problems
    assert problem.message == "it holds speeds in fp32, bf16 only" and "--precision fp16" in problem.fix
    speeds.write(path, single._replace(operator_seconds=1.0))
    assert speeds.read(path).operator_seconds == 1.0  # without a precision the last one
    assert json.loads(path.read_text())["bf16"]["details"] == {"seconds": 3}


SMALLER = """
import sys
from disttrain.calibration import links, passes, products
products.SIZES, products.SEQUENCES, products.HEAD_SIZES = (64, 256), (128,), (64,)
links.REPEATS = {8: 4, 1 << 16: 4, 1 << 20: 2}
passes.ELEMENTS["cpu"] = 1 << 16
from disttrain.cli import main
sys.argv = ["disttrain", "calibrate", *sys.argv[1:]]
main()
"""
"""The ranks are forked, and measure as little."""


def test_two_ranks_measure_and_a_plan_follows(tmp_path: Path) -> None:
    (tmp_path / "smaller.py").write_text(SMALLER)
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    words = ("--nproc", "2", "--precision", "fp32", "--out", "here/speeds.json")
    measuring = warm.Running(words, tmp_path, environment, script=tmp_path / "smaller.py")
    measured = measuring.communicate(timeout=300)
    assert measuring.returncode == 0, measured
    for said in ("measuring links", "products (m x k) (k x n), GFLOP/s", "gelu backward", "all_reduce", "reduce_scatter",
                 "send", "all together", "no second host was there", "written: here/speeds.json"):  # fmt: skip
        assert said in measured, measured
    found = speeds.read(tmp_path / "here/speeds.json")
    assert (found.precision, found.ranks_per_host, found.accelerator, found.unit) == ("fp32", 2, False, None)
    assert len(found.products) == 8 and found.at_full_speed in (1, 2) and found.inside == found.between
    details = json.loads((tmp_path / "here/speeds.json").read_text())["fp32"]["details"]
    assert len(details["products"]) == 8 and details["versions"] and details["share_of_full_speed"]["1"] == 1.0
    plan = ["plan", str(ROOT / "configs/gpt_3d.yaml"), "--gpus", "2", "precision=fp32", "--device", "here/speeds.json"]
    planned = warm.run(plan, tmp_path, environment, timeout_s=200)
    assert planned.returncode == 0, planned.stderr
    assert "measured" in planned.stdout and "unknown, so that there is no MFU" in planned.stdout


A_RANK = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
          "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "1"}  # fmt: skip


@pytest.mark.parametrize(
    ("words", "variables", "said"),
    [
        (["--out", "file/speeds.json"], {}, "no such file can be written"),
        (["--out", "."], {}, "no such file can be written"),
        (["--nproc", "2"], A_RANK, "leave --nproc away"),
        (["--nproc", "1"], {}, "greater than or equal to 2"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    tmp_path: Path, words: list[str], variables: dict[str, str], said: str
) -> None:
    (tmp_path / "file").write_text("")
    done = warm.run(["calibrate", *words], tmp_path, {**os.environ, **variables}, timeout_s=60)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == ""
