"""Optimizers for small problems, whose loss and gradient are computed anew at every trial point: by scipy.

A probe on frozen features, the temperature of a classifier, a convex check: what fits one process and has no mini-batches.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

Method = Literal["lbfgs", "cg", "newton-cg", "trust-ncg"]
"""lbfgs: limited-memory BFGS (Liu and Nocedal 1989). cg: nonlinear conjugate gradients, Polak-Ribiere's beta but never below
zero, strong Wolfe line search (Nocedal and Wright 2006, algorithm 5.4). newton-cg: Newton's step by conjugate gradients, cut
short where the curvature is negative (ibid., algorithm 7.1). trust-ncg: the same in a trust region (ibid., 7.2)."""

_SCIPY = {"lbfgs": "L-BFGS-B", "cg": "CG", "newton-cg": "Newton-CG", "trust-ncg": "trust-ncg"}
NEWTON = ("newton-cg", "trust-ncg")
"""Methods that use products of the Hessian and a vector."""


@dataclass(frozen=True)
class Result:
    """Where a minimisation ended; the parameters are there."""

    loss: float
    steps: int
    evaluations: int
    """Of loss and gradient together."""
    gradient_norm: float
    """2-norm of the gradient over all parameters."""
    products: int
    """Of the Hessian and a vector."""
    converged: bool
    """Whether the largest element of the gradient is within the tolerance."""


def minimise(
    loss_fn: Callable[[], Tensor], parameters: Iterable[Tensor], method: Method = "lbfgs", steps: int = 200,
    tolerance: float = 1e-6, history: int = 10,
) -> Result:  # fmt: skip
    """Move the parameters, in place, to a minimum of the loss near them, in at most so many steps.

    `loss_fn` gives a scalar from the parameters as they are; it must be deterministic, and twice differentiable for the
    methods `NEWTON`, whose products are a second backward pass (Pearlmutter 1994). It ends where no element of the gradient
    is larger than `tolerance`, in units of the loss. `history` is the number of pairs that lbfgs remembers. Raises
    ValueError for a method that is not there, no parameters, and a loss that is not finite where it starts.
    """
    from scipy import optimize

    if method not in get_args(Method):
        raise ValueError(f"there is no method {method!r}: use one of {', '.join(get_args(Method))}")
    problem = _Problem(loss_fn, [p for p in parameters if p.requires_grad], second=method in NEWTON)
    if not problem.parameters:
        raise ValueError("no parameter wants a gradient")
    start = problem.place()
    if not np.isfinite(problem.loss_and_gradient(start)[0]):
        raise ValueError("the loss is not finite at the start")
    limits: dict[str, Any] = {"maxiter": steps}
    match method:
        case "lbfgs":
            limits |= {"gtol": tolerance, "ftol": 0.0, "maxcor": history, "maxfun": 20 * steps}
        case "newton-cg":
            limits["xtol"] = tolerance * 1e-3  # it looks at the step, and not at the gradient
        case _:
            limits["gtol"] = tolerance
    found = optimize.minimize(
        problem.loss_and_gradient, start, jac=True, method=_SCIPY[method], options=limits,
        **({"hessp": problem.product} if method in NEWTON else {}),
    )  # fmt: skip
    problem.move(found.x)
    loss, gradient = problem.loss_and_gradient(found.x)
    return Result(loss, int(found.nit), problem.evaluations, float(np.linalg.norm(gradient)), problem.products,
                  bool(abs(gradient).max() <= tolerance))  # fmt: skip


@dataclass
class _Problem:
    """A loss as a function of one float64 vector, which is what scipy asks."""

    loss_fn: Callable[[], Tensor]
    parameters: list[Tensor]
    second: bool
    """Whether gradients are differentiated again."""
    evaluations: int = 0
    products: int = 0
    _at: np.ndarray = field(default_factory=lambda: np.full(0, np.nan))
    _loss: float = 0.0
    _gradients: tuple[Tensor, ...] = ()

    def place(self) -> np.ndarray:
        """The parameters, one after the other."""
        return _flat(self.parameters)

    @torch.no_grad()
    def move(self, at: np.ndarray) -> None:
        """Put the parameters there."""
        parts = torch.from_numpy(np.ascontiguousarray(at)).split([p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.copy_(part.view_as(parameter))

    def loss_and_gradient(self, at: np.ndarray) -> tuple[float, np.ndarray]:
        """Both at a point; those of the last one are remembered."""
        if not np.array_equal(at, self._at):
            self.move(at)
            loss = self.loss_fn()
            self._gradients = torch.autograd.grad(loss, self.parameters, create_graph=self.second)
            self._loss, self._at = float(loss.detach()), at.copy()
            self.evaluations += 1
        return self._loss, _flat(self._gradients)

    def product(self, at: np.ndarray, vector: np.ndarray) -> np.ndarray:
        """Of the Hessian at a point and a vector."""
        self.loss_and_gradient(at)
        self.products += 1
        parts = torch.from_numpy(np.ascontiguousarray(vector)).split([p.numel() for p in self.parameters])
        along = [part.view_as(p).to(p) for p, part in zip(self.parameters, parts, strict=True)]
        curved = [(g, v) for g, v in zip(self._gradients, along, strict=True) if g.requires_grad]
        if not curved:
            return np.zeros_like(vector)
        gradients, along = zip(*curved, strict=True)
        found = torch.autograd.grad(
            gradients, self.parameters, along, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return _flat(found)


def _flat(tensors: Iterable[Tensor]) -> np.ndarray:
    return torch.cat([tensor.detach().flatten().double().cpu() for tensor in tensors]).numpy()
