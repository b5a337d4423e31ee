import math

import pytest

from disttrain.scores.perplexity import perplexities, perplexity, words_in


def test_as_many_choices_as_the_model_has():
    nats = 10 * math.log(8)  # ten tokens, each one of eight
    assert perplexity(nats, 10) == pytest.approx(8, abs=1e-10)
    found = perplexities(nats, tokens=10, words=5)
    assert found == pytest.approx({"perplexity_per_token": 8, "perplexity_per_word": 64}, abs=1e-10)


def test_what_is_no_perplexity():
    assert perplexity(1e6, 1) == math.inf and perplexity(0.0, 3) == 1
    with pytest.raises(ValueError, match="count of 1 or more"):
        perplexity(1.0, 0)


def test_words_with_ends_of_lines():
    assert words_in(" no it was n't \n\n black monday \n") == 6 + 3 and words_in("") == 0
