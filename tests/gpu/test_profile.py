"""A profile on a CPU and, where there is one, on a GPU: kernels instead of operators, the allocator's bytes."""

import pytest

from tests.gpu.test_device import DEVICES, train
from tests.runs.conftest import Workplace, workplace
from tests.runs.test_profile import check_sums, table_of

__all__ = ["workplace"]


@pytest.mark.parametrize("device", DEVICES)
def test_seconds_and_memory(workplace: Workplace, device: str) -> None:
    train(workplace, device, "precision=bf16", "--profile", "train.steps=7", "parallel.zero=2")
    found = table_of(workplace, f"{device}_0")
    assert found["device"] == device
    check_sums(found)
    (rank,) = found["ranks"]
    assert min(rank["rows"][kind] for kind in ("forward", "backward", "optimizer")) > 0
    assert rank["memory"]["bytes"]["activations"] > 0
