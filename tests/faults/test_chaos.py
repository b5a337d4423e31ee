"""Three minutes of blows at one run, of every kind: weights, records and tokens are those of an undisturbed process."""

from pathlib import Path

import pytest

from tests.components import need
from tests.faults.chaos import FAULTS, chaos, possible


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_is_hit_by_everything_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    blows = chaos(tmp_path, seed=1, goes_on=lambda number, seconds: number < len(possible()) or seconds < 180)
    assert {blow.fault for blow in blows} == set(possible())
    if set(possible()) != set(FAULTS):
        need("namespaces")  # all others have struck; this says that no host was cut off
