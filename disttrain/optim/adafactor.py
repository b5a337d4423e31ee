"""Adafactor (Shazeer and Stern 2018): second moments of a matrix from the means of its rows and of its columns."""

import torch
from torch import Tensor

from disttrain.optim.parts import WHOLE, Parts

DECAY = 0.8
"""Second moments decay by 1 - step^-0.8 (section 7.2)."""
SMALLEST_SQUARE = 1e-30
"""Added to squared gradients (the paper's epsilon 1): no factor is zero."""
SMALLEST_SCALE = 1e-3
"""The least root mean square by which a parameter's step is scaled (its epsilon 2)."""
LARGEST_UPDATE = 1.0
"""Root mean square to which an update is clipped (section 6: d)."""
FACTORS = ("row_var", "col_var")
"""State of a whole matrix [n, m] that every rank with a part of it has whole: [n, 1] and [1, m]."""


class Adafactor(torch.optim.Optimizer):
    """Algorithms 4 and 5 with the constants of section 9, as torch's: the learning rate bounds the relative step, and decay,
    which the paper has not, is decoupled.

    Matrices have factored second moments, vectors whole ones; there is no first moment. The root of a second moment is at
    least `eps`, or gradients that are zero but for rounding would become steps. torch's class would take the factors, and
    the root mean squares, of a part for those of the whole. Here they are of whole parameters.
    """

    def __init__(self, groups: list[dict], lr: float, eps: float, parts: Parts = WHOLE) -> None:
        super().__init__(groups, {"lr": lr, "eps": eps, "weight_decay": 0.0})
        self._parts = parts

    def begin(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state that a parameter starts from."""
        state = {"step": torch.zeros((), dtype=torch.float32)}
        if parameter.ndim < 2:
            return {**state, "variance": torch.zeros_like(parameter)}
        rows, columns = self._parts.shape(parameter)
        return {**state, "row_var": parameter.new_zeros(rows, 1), "col_var": parameter.new_zeros(1, columns)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            for p in parameters:
                if not self.state[p]:
                    self.state[p].update(self.begin(p))
                self.state[p]["step"] += 1
            below = self._of_matrices(parameters) if parameters[0].ndim > 1 else self._of_vectors(parameters)
            torch._foreach_clamp_min_(below, group["eps"])
            updates = list(torch._foreach_div([p.grad for p in parameters if p.grad is not None], below))
            squares = [torch.stack(torch._foreach_norm(x, 2, torch.float64)).square() for x in (parameters, updates)]
            sizes = squares[0].new_tensor([self._parts.shape(p).numel() for p in parameters])
            weights, steps = (self._parts.across(parameters, torch.stack(squares), "sum") / sizes).sqrt()
            scales = weights.clamp(min=SMALLEST_SCALE) / (steps / LARGEST_UPDATE).clamp(min=1.0)
            relative = [min(group["lr"], float(self.state[p]["step"]) ** -0.5) for p in parameters]
            lengths = (scales * scales.new_tensor(relative)).to(parameters[0].dtype)
            torch._foreach_mul_(updates, list(lengths.unbind()))
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_sub_(parameters, updates)

    def _of_vectors(self, parameters: list[Tensor]) -> list[Tensor]:
        """Roots of the second moments, with this step's."""
        for p in parameters:
            assert p.grad is not None
            self.state[p]["variance"].lerp_(p.grad.square().add_(SMALLEST_SQUARE), self._news(p))
        return [self.state[p]["variance"].sqrt() for p in parameters]

    def _of_matrices(self, parameters: list[Tensor]) -> list[Tensor]:
        """The same, of the parts that are here."""
        self._learn(parameters)
        found = []
        for p in parameters:
            state, (rows, columns) = self.state[p], self._parts.slices(p)
            row = (state["row_var"] / state["row_var"].mean()).sqrt_()  # apart: squares of both may underflow
            found.append(row[rows] * state["col_var"].sqrt()[:, columns])
        return found

    def _learn(self, parameters: list[Tensor]) -> None:
        """Take the means of the squared gradients of rows and of columns, over all parts, into the factors."""
        sums = []
        for p in parameters:
            assert p.grad is not None
            square, shape = p.grad.square(), self._parts.shape(p)
            both = square.new_zeros(sum(shape))
            rows, columns = self._parts.slices(p)
            both[: shape[0]][rows] = square.sum(1)
            both[shape[0] :][columns] = square.sum(0)
            sums.append(both)
        for p, both in zip(parameters, self._parts.summed(parameters, sums), strict=True):
            (rows, columns), state = self._parts.shape(p), self.state[p]
            state["row_var"].lerp_((both[:rows] / columns + SMALLEST_SQUARE).view(-1, 1), self._news(p))
            state["col_var"].lerp_((both[rows:] / rows + SMALLEST_SQUARE).view(1, -1), self._news(p))

    def _news(self, parameter: Tensor) -> float:
        """Share of this step's squares in the second moments."""
        return float(self.state[parameter]["step"]) ** -DECAY
