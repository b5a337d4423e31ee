"""word2vec's gradients and steps: equal to autograd's and to a slow loop; both methods learn what stands together."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from disttrain.vectors.word2vec import Batch, Word2Vec, gradients, hierarchical_softmax, negative_sampling, update
from tests.unit.vectors.made import corpus_of, pairs_text


def random_batch(contexts: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Batch]:
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs = (torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    rows = torch.randint(0, 7, (11, contexts), generator=generator)
    rows[0, 1:] = -1
    targets = torch.randint(0, 7, (11, 4), generator=generator)
    labels = torch.zeros(11, 4, dtype=torch.float64)
    labels[:, 0] = 1
    counted = torch.randint(0, 4, (11, 4), generator=generator).double()
    return inputs, outputs, Batch(rows, targets, labels, counted, 11)


def slow_loss(inputs: Tensor, outputs: Tensor, batch: Batch) -> Tensor:
    """The definition, prediction by prediction."""
    total = torch.zeros((), dtype=inputs.dtype)
    for rows, targets, labels, counted in zip(*batch[:4], strict=True):
        hidden = torch.stack([inputs[row] for row in rows.tolist() if row >= 0]).mean(0)
        for target, label, counts in zip(targets, labels, counted, strict=True):
            sign = 2 * label - 1
            total = total - counts * F.logsigmoid(sign * outputs[target] @ hidden)
    return total


def test_a_prediction_by_hand() -> None:
    # hidden (1, 2), outputs (1, 0) yes and (0, 1) no: scores 1 and 2
    hidden = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    outputs = torch.eye(2, dtype=torch.float64)[None]
    found = gradients(hidden, outputs, torch.tensor([[1.0, 0.0]]).double(), torch.ones(1, 2).double())
    assert found.loss.item() == pytest.approx(math.log1p(math.exp(-1)) + math.log1p(math.exp(2)), rel=1e-14)
    yes, no = 1 / (1 + math.exp(-1)) - 1, 1 / (1 + math.exp(-2))
    torch.testing.assert_close(found.hidden, torch.tensor([[yes, no]], dtype=torch.float64), rtol=1e-14, atol=0)
    expected = torch.tensor([[[yes, 2 * yes], [no, 2 * no]]], dtype=torch.float64)
    torch.testing.assert_close(found.outputs, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("contexts", [1, 3])
def test_a_step_is_autograds(contexts: int) -> None:
    inputs, outputs, batch = random_batch(contexts)
    ours = inputs.clone(), outputs.clone()
    loss = update(*ours, batch, lr=0.3)
    for table in (inputs, outputs):
        table.requires_grad_()
    expected = slow_loss(inputs, outputs, batch)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    for table, now in zip((inputs, outputs), ours, strict=True):
        assert table.grad is not None
        torch.testing.assert_close(now, table.detach() - 0.3 * table.grad, atol=1e-10, rtol=0)


def test_noise_counts_once_for_each_word_that_it_is_not() -> None:
    objective = negative_sampling(np.array([50, 30, 20]), 6, 0.75)
    words = np.array([[0, -1, 1], [1, -1, -1], [2, 2, 0], [0, 1, 2]])
    outputs, labels, counted = objective(words, np.random.default_rng(0))
    assert outputs.shape == labels.shape == counted.shape == (4, 9)
    assert labels[:, :3].all() and not labels[:, 3:].any()
    np.testing.assert_array_equal(counted[:, :3], words >= 0)
    for row, noise, counts in zip(words.tolist(), outputs[:, 3:].tolist(), counted[:, 3:].tolist(), strict=True):
        assert counts == [sum(word >= 0 and word != drawn for word in row) for drawn in noise]


def test_hierarchical_softmax_is_a_distribution() -> None:
    words = 9
    objective = hierarchical_softmax(np.array([20, 9, 9, 5, 4, 3, 2, 1, 1]))
    outputs, labels, counted = (
        torch.from_numpy(x) for x in objective(np.arange(words)[:, None], np.random.default_rng(0))
    )
    generator = torch.Generator().manual_seed(0)
    nodes = torch.randn(words - 1, 5, generator=generator, dtype=torch.float64)
    hidden = torch.randn(1, 5, generator=generator, dtype=torch.float64)
    losses = [
        gradients(hidden, nodes[outputs[w : w + 1]], labels[w : w + 1], counted[w : w + 1]).loss for w in range(words)
    ]
    assert torch.stack(losses).neg().exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_batches_are_the_pairs_within_the_window(tmp_path: Path) -> None:
    text = "a b c\nd e\n"
    config, corpus = corpus_of(tmp_path, text, window=1, subsample=0.0, batch=100)
    model = Word2Vec(corpus, config)
    assert model.begin(0) == 1
    batch = model.batch(0)
    pairs = {
        (corpus.words[centre], corpus.words[context])
        for centre, row, counted in zip(batch.inputs[:, 0].tolist(), batch.outputs.tolist(), batch.counted, strict=True)
        for context, counts in zip(row[:2], counted[:2], strict=True)
        if counts
    }
    assert pairs == {("a", "b"), ("b", "a"), ("b", "c"), ("c", "b"), ("d", "e"), ("e", "d")}
    assert batch.predictions == 6 and batch.labels.sum() == 5 * 2
    tree = Word2Vec(corpus, config.model_copy(update={"objective": "hierarchical_softmax"}))
    tree.begin(0)
    assert len(tree.batch(0).inputs) == tree.batch(0).predictions == 6
    cbow = Word2Vec(corpus, config.model_copy(update={"method": "cbow"}))
    cbow.begin(0)
    batch = cbow.batch(0)
    around = {
        corpus.words[word]: {corpus.words[i] for i in rows if i >= 0}
        for word, rows in zip(batch.outputs[:, 0].tolist(), batch.inputs.tolist(), strict=True)
    }
    assert around == {"a": {"b"}, "b": {"a", "c"}, "c": {"b"}, "d": {"e"}, "e": {"d"}}


def test_words_without_neighbours_are_no_predictions(tmp_path: Path) -> None:
    config, corpus = corpus_of(tmp_path, "a\nb\n", method="cbow", subsample=0.0)
    model = Word2Vec(corpus, config)
    model.begin(0)
    before = model.tensors["inputs"].clone()
    assert model.step(0, 0.0) == (0.0, 0)
    assert torch.equal(model.tensors["inputs"], before)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "skipgram"},
        {"method": "cbow"},
        {"method": "skipgram", "objective": "hierarchical_softmax"},
        {"method": "cbow", "objective": "hierarchical_softmax"},
    ],
    ids=lambda s: "-".join(s.values()),
)
def test_words_that_stand_together_become_alike(tmp_path: Path, settings: dict[str, Any]) -> None:
    config, corpus = corpus_of(tmp_path, pairs_text(150), size=8, window=3, lr=0.1, batch=8, subsample=0.2, **settings)
    model = Word2Vec(corpus, config)
    losses = []
    for epoch in range(4):
        results = [model.step(number, epoch / 4) for number in range(model.begin(epoch))]
        losses.append(sum(loss for loss, _ in results) / sum(count for _, count in results))
    assert losses[-1] < losses[0]
    units = F.normalize(model.vectors())
    place = {word: number for number, word in enumerate(corpus.words)}
    animals, colours = ([place[w] for w in words] for words in (("cat", "dog", "cow", "pig"), ("red", "blue", "green")))
    alike = units @ units.T
    assert alike[animals][:, animals].min() > alike[animals][:, colours].max() + 0.2
    assert alike[colours][:, colours].min() > alike[animals][:, colours].max() + 0.2


def test_the_seed_decides(tmp_path: Path) -> None:
    config, corpus = corpus_of(tmp_path, pairs_text(30), size=6, batch=16)

    def trained(seed: int) -> Tensor:
        torch.rand(3)  # the global generators play no part
        np.random.rand(3)
        model = Word2Vec(corpus, config.model_copy(update={"seed": seed}))
        for number in range(model.begin(0)):
            model.step(number, 0.0)
        return model.vectors().clone()

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))
