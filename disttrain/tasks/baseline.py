"""What simple models reach on a run's own held-out tokens: the line that a trained GPT has to beat."""

import math

import numpy as np

from disttrain.config.schema import Config
from disttrain.data import Prepared, open_data
from disttrain.data.shards import TokenSet, read_index
from disttrain.models.ngram import KneserNey


def trigram_loss(config: Config, prepared: Prepared) -> float:
    """Nats per token of an interpolated modified Kneser-Ney trigram (Chen and Goodman 1999) on all held-out targets.

    It is fitted to all training tokens and scored on exactly the targets of a full evaluation. Its context runs on
    from one sequence to the next, which the model's does not: an advantage given to the baseline. One source only.
    """
    data = open_data(config, prepared)
    train, held_out = (_stream(prepared, split) for split in ("train", "held_out"))
    targets = data.held_out_sequences * config.data.sequence_length
    model = KneserNey.fit(train, data.vocab_size, order=3)
    return model.cross_entropy(held_out[: targets + 1], np.arange(1, targets + 1))


def uniform_loss(config: Config, prepared: Prepared) -> float:
    """Nats per token of knowing nothing: the logarithm of the vocabulary size."""
    return math.log(open_data(config, prepared).vocab_size)


def _stream(prepared: Prepared, split: str) -> np.ndarray:
    """All tokens of a split, in order, int64."""
    ((folder, _),) = prepared.train if split == "train" else prepared.held_out
    tokens = TokenSet(read_index(folder), "train" if split == "train" else "held_out")
    return tokens.read(0, tokens.tokens)
