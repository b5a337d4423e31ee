"""`disttrain ngram`. Imports no torch, and what takes long when it is needed."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from disttrain.ngrams.schema import NgramConfig
    from disttrain.ngrams.scoring import Fitted


def ngram(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file with the settings.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the file's.")
    ] = None,
) -> None:
    """Fit a Kneser-Ney n-gram model to text and show its perplexity on other text, per token and per word."""
    from disttrain import launch
    from disttrain.config.problems import Problem, RefusedInput
    from disttrain.loggers.console import for_tables
    from disttrain.ngrams.schema import load_ngram
    from disttrain.ngrams.scoring import fit_and_score, write

    if (rank := launch.detect(os.environ)).world_size > 1:
        raise RefusedInput([Problem(("disttrain ngram", f"launcher {rank.launcher} with {rank.world_size} ranks"),
                                    "n-grams are counted by one process", "run it once, outside the launcher")])  # fmt: skip
    settings = load_ngram(config, overrides or [])
    console = for_tables()
    with console.status("counting n-grams"):
        fitted = fit_and_score(settings)
    folder = write(settings, fitted)
    console.print(_table(settings, fitted))
    console.print(f"written: {folder / 'summary.json'}", highlight=False)


def _table(config: "NgramConfig", fitted: "Fitted") -> "Table":
    """A line for each file that was scored."""
    from rich.table import Table

    from disttrain.loggers import readable

    kind = "modified Kneser-Ney" if config.modified else "Kneser-Ney"
    title = f"{kind}, order {config.order}, {fitted.fitted_tokens:,} tokens, vocabulary {fitted.vocabulary:,}"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("file", overflow="fold")
    for heading in ("tokens", "words", "unknown", "nats per token", "perplexity per token", "per word"):
        table.add_column(heading, justify="right")
    for file in fitted.files:
        numbers = (f"{n:,}" for n in (file.tokens, file.words, file.unknown_words))
        table.add_row(file.path, *numbers, f"{file.nats_per_token:.4f}", readable.perplexity(file.perplexity_per_token),
                      readable.perplexity(file.perplexity_per_word))  # fmt: skip
    return table
