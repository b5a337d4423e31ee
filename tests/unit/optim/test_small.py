"""Small problems: known minima, and the same ends as torch's L-BFGS and scipy's own derivatives."""

from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from disttrain.optim.small import NEWTON, Method, minimise

METHODS = get_args(Method)


def quadratic() -> tuple[nn.Parameter, nn.Parameter, Any, Tensor]:
    """x^T A x / 2 - b x with eigenvalues from 1 to 50; in two parameters. Its minimum is A^-1 b."""
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    a = q @ torch.diag(torch.linspace(1, 50, 6, dtype=torch.float64)) @ q.T
    b = torch.randn(6, generator=generator, dtype=torch.float64)
    one, other = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64)), nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def loss() -> Tensor:
        x = torch.cat([one.flatten(), other])
        return x @ a @ x / 2 - b @ x

    return one, other, loss, torch.linalg.solve(a, b)


@pytest.mark.parametrize("method", METHODS)
def test_finds_the_minimum_of_a_quadratic(method: Any) -> None:
    one, other, loss, minimum = quadratic()
    found = minimise(loss, [one, other], method, tolerance=1e-7)
    torch.testing.assert_close(torch.cat([one.flatten(), other]).detach(), minimum, rtol=1e-6, atol=1e-7)
    assert found.converged and found.gradient_norm < 1e-6
    assert found.loss == pytest.approx(float(loss().detach()), rel=1e-12)
    assert 0 < found.steps <= found.evaluations and (found.products > 0) == (method in NEWTON)


@pytest.mark.parametrize("method", METHODS)
def test_finds_the_minimum_of_a_curved_valley(method: Any) -> None:
    """Rosenbrock 1960, in four dimensions: (1, 1, 1, 1)."""
    x = nn.Parameter(torch.tensor([-1.2, 1.0, -0.5, 0.8], dtype=torch.float64))

    def loss() -> Tensor:
        return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()

    found = minimise(loss, [x], method, steps=2000, tolerance=1e-7)
    assert found.converged
    torch.testing.assert_close(x.detach(), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-5)


def logistic() -> tuple[nn.Linear, Any]:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    labels = (features[:, 0] + 0.5 * torch.randn(40, generator=generator, dtype=torch.float64) > 0).long()
    model = nn.Linear(3, 2, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)

    def loss() -> Tensor:
        decay = 0.01 * sum(p.square().sum() for p in model.parameters())
        return nn.functional.cross_entropy(model(features), labels) + decay

    return model, loss


def test_all_end_where_torchs_lbfgs_does() -> None:
    model, loss = logistic()
    theirs = torch.optim.LBFGS(model.parameters(), max_iter=200, tolerance_grad=1e-10, tolerance_change=0,
                               line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> Tensor:
        theirs.zero_grad()
        value = loss()
        value.backward()
        return value

    theirs.step(closure)
    expected = float(loss().detach())
    for method in METHODS:
        ours, again = logistic()
        found = minimise(again, ours.parameters(), method, tolerance=1e-9)
        assert found.loss == pytest.approx(expected, rel=1e-12), method
        torch.testing.assert_close(ours.weight.detach(), model.weight.detach(), rtol=0, atol=1e-6)


def test_products_are_those_of_the_hessian() -> None:
    """scipy gets the same steps from the Hessian itself."""
    from scipy import optimize

    one, other, loss, _ = quadratic()
    found = minimise(loss, [one, other], "trust-ncg", tolerance=1e-8)
    one, other, loss, minimum = quadratic()

    def at(x: np.ndarray) -> Tensor:
        moved = torch.from_numpy(x)
        with torch.no_grad():
            one.copy_(moved[:4].view(2, 2))
            other.copy_(moved[4:])
        return loss()

    def gradient(x: np.ndarray) -> np.ndarray:
        return torch.cat([g.flatten() for g in torch.autograd.grad(at(x), [one, other])]).numpy()

    hessian = np.stack([gradient(row) - gradient(np.zeros(6)) for row in np.eye(6)])
    theirs = optimize.minimize(lambda x: float(at(x).detach()), np.zeros(6), jac=gradient, hess=lambda _: hessian,
                               method="trust-ncg", options={"gtol": 1e-8})  # fmt: skip
    assert found.steps == theirs.nit
    np.testing.assert_allclose(theirs.x, minimum.numpy(), atol=1e-7)


def test_it_stops_when_told_and_says_so() -> None:
    x = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    found = minimise(lambda: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2, [x], "lbfgs", steps=3)
    assert found.steps == 3 and not found.converged


def test_float32_parameters_and_a_flat_one() -> None:
    """A parameter of which the loss is linear has no curvature, and one without a gradient stays."""
    x, still = nn.Parameter(torch.full((3,), 2.0)), nn.Parameter(torch.ones(2), requires_grad=False)
    found = minimise(lambda: (x - 1).square().sum() + 0 * still.sum(), [x, still], "newton-cg", tolerance=1e-4)
    assert found.converged and x.dtype == torch.float32
    torch.testing.assert_close(x.detach(), torch.ones(3))
    assert torch.equal(still.detach(), torch.ones(2))


@pytest.mark.parametrize(("method", "loss", "message"), [
    ("bfgs2", 1.0, "there is no method"), ("cg", float("nan"), "not finite"),
])  # fmt: skip
def test_misuse_is_told(method: Any, loss: float, message: str) -> None:
    x = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=message):
        minimise(lambda: x.sum() * loss, [x], method)
    with pytest.raises(ValueError, match="wants a gradient"):
        minimise(lambda: torch.ones(()), [torch.ones(2)])
