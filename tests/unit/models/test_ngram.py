"""Kneser-Ney: a distribution, equal to a slow dictionary version, right on an example worked by hand, good on text."""

import argparse
import inspect
import math
import statistics
import subprocess
import sys
import tarfile
import typing
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain.models.ngram import KneserNey


def slow_probability(stream, vocab, order, modified, context, token):
    """P(token | context) from the definition, by recursion over dictionaries; `context`: at most order - 1 tokens."""
    k = len(context) + 1
    neighbours, occurrences = defaultdict(set), Counter()
    for i in range(len(stream) - k + 1):
        window = tuple(stream[i : i + k])
        neighbours[window].add(stream[i - 1] if i else "start")
        occurrences[window] += 1
    counts = occurrences if k == order else {window: len(left) for window, left in neighbours.items()}
    of = Counter(counts.values())
    y = of[1] / (of[1] + 2 * of[2]) if of[1] else 0.5
    discount = {1: y, 2: y, 3: y}
    if modified and of[1] and of[2] and of[3]:
        three = {c: c - (c + 1) * y * of[c + 1] / of[c] for c in (1, 2, 3)}
        if min(three.values()) > 0:
            discount = three
    lower = slow_probability(stream, vocab, order, modified, context[1:], token) if context else 1 / vocab
    followers = {window[-1]: c for window, c in counts.items() if window[:-1] == context}
    if not followers:
        return lower
    total = sum(followers.values())
    kept = followers[token] - discount[min(followers[token], 3)] if token in followers else 0.0
    return kept / total + sum(discount[min(c, 3)] for c in followers.values()) / total * lower


def whole_distribution(model, context):
    """P(. | context) over the vocabulary, from the public interface."""
    rows = [np.array([*context, token]) for token in range(model.vocab_size)]
    return np.exp([model.log_probabilities(row, np.array([len(context)]))[0] for row in rows])


def words_of(*modules):
    """Tokens of real text: the sources of some standard-library modules, cut at word boundaries."""
    text = "".join(Path(inspect.getfile(module)).read_text() for module in modules)
    return text.replace("(", " ( ").replace(")", " ) ").replace(".", " . ").split()


def test_an_example_worked_by_hand():
    # a b a b c: bigrams ab 2, ba 1, bc 1, so D = 2 / (2 + 2 * 1) = 1/2. Left neighbours: a has (start, b), b has (a),
    # c has (b): counts 2, 1, 1 and again D = 1/2, so P(a) = 1.5/4 + 1.5/4 * 1/4 and P(b) = 0.5/4 + 1.5/4 * 1/4.
    model = KneserNey.fit(np.array([0, 1, 0, 1, 2]), vocab_size=4, order=2, modified=False)
    a, b, d = 0.46875, 0.21875, 0.09375

    def p(before, token):
        return math.exp(model.log_probabilities(np.array([before, token]), np.array([1]))[0])

    assert whole_distribution(model, []) == pytest.approx([a, b, b, d], rel=1e-14)
    assert p(0, 1) == pytest.approx(1.5 / 2 + 0.5 / 2 * b, rel=1e-14)
    assert p(1, 2) == pytest.approx(0.5 / 2 + 1.0 / 2 * b, rel=1e-14)
    assert p(1, 3) == pytest.approx(1.0 / 2 * d, rel=1e-14)
    assert p(2, 0) == pytest.approx(a, rel=1e-14)  # c was never followed by anything
    assert p(3, 0) == pytest.approx(a, rel=1e-14)  # d was never seen


def test_modified_discounts_worked_by_hand():
    # Occurrences 1, 1, 1, 2, 2, 3, 4: n = 3, 2, 1, 1, Y = 3/7, so D1 = 1 - 2Y 2/3, D2 = 2 - 3Y 1/2, D3 = 3 - 4Y.
    tokens = np.repeat(np.arange(7), [1, 1, 1, 2, 2, 3, 4])
    model = KneserNey.fit(tokens, vocab_size=8, order=1)
    y = 3 / 7
    one, two, three = 1 - 4 * y / 3, 2 - 1.5 * y, 3 - 4 * y
    rest = (3 * one + 2 * two + 2 * three) / 14 / 8
    expected = [(1 - one) / 14 + rest] * 3 + [(2 - two) / 14 + rest] * 2
    expected += [(3 - three) / 14 + rest, (4 - three) / 14 + rest, rest]
    assert whole_distribution(model, []) == pytest.approx(expected, rel=1e-14)


@settings(max_examples=60, deadline=None)
@given(
    stream=st.lists(st.integers(0, 4), max_size=40),
    scored=st.lists(st.integers(0, 5), min_size=1, max_size=8),
    order=st.integers(1, 7),
    modified=st.booleans(),
)
def test_equals_the_slow_reference_and_is_never_zero(stream, scored, order, modified):
    model = KneserNey.fit(np.array(stream, dtype=np.int64), 6, order, modified)
    got = np.exp(model.log_probabilities(np.array(scored)))
    for position, token in enumerate(scored):
        context = tuple(scored[max(0, position - order + 1) : position])
        assert got[position] == pytest.approx(slow_probability(stream, 6, order, modified, context, token), rel=1e-12)
    assert np.all(got > 0)


@settings(max_examples=40, deadline=None)
@given(
    stream=st.lists(st.integers(0, 3), max_size=60),
    order=st.integers(1, 7),
    modified=st.booleans(),
    context=st.lists(st.integers(0, 4), max_size=6),
)
def test_sums_to_one_in_any_context(stream, order, modified, context):
    model = KneserNey.fit(np.array(stream, dtype=np.int64), 5, order, modified)
    distribution = whole_distribution(model, context)
    assert distribution.sum() == pytest.approx(1, abs=1e-12)
    assert distribution.min() > 0


def test_sums_to_one_after_every_pair_of_a_small_vocabulary():
    tokens = np.random.default_rng(1).integers(0, 7, 150)
    model = KneserNey.fit(tokens, vocab_size=9)  # tokens 7 and 8 are never seen
    for first in range(9):
        for second in range(9):
            assert whole_distribution(model, [first, second]).sum() == pytest.approx(1, abs=1e-12)


def test_positions_choose_targets_and_keep_their_context():
    tokens = np.random.default_rng(2).integers(0, 20, 500)
    model = KneserNey.fit(tokens[:400], vocab_size=20, order=4)
    every = model.log_probabilities(tokens)
    chosen = np.array([499, 3, 250, 250])
    np.testing.assert_array_equal(model.log_probabilities(tokens, chosen), every[chosen])
    assert model.cross_entropy(tokens, chosen) == pytest.approx(-every[chosen].mean(), rel=1e-14)
    assert model.cross_entropy(tokens) == pytest.approx(-every.mean(), rel=1e-14)


def test_longer_contexts_and_modified_discounts_help_on_real_text():
    words = words_of(argparse, inspect, tarfile, statistics, typing, subprocess)
    known = {word: index for index, (word, _) in enumerate(Counter(words).most_common(1999))}
    tokens = np.array([known.get(word, 1999) for word in words])
    held_out = np.arange(len(tokens) - 3000, len(tokens))
    training = tokens[: held_out[0]]

    def nats(order, modified=True):
        return KneserNey.fit(training, 2000, order, modified).cross_entropy(tokens, held_out)

    unigram, bigram, trigram = nats(1), nats(2), nats(3)
    frequency = (np.bincount(training, minlength=2000) + 1) / (len(training) + 2000)
    assert unigram == pytest.approx(-np.log(frequency[tokens[held_out]]).mean(), rel=0.05)
    assert bigram < unigram - 0.5
    assert trigram < bigram - 0.05
    assert trigram < nats(3, modified=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"order": 0}, "order=0"),
        ({"tokens": np.array([0, 9])}, "outside the vocabulary of 8"),
        ({"tokens": np.array([-1, 1])}, "outside the vocabulary of 8"),
        ({"tokens": np.array([0.5])}, "one row of integers"),
        ({"tokens": np.zeros((2, 2), dtype=int)}, "one row of integers"),
        ({"vocab_size": 2**62}, "passes 2\\^63"),
    ],
)
def test_what_fit_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        KneserNey.fit(**{"tokens": np.arange(8), "vocab_size": 8, "order": 3, **arguments})


def test_what_scoring_refuses():
    model = KneserNey.fit(np.arange(8), vocab_size=8)
    with pytest.raises(ValueError, match="outside the 4 tokens"):
        model.log_probabilities(np.arange(4), np.array([4]))
    with pytest.raises(ValueError, match="outside the vocabulary of 8"):
        model.log_probabilities(np.array([8]))
    with pytest.raises(ValueError, match="no target positions"):
        model.cross_entropy(np.arange(4), np.array([], dtype=int))


def test_any_integer_type_and_a_memory_map_will_do(tmp_path):
    tokens = np.random.default_rng(3).integers(0, 50, 1000)
    tokens.astype(np.uint16).tofile(tmp_path / "tokens.bin")
    mapped = np.memmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r")
    assert KneserNey.fit(mapped, 50).cross_entropy(mapped) == KneserNey.fit(tokens, 50).cross_entropy(tokens)


def test_the_module_itself_imports_no_torch():
    import disttrain.models.ngram as ngram

    code = f"import sys, runpy; runpy.run_path({ngram.__file__!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
