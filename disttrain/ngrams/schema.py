"""The file that `disttrain ngram` reads. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from disttrain.config.problems import Problem, RefusedInput
from disttrain.config.section import Positive, Section
from disttrain.config.standalone import load_section, without_effect

REFERENCE = "docs/vectors.md"
OF_WORDS = ("lowercase", "min_count", "unknown", "end")
"""Settings that models of bytes do not read."""


class NgramConfig(Section):
    """What an n-gram model is fitted to and scored on."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "ngram"
    """Name of the folder; the config file's stem when not given."""
    dir: str = "runs"
    """Folder that holds the folder."""
    path: str | list[str]
    """Text to fit: files, folders or globs."""
    evaluate: Annotated[list[str], Field(min_length=1)]
    """Files to score, each on its own."""
    order: Annotated[int, Field(gt=0, le=64)] = 5
    """Tokens of the longest n-gram."""
    modified: bool = True
    """Three discounts an order (Chen and Goodman 1998, section 4.1.6) in place of one (Kneser and Ney 1995)."""
    unit: Literal["words", "bytes"] = "words"
    """Tokens: what white space separates, and an end of each line; or all bytes of the text."""
    lowercase: bool = False
    """Lower-case the text."""
    min_count: Positive = 1
    """Words of the fitted text that occur less often become the unknown word."""
    unknown: str = "<unk>"
    """The unknown word; texts may contain it."""
    end: str = "<eos>"
    """The token at the end of each line, which is predicted and counted like a word in the perplexity per token."""

    @property
    def folder(self) -> Path:
        """Where the figures are written."""
        return Path(self.dir).expanduser() / self.name


def load_ngram(path: Path, overrides: Sequence[str]) -> NgramConfig:
    """Read a config. Raises RefusedInput with every problem, settings without effect among them."""
    config = load_section(NgramConfig, path, overrides, REFERENCE)
    problems = []
    if config.unit == "bytes":
        problems += without_effect(config, OF_WORDS, "unit=bytes", "use unit=words")
    if config.unknown == config.end:
        problems.append(Problem((f"unknown={config.unknown}", f"end={config.end}"), "they are the same token",
                                "give two different ones"))  # fmt: skip
    if problems:
        raise RefusedInput(problems)
    return config
