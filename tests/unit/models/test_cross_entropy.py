"""Our summed cross-entropy against torch's, in value and gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from disttrain.models import cross_entropy
from disttrain.models.cross_entropy import IGNORED, cross_entropy_sum

N, V = 23, 17


@pytest.fixture(params=[1, 3 * V, 1 << 18], ids=["one row at a time", "three rows", "all rows"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", request.param)


def logits_and_targets(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(N, V, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[::4] = IGNORED
    return logits, targets


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)]
)
def test_value_and_gradient_equal_torch(chunk: None, dtype: torch.dtype, tolerance: float, smoothing: float):
    logits, targets = logits_and_targets(dtype)
    loss = cross_entropy_sum(logits, targets, smoothing)
    loss.backward(torch.tensor(2.5, dtype=loss.dtype))
    assert logits.grad is not None and logits.grad.dtype == dtype
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    wide = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)
    expected.backward(torch.tensor(2.5, dtype=torch.float64))
    # the sum is formed in float32 whatever the logits' type; only the gradient is rounded to it
    torch.testing.assert_close(loss.double(), expected, rtol=min(tolerance, 1e-5), atol=0)
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=tolerance, atol=tolerance)
    assert logits.grad[targets == IGNORED].count_nonzero() == 0


def test_naive_reference():
    """Written out: -sum over classes of q log p, q the smoothed target distribution."""
    logits, targets = logits_and_targets(torch.float64)
    expected = 0.0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        if target == IGNORED:
            continue
        log_p = torch.tensor(row, dtype=torch.float64).log_softmax(0)
        expected -= 0.8 * log_p[target].item() + 0.2 * log_p.mean().item()
    assert cross_entropy_sum(logits, targets, 0.2).item() == pytest.approx(expected, rel=1e-12)


def test_gradient_is_the_derivative():
    logits, targets = logits_and_targets(torch.float64)
    assert torch.autograd.gradcheck(lambda x: cross_entropy_sum(x, targets, 0.1), (logits,))


@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_to_predict_is_zero_with_a_zero_gradient(rows: int):
    logits = torch.randn(rows, V, requires_grad=True)
    loss = cross_entropy_sum(logits, torch.full((rows,), IGNORED))
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and logits.grad.count_nonzero() == 0


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[3e4, -3e4, 0.0]], dtype=torch.float16, requires_grad=True)
    loss = cross_entropy_sum(logits, torch.tensor([1]))
    loss.backward()
    assert loss.item() == 60000 and logits.grad is not None
    assert logits.grad.tolist() == [[1.0, -1.0, 0.0]]


def test_keeps_no_wide_copy_of_the_logits():
    logits = torch.randn(64, 1000).bfloat16().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        cross_entropy_sum(logits, torch.zeros(64, dtype=torch.int64))
    assert sum(t.nbytes for t in kept if t.data_ptr() != logits.data_ptr()) < 0.05 * logits.nbytes
