"""The arithmetic of training has not changed by accident: loss curves against the stored ones."""

import pytest

from tests.golden.regenerate import CURVES, FOLDER, STEPS, curve

TOLERANCE = {"fp64": 1e-9, "fp32": 2e-4}
"""Relative. CPUs differ in the order of additions; 30 steps of Adam let that grow in float32."""


@pytest.mark.parametrize("name", CURVES)
def test_curve(name: str) -> None:
    stored = [line.split() for line in (FOLDER / f"{name}.txt").read_text().splitlines()]
    assert [int(step) for step, _ in stored] == list(range(1, STEPS + 1))
    expected = [float(loss) for _, loss in stored]
    assert curve(name) == pytest.approx(expected, rel=TOLERANCE[name.rsplit("_", 1)[-1]])
    assert expected[-1] < 0.8 * expected[0]
