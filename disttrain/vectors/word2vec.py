"""CBOW and skip-gram with negative sampling or hierarchical softmax, updated in mini-batches with closed gradients.

Mikolov et al. 2013a, "Efficient estimation of word representations in vector space"; 2013b, "Distributed representations
of words and phrases and their compositionality"; the gradients as in Rong 2014, "word2vec parameter learning explained".
CBOW's gradient is divided among the neighbours, as its mean demands and the authors' program does not (İrsoy et al. 2021,
"Corrected CBOW performs as well as skip-gram"). Skip-gram's neighbours of one word share their noise words, each counted
once for each neighbour, which is the same objective in expectation and a third of the work (Ji et al. 2016, "Parallelizing
word2vec in shared and distributed memory").

Shapes: V vocabulary, H size of a vector, P rows of a batch, C inputs of a row (1, or 2 x window in CBOW), T words that a row
predicts (1, or 2 x window in skip-gram with noise words), R outputs of a row (T + negatives, or the longest way in Huffman's
tree), K noise words.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from disttrain.vectors.corpus import Corpus
from disttrain.vectors.huffman import huffman_paths
from disttrain.vectors.sampling import Epoch, generator_of, make_epoch, neighbours, noise, noise_distribution
from disttrain.vectors.schema import VectorsConfig

LEAST_LR = 1e-4
"""The learning rate falls to this share of the first one, as in the authors' program."""


class Batch(NamedTuple):
    """Predictions: from the mean of some rows of the input vectors, each of some rows of the output vectors, yes or no."""

    inputs: Tensor
    """int64 [P, C], -1 where there is none."""
    outputs: Tensor
    """int64 [P, R]."""
    labels: Tensor
    """[P, R]: 1 for yes, 0 for no."""
    counted: Tensor
    """[P, R]: how often the output counts, 0 where it fills up."""
    predictions: int
    """Words that are predicted: what the mean loss is a mean over."""


class Asked(NamedTuple):
    """Outputs, labels and counted of a `Batch`, each [P, R]."""

    outputs: np.ndarray
    labels: np.ndarray
    counted: np.ndarray


Objective = Callable[[np.ndarray, np.random.Generator], Asked]
"""(predicted words int64 [P, T], -1 where there is none, random numbers) -> what is asked of the output vectors."""


class Gradients(NamedTuple):
    """The summed loss of a batch and its derivatives."""

    loss: Tensor
    """Scalar, nats."""
    hidden: Tensor
    """[P, H]."""
    outputs: Tensor
    """[P, R, H]."""


def gradients(hidden: Tensor, outputs: Tensor, labels: Tensor, counted: Tensor) -> Gradients:
    """Binary cross-entropy of the products of hidden [P, H] and outputs [P, R, H], summed over what counts [P, R].

    With s = sigmoid(hidden . output), minus log s for the label 1 and minus log(1 - s) for 0: equation 4 of 2013b for
    negative sampling, equation 3 for the way through the tree.
    """
    scores = (outputs * hidden[:, None, :]).sum(2)
    loss = (counted * (F.softplus(scores) - labels * scores)).sum()
    error = counted * (scores.sigmoid() - labels)
    return Gradients(loss, torch.bmm(error[:, None, :], outputs)[:, 0], error[:, :, None] * hidden[:, None, :])


def update(inputs: Tensor, outputs: Tensor, batch: Batch, lr: float) -> float:
    """One step of gradient descent on the summed loss, in place; inputs [V, H], outputs [V or V - 1, H]. The loss, nats."""
    there = (batch.inputs >= 0).to(inputs.dtype)[:, :, None]
    share = there / there.sum(1, keepdim=True)
    rows, targets = batch.inputs.clamp(min=0).flatten(), batch.outputs.flatten()
    hidden = (inputs.index_select(0, rows).view(*batch.inputs.shape, -1) * share).sum(1)
    wanted = outputs.index_select(0, targets).view(*batch.outputs.shape, -1)
    found = gradients(hidden, wanted, batch.labels, batch.counted)
    outputs.index_add_(0, targets, found.outputs.flatten(0, 1), alpha=-lr)
    inputs.index_add_(0, rows, (found.hidden[:, None, :] * share).flatten(0, 1), alpha=-lr)
    return found.loss.item()


def negative_sampling(counts: np.ndarray, negatives: int, power: float) -> Objective:
    """The words [P, T] themselves against the row's noise words, which count once for each word that they are not."""
    cumulative = noise_distribution(counts, power)

    def objective(words: np.ndarray, generator: np.random.Generator) -> Asked:
        drawn = noise(cumulative, (len(words), negatives), generator)
        there = words >= 0
        other = there[:, :, None] & (words[:, :, None] != drawn[:, None, :])
        outputs = np.concatenate((words.clip(min=0), drawn), axis=1)
        labels = np.concatenate((np.ones(words.shape), np.zeros(drawn.shape)), axis=1)
        return Asked(outputs, labels, np.concatenate((there, other.sum(1)), axis=1).astype(np.float64))

    return objective


def hierarchical_softmax(counts: np.ndarray) -> Objective:
    """Every turn on the way of the word [P, 1] through Huffman's tree; the first child is the yes (Mikolov's program)."""
    nodes, turns = huffman_paths(counts)

    def objective(words: np.ndarray, generator: np.random.Generator) -> Asked:
        way = nodes[words[:, 0]]
        return Asked(way.clip(min=0), 1.0 - turns[words[:, 0]], (way >= 0).astype(np.float64))

    return objective


class Word2Vec:
    """The vectors of a corpus while they are trained."""

    def __init__(self, corpus: Corpus, config: VectorsConfig, dtype: torch.dtype = torch.float32):
        self._corpus, self._config, self._dtype = corpus, config, dtype
        generator = torch.Generator().manual_seed(config.seed)
        shape = (len(corpus.words), config.size)
        outputs = len(corpus.words)
        if config.objective == "hierarchical_softmax":
            self._objective, outputs = hierarchical_softmax(corpus.counts), outputs - 1
        else:
            self._objective = negative_sampling(corpus.counts, config.negatives, config.noise_power)
        first = (torch.rand(shape, generator=generator) - 0.5) / config.size
        self.tensors = {"inputs": first.to(dtype), "outputs": torch.zeros(outputs, config.size, dtype=dtype)}
        """All that training changes."""
        self._epoch, self._number = Epoch(*(np.empty(0, dtype=np.int64) for _ in range(3))), -1

    def begin(self, epoch: int) -> int:
        """Make the text of an epoch ready; how many batches it has."""
        self._epoch, self._number = make_epoch(self._corpus, self._config.subsample, self._config.seed, epoch), epoch
        return self._epoch.batches(self._config.batch_size)

    def step(self, number: int, progress: float) -> tuple[float, int]:
        """Take batch `number` of the epoch that has begun; `progress` is the share of all training that is done.

        Returns (summed loss in nats, predictions).
        """
        batch = self.batch(number)
        if len(batch.inputs) == 0:
            return 0.0, 0
        lr = self._config.first_lr * max(1 - progress, LEAST_LR)
        return update(self.tensors["inputs"], self.tensors["outputs"], batch, lr), batch.predictions

    def batch(self, number: int) -> Batch:
        """The predictions of batch `number` of the epoch that has begun."""
        generator = generator_of(self._config.seed, self._number, number)
        places = self._epoch.places(number, self._config.batch_size)
        around = neighbours(self._epoch, places, self._config.window, generator)
        words = self._epoch.tokens[places].astype(np.int64)
        some = (around >= 0).any(1)
        around, words = around[some], words[some]
        if self._config.method == "cbow":
            inputs, predicted = around, words[:, None]
        elif self._config.objective == "negative_sampling":
            inputs, predicted = words[:, None], around
        else:
            row, column = np.nonzero(around >= 0)
            inputs, predicted = words[row, None], around[row, column][:, None]
        asked = self._objective(predicted, generator)
        labels, counted = (torch.from_numpy(x).to(self._dtype) for x in (asked.labels, asked.counted))
        outputs, predictions = torch.from_numpy(asked.outputs), int((predicted >= 0).sum())
        return Batch(torch.from_numpy(inputs), outputs, labels, counted, predictions)

    def vectors(self) -> Tensor:
        """The input vectors [V, H], which are what the papers use."""
        return self.tensors["inputs"]
