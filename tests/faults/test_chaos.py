"""Every kind of blow at one run, once: the weights, the records and the token counts are those of an undisturbed process."""

from pathlib import Path

import pytest

from tests.faults.chaos import FAULTS, chaos


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_is_hit_by_everything_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    blows = chaos(tmp_path, seed=1, goes_on=lambda number, _: number < len(FAULTS))
    assert sorted(blow.fault for blow in blows) == sorted(FAULTS)
