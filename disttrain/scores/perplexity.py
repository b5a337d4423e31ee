"""Perplexity of a text: how many equally likely continuations would surprise a model as much."""

import math

END_OF_LINE = "<eos>"


def perplexity(nats: float, count: int) -> float:
    """exp(nats / count): nats is the sum of -ln p over all target tokens of a text, count what shares it.

    Infinite where that is no number of float64. Raises ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"perplexity needs a count of 1 or more, not {count}")
    try:
        return math.exp(nats / count)
    except OverflowError:
        return math.inf


def perplexities(nats: float, tokens: int, words: int) -> dict[str, float]:
    """perplexity_per_token exp(nats / tokens) and perplexity_per_word exp(nats / words) = per_token^(tokens / words).

    Only the second compares models with different vocabularies (Merity et al. 2017; Radford et al. 2019, section 3.1).
    It is right only when the tokens make up the whole text of the words.
    """
    return {"perplexity_per_token": perplexity(nats, tokens), "perplexity_per_word": perplexity(nats, words)}


def words_in(text: str) -> int:
    """Words of a text as WikiText and PTB count them: what white space separates, and one ``<eos>`` a line.

    A text of W white-space words and L newlines has W + L; so WikiText-2's test split has 245,569.
    """
    return len(text.split()) + text.count("\n")
