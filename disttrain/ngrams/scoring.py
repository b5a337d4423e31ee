"""Fit an n-gram model to text and score files with it (numpy; no torch)."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from disttrain.config.problems import Problem, RefusedInput
from disttrain.config.standalone import dump_section
from disttrain.data.items import expand
from disttrain.folders import write_atomically
from disttrain.models.ngram import KneserNey
from disttrain.ngrams.schema import NgramConfig
from disttrain.ngrams.stream import BYTES, make_vocabulary, read_stream


@dataclass(frozen=True)
class FileScore:
    """What a model says of a file."""

    path: str
    tokens: int
    """Tokens that are predicted: all of them, the first one without a context."""
    words: int
    """What white space separates."""
    unknown_words: int
    """Words that were scored as the unknown word because they are not in the vocabulary."""
    nats_per_token: float
    """Mean of -log P."""
    perplexity_per_token: float
    """exp of it."""
    perplexity_per_word: float
    """exp of the sum of -log P over the number of words."""


@dataclass(frozen=True)
class Fitted:
    """An n-gram model and what it was scored on."""

    fitted_tokens: int
    vocabulary: int
    gram_counts: list[int]
    """Distinct n-grams, shortest first."""
    files: list[FileScore]


def fit_and_score(config: NgramConfig) -> Fitted:
    """Fit and score; writes nothing. Raises RefusedInput where files are missing, cannot be read or hold no words."""
    training, problems = expand(config.path, "file", "path")
    evaluated, more = expand(config.evaluate, "file", "evaluate")
    if problems or more:
        raise RefusedInput([*problems, *more])
    vocabulary = make_vocabulary(training, config)
    streams = [read_stream([path], config, vocabulary) for path in evaluated]
    empty = [path for path, stream in zip(evaluated, streams, strict=True) if stream.words == 0]
    if empty:
        raise RefusedInput([Problem((f"evaluate={path}",), "there are no words in it", "give a file with text")
                            for path in empty])  # fmt: skip
    stream = read_stream(training, config, vocabulary)
    entries = BYTES if vocabulary is None else len(vocabulary)
    model = KneserNey.fit(stream.tokens, entries, config.order, config.modified)
    scores = []
    for path, held_out in zip(evaluated, streams, strict=True):
        nats = model.cross_entropy(held_out.tokens)
        count, words = len(held_out.tokens), held_out.words
        per_word = _perplexity(nats * count / words)
        scores.append(FileScore(str(path), count, words, held_out.unknown, nats, _perplexity(nats), per_word))
    return Fitted(len(stream.tokens), entries, model.gram_counts, scores)


def write(config: NgramConfig, fitted: Fitted) -> Path:
    """Write config.yaml and summary.json to the config's folder; the folder."""
    config.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(config.folder / "config.yaml", dump_section(config))
    write_atomically(config.folder / "summary.json", json.dumps(asdict(fitted), indent=2) + "\n")
    return config.folder


def _perplexity(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
