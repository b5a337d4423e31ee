"""GloVe: co-occurrences against a loop over the text, the loss and AdaGrad by hand."""

import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from disttrain.vectors.glove import GloVe, count_cooccurrences, glove_loss, weight
from tests.unit.vectors.made import corpus_of, pairs_text


@pytest.mark.parametrize("window", [1, 3, 50])
def test_cooccurrences_are_those_of_a_loop(tmp_path: Path, window: int) -> None:
    generator = np.random.default_rng(window)
    text = "\n".join(" ".join(generator.choice(list("abcde"), n)) for n in (7, 1, 4, 12, 2, 9))
    _, corpus = corpus_of(tmp_path, text)
    expected: dict[tuple[int, int], float] = defaultdict(float)
    for i, word in enumerate(corpus.tokens.tolist()):
        for j, other in enumerate(corpus.tokens.tolist()):
            if i != j and abs(i - j) <= window and corpus.lines[i] == corpus.lines[j]:
                expected[word, other] += 1 / abs(i - j)
    found = count_cooccurrences(corpus, window)
    pairs = list(zip(found.words.tolist(), found.others.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    assert dict(zip(pairs, found.amounts.tolist(), strict=True)) == pytest.approx(dict(expected), rel=1e-6)


def test_weight_by_hand() -> None:
    given = weight(torch.tensor([100.0, 200.0, 6.25, 1.0], dtype=torch.float64), 100.0, 0.75)
    assert given.tolist() == pytest.approx([1.0, 1.0, 0.125, 0.01**0.75], rel=1e-14)


def test_loss_by_hand() -> None:
    tensors = {
        "words": torch.tensor([[1.0, 2.0], [0.0, 1.0]]).double(),
        "contexts": torch.tensor([[1.0, 0.0], [3.0, 1.0]]).double(),
        "word_biases": torch.tensor([0.5, -1.0]).double(),
        "context_biases": torch.tensor([0.0, 2.0]).double(),
    }
    i, j, x = torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([math.e, 16.0], dtype=torch.float64)
    # 5 + 0.5 + 2 - 1 = 6.5 with weight 1; 0 - 1 + 0 - log 16 with weight 1
    expected = (math.e / 16) ** 0.5 * 6.5**2 + (1 + math.log(16)) ** 2
    assert glove_loss(tensors, i, j, x, 16.0, 0.5).item() == pytest.approx(expected, rel=1e-14)


def test_a_step_is_adagrads(tmp_path: Path) -> None:
    config, corpus = corpus_of(tmp_path, "a b a c\nb c b\n", method="glove", size=3, window=2, batch=1000, lr=0.1)
    model = GloVe(corpus, config, dtype=torch.float64)
    before = {name: tensor.clone().requires_grad_() for name, tensor in model.tensors.items() if ".sum" not in name}
    met = count_cooccurrences(corpus, 2)
    i, j, x = (torch.from_numpy(a) for a in (met.words.astype(int), met.others.astype(int), met.amounts.astype(float)))
    half = glove_loss(before, i, j, x, 100.0, 0.75) / 2
    half.backward()
    model.begin(0)
    loss, count = model.step(0, 0.0)
    assert count == len(x) and loss == pytest.approx(2 * half.item(), rel=1e-12)
    for name, tensor in before.items():
        assert tensor.grad is not None
        squares = 1 + tensor.grad.square()
        expected = tensor.detach() - 0.1 * tensor.grad / squares.sqrt()
        torch.testing.assert_close(model.tensors[name], expected, atol=1e-10, rtol=0)
        torch.testing.assert_close(model.tensors[f"{name}.sum"], squares, atol=1e-10, rtol=0)


def test_words_that_stand_together_become_alike(tmp_path: Path) -> None:
    config, corpus = corpus_of(tmp_path, pairs_text(300), method="glove", size=8, window=3, batch=16, x_max=10.0)
    model = GloVe(corpus, config)
    losses = []
    for epoch in range(15):
        results = [model.step(number, 0.0) for number in range(model.begin(epoch))]
        losses.append(sum(loss for loss, _ in results) / sum(count for _, count in results))
    assert losses[-1] < losses[0] / 2
    units = F.normalize(model.vectors())
    place = {word: number for number, word in enumerate(corpus.words)}
    animals, colours = ([place[w] for w in words] for words in (("cat", "dog", "cow", "pig"), ("red", "blue", "green")))
    alike = units @ units.T
    assert alike[animals][:, animals].min() > alike[animals][:, colours].max() + 0.1
