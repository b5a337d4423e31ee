"""Settings and texts for the data tests: everything is made in the test's own folder."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from disttrain.config.schema import Config

SHARED = Path(__file__).parents[4] / "shared" / "data"


def make_text(size: int, seed: int = 0) -> str:
    """English-like text of about `size` characters: lines of sentences, now and then a blank line or an accent."""
    rng = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(800)] + [
        "é",
        "naïve",
        "中文",
        "😀",
        "2024",
    ]
    lines, total = [], 0
    while total < size:
        line = " ".join(rng.choices(words, k=rng.randint(3, 14))).capitalize() + rng.choice([".", "!", "?", ".", ","])
        lines.append(line if rng.random() < 0.9 else line + "\n")
        total += len(lines[-1]) + 1
    return "\n".join(lines) + "\n"


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Config]:
    """Builds a config with its cache in the test's folder: config(family="bert", corpus="text", path=...)."""

    def build(family: str = "gpt", seed: int = 1, global_batch: int = 12, micro: int | None = None,
              vocab_size: int | None = None, **data: object) -> Config:  # fmt: skip
        model = {"family": family} | ({"vocab_size": vocab_size} if vocab_size else {})
        train = {"global_batch_size": global_batch, "micro_batch_size": micro}
        settings = {"cache_dir": str(tmp_path / "cache"), **data}
        return Config.model_validate({"run": {"seed": seed}, "model": model, "train": train, "data": settings})

    return build


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A text of about 60 kB."""
    path = tmp_path / "text.txt"
    path.write_text(make_text(60_000))
    return path
