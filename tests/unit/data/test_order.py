import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain.data.order import BLOCK, Blend, permute, quotas


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=st.lists(st.integers(0, 2**63), min_size=1, max_size=4))
def test_permute_is_a_bijection(size, key):
    assert np.array_equal(np.sort(permute(np.arange(size), size, tuple(key))), np.arange(size))


@settings(max_examples=30, deadline=None)
@given(size=st.integers(2, 10**15), data=st.data())
def test_permute_does_not_depend_on_how_it_is_asked(size, data):
    index = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=8)))
    together = permute(index, size, (3, 1))
    assert together.min() >= 0 and together.max() < size
    assert together.tolist() == [int(permute(np.array([i]), size, (3, 1))[0]) for i in index]


def test_permute_shuffles_well_and_differently_for_each_key():
    size = 10_000
    one, two = permute(np.arange(size), size, (1, 0)), permute(np.arange(size), size, (1, 1))
    for order in (one, two):
        assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.05
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert np.mean(one == two) < 0.01


def test_permute_refuses_what_is_out_of_range():
    with pytest.raises(ValueError, match="range"):
        permute(np.array([5]), 5, (0,))


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_quotas_are_within_one_thousandth(weights):
    parts = quotas(weights)
    assert BLOCK % sum(parts) == 0
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part / sum(parts) - weight / sum(weights)) < 1 / BLOCK


@settings(max_examples=30, deadline=None)
@given(weights=st.lists(st.floats(0.05, 1), min_size=1, max_size=5), seed=st.integers(0, 100))
def test_blend_has_exact_shares_in_every_block_and_uses_every_position_once(weights, seed):
    parts = quotas(weights)
    length = sum(parts)
    source, position = Blend(tuple(parts), (seed,)).locate(np.arange(3 * length))
    for number, part in enumerate(parts):
        assert np.array_equal(np.sort(position[source == number]), np.arange(3 * part))
        for block in range(3):
            assert np.sum(source[block * length : (block + 1) * length] == number) == part
