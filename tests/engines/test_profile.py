"""Profiles of the other engines: the same kinds, and what they do not tell is not made up."""

import pytest

from tests.components import need
from tests.runs.conftest import Workplace, workplace
from tests.runs.test_profile import SHORT, check_sums, events, table_of

__all__ = ["workplace"]


@pytest.mark.parametrize("zero", [0, 3])
def test_deepspeed(workplace: Workplace, zero: int) -> None:
    need("deepspeed")
    workplace.run(*SHORT, "--nproc", "2", "--profile", "engine=deepspeed", f"parallel.zero={zero}", "train.steps=7")
    found = table_of(workplace)
    check_sums(found)
    for rank in found["ranks"]:
        assert min(rank["rows"][kind] for kind in ("forward", "backward", "optimizer")) > 0
        assert rank["on_the_way"]["data"] > 0
        assert min(rank["memory"]["bytes"][category] for category in ("weights", "optimizer", "activations")) > 0


def test_horovod(workplace: Workplace) -> None:
    """Its threads are in no trace of torch's: what is on the way is not known, what is waited for is."""
    need("horovod")
    workplace.run(*SHORT, "--nproc", "2", "--profile", "engine=horovod", "train.steps=7")
    found = table_of(workplace)
    assert found["on_the_way_seconds_mean"]["data"] is None
    for rank in found["ranks"]:
        assert rank["on_the_way"]["data"] is None
        assert rank["rows"]["exposed data"] > 0
        assert sum(rank["rows"].values()) == pytest.approx(rank["step_seconds"], rel=1e-6)
    assert events(workplace, "profiled") == ["profiled steps 5 to 7: runs/run/trace"]
