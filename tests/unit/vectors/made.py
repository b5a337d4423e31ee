"""Small texts and settings that the tests of word vectors share."""

from pathlib import Path
from typing import Any

import numpy as np

from disttrain.vectors.corpus import Corpus, read_corpus
from disttrain.vectors.schema import VectorsConfig


def config_of(folder: Path, text: str, **settings: Any) -> VectorsConfig:
    """Settings for a text, which is written to a folder; every word counts unless `settings` say otherwise."""
    (folder / "text.txt").write_text(text)
    given = {"path": str(folder / "text.txt"), "dir": str(folder / "runs"), "min_count": 1, **settings}
    return VectorsConfig.model_validate(given)


def corpus_of(folder: Path, text: str, **settings: Any) -> tuple[VectorsConfig, Corpus]:
    """The settings and what they read."""
    config = config_of(folder, text, **settings)
    return config, read_corpus(config)


def pairs_text(lines: int, seed: int = 0) -> str:
    """Lines about one of two subjects: words of a subject stand together, words of both with the fillers."""
    generator = np.random.default_rng(seed)
    subjects = (["cat", "dog", "cow", "pig"], ["red", "blue", "green", "pink"])
    fillers = ["the", "a", "of"]
    made = []
    for _ in range(lines):
        words = [*generator.choice(subjects[generator.integers(2)], 6), *generator.choice(fillers, 2)]
        made.append(" ".join(generator.permutation(words)))
    return "\n".join(made) + "\n"
