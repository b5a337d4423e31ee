"""GloVe: vectors whose products are the logarithms of how often words meet.

Pennington, Socher and Manning 2014, "GloVe: Global vectors for word representation", section 3; torch's AdaGrad updates.

Shapes: V vocabulary, H size of a vector, M pairs of words that meet, B pairs of a batch.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from disttrain.vectors.corpus import Corpus
from disttrain.vectors.sampling import generator_of
from disttrain.vectors.schema import VectorsConfig

FIRST_SQUARES = 1.0
"""What AdaGrad's sums of squared gradients begin with, as in the authors' program."""


@dataclass(frozen=True)
class Cooccurrences:
    """How much two words meet: the sum of 1 / distance over all places within the window, in both directions."""

    words: np.ndarray
    """int32 [M]: i."""
    others: np.ndarray
    """int32 [M]: j."""
    amounts: np.ndarray
    """float32 [M]: X_ij > 0."""


def count_cooccurrences(corpus: Corpus, window: int) -> Cooccurrences:
    """Count over the text, within lines; X is symmetric. Takes some 50 bytes for each place of the window and word."""
    vocabulary = len(corpus.words)
    keys, amounts = [], []
    for distance in range(1, window + 1):
        left, right = corpus.tokens[:-distance].astype(np.int64), corpus.tokens[distance:].astype(np.int64)
        same = corpus.lines[:-distance] == corpus.lines[distance:]
        left, right = left[same], right[same]
        met, times = np.unique(np.minimum(left, right) * vocabulary + np.maximum(left, right), return_counts=True)
        keys.append(met)
        amounts.append(times / distance)
    met, numbers = np.unique(np.concatenate(keys), return_inverse=True)
    total = np.bincount(numbers, weights=np.concatenate(amounts), minlength=len(met))
    low, high = met // vocabulary, met % vocabulary
    apart = low != high
    words = np.concatenate((low[apart], high[apart], low[~apart]))
    others = np.concatenate((high[apart], low[apart], low[~apart]))
    both = np.concatenate((total[apart], total[apart], 2 * total[~apart]))
    return Cooccurrences(words.astype(np.int32), others.astype(np.int32), both.astype(np.float32))


def weight(amounts: Tensor, x_max: float, alpha: float) -> Tensor:
    """f(X) = min(1, (X / x_max) ^ alpha) of amounts [B] (equation 9)."""
    return (amounts / x_max).pow(alpha).clamp(max=1)


def glove_loss(tensors: dict[str, Tensor], i: Tensor, j: Tensor, amounts: Tensor, x_max: float, alpha: float) -> Tensor:
    """The sum over pairs of f(X) (w_i . w~_j + b_i + b~_j - log X)^2 (equation 8); i, j int64 [B], amounts [B].

    tensors: words and contexts [V, H], word_biases and context_biases [V].
    """
    products = (tensors["words"][i] * tensors["contexts"][j]).sum(1)
    difference = products + tensors["word_biases"][i] + tensors["context_biases"][j] - amounts.log()
    return (weight(amounts, x_max, alpha) * difference.square()).sum()


class GloVe:
    """The vectors of a corpus while they are trained."""

    def __init__(self, corpus: Corpus, config: VectorsConfig, dtype: torch.dtype = torch.float32):
        self._config = config
        self._met = count_cooccurrences(corpus, config.window)
        generator = torch.Generator().manual_seed(config.seed)
        vocabulary = len(corpus.words)
        shapes = {"words": (vocabulary, config.size), "contexts": (vocabulary, config.size), "word_biases": (vocabulary,),
                  "context_biases": (vocabulary,)}  # fmt: skip
        self._parameters = {
            name: ((torch.rand(shape, generator=generator) - 0.5) / config.size).to(dtype).requires_grad_()
            for name, shape in shapes.items()
        }
        self._adagrad = torch.optim.Adagrad(
            self._parameters.values(), lr=config.first_lr, initial_accumulator_value=FIRST_SQUARES, eps=0.0
        )
        squares = {f"{name}.sum": self._adagrad.state[p]["sum"] for name, p in self._parameters.items()}
        self.tensors = {name: p.detach() for name, p in self._parameters.items()} | squares
        """All that training changes."""
        self._order = np.empty(0, dtype=np.int64)

    def begin(self, epoch: int) -> int:
        """Shuffle all pairs for an epoch; how many batches it has."""
        self._order = generator_of(self._config.seed, epoch).permutation(len(self._met.amounts))
        return -(-len(self._order) // self._config.batch_size)

    def step(self, number: int, progress: float) -> tuple[float, int]:
        """Take batch `number` of the epoch that has begun. Returns (summed loss, pairs); the rate is AdaGrad's alone.

        Half the loss is minimised, as in the authors' program.
        """
        size = self._config.batch_size
        chosen = self._order[number * size : (number + 1) * size]
        i, j = (torch.from_numpy(numbers[chosen].astype(np.int64)) for numbers in (self._met.words, self._met.others))
        amounts = torch.from_numpy(self._met.amounts[chosen]).to(self._parameters["words"].dtype)
        loss = glove_loss(self._parameters, i, j, amounts, self._config.x_max, self._config.alpha)
        (loss / 2).backward()
        self._adagrad.step()
        self._adagrad.zero_grad()
        return loss.item(), len(chosen)

    def vectors(self) -> Tensor:
        """The sums w + w~ [V, H] (section 4.2)."""
        return self.tensors["words"] + self.tensors["contexts"]
