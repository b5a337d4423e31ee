"""k-means weight sharing (Han et al. 2015, "Deep Compression", section 3): the weights of a matrix take few values."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from disttrain.models import Model


@dataclass(frozen=True)
class Shared:
    """A matrix of few values."""

    codebook: np.ndarray
    """float32 [clusters], ascending."""
    codes: np.ndarray
    """Whole numbers of the shape of the matrix: which value each weight has."""

    @property
    def values(self) -> Tensor:
        """The matrix, float32."""
        return torch.from_numpy(self.codebook[self.codes])


def cluster(weights: np.ndarray, clusters: int, keep_zeros: bool, rounds: int = 100) -> Shared:
    """Lloyd's algorithm (1982) on the elements of a matrix, float64, from centroids at equal distances from the smallest to
    the largest, which the paper finds best (section 3.2).

    It ends where nothing changes, or after so many rounds. A centroid that is nearest to no weight stays where it is. With
    `keep_zeros` the elements that are exactly zero are a value of their own, and the others share `clusters` - 1: what was
    pruned stays zero. Raises ValueError for fewer than two clusters.
    """
    if clusters < 2:
        raise ValueError(f"{clusters} clusters are too few")
    flat = weights.astype(np.float64).ravel()
    apart = flat == 0 if keep_zeros else np.zeros(flat.shape, bool)
    values = np.sort(flat[~apart])
    centroids = np.linspace(values[0], values[-1], clusters - keep_zeros) if len(values) else np.zeros(1)
    totals = np.concatenate([[0.0], np.cumsum(values)])
    for _ in range(rounds):
        ends = np.searchsorted(values, (centroids[1:] + centroids[:-1]) / 2)
        edges = np.concatenate([[0], ends, [len(values)]])
        counts, sums = np.diff(edges), np.diff(totals[edges])
        moved = np.where(counts > 0, sums / np.maximum(counts, 1), centroids)
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    return _assigned(weights, centroids, apart.reshape(weights.shape) if keep_zeros else None)


def _assigned(weights: np.ndarray, centroids: np.ndarray, zero: np.ndarray | None) -> Shared:
    codes = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, weights.astype(np.float64))
    values, inverse = np.unique(np.append(centroids, 0.0) if zero is not None else centroids, return_inverse=True)
    if zero is None:
        return Shared(values.astype(np.float32), inverse[codes])
    return Shared(values.astype(np.float32), np.where(zero, inverse[-1], inverse[codes]))


def finetune(
    model: Model, shared: Mapping[str, Shared], batches: Iterable[Mapping[str, Tensor]], lr: float
) -> dict[str, Shared]:
    """Codebooks after a step of plain gradient descent for each batch; which weights share a value stays (ibid., 3.3).

    The gradient of a value is the sum of those of the weights that have it. Zero stays zero. The model's own weights are
    not changed. The loss is the mean of a batch, in evaluation mode.
    """
    model.eval()
    codes = {name: torch.from_numpy(s.codes) for name, s in shared.items()}
    books = {name: torch.from_numpy(s.codebook.copy()).requires_grad_() for name, s in shared.items()}
    for batch in batches:
        weights = {f"model.{name}": book[codes[name]] for name, book in books.items()}
        losses = functional_call(_Loss(model), weights, (dict(batch),), tie_weights=True)
        total = torch.stack([loss.sum / loss.count.clamp(min=1) for loss in losses.values()]).sum()
        gradients = torch.autograd.grad(total, list(books.values()))
        with torch.no_grad():
            for book, gradient in zip(books.values(), gradients, strict=True):
                book -= lr * torch.where(book == 0, torch.zeros_like(gradient), gradient)
    return {name: Shared(books[name].detach().numpy(), shared[name].codes) for name in shared}


class _Loss(torch.nn.Module):
    """A model whose forward is its loss."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> dict:
        """See the model's `loss`."""
        return self.model.loss(batch)
