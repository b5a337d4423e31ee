"""`disttrain vectors`. Imports no torch, and what takes long when it is needed."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console
    from rich.table import Table

    from disttrain.interruption import Interruption
    from disttrain.vectors.analogy import Score
    from disttrain.vectors.corpus import Corpus
    from disttrain.vectors.files import Vectors
    from disttrain.vectors.schema import VectorsConfig
    from disttrain.vectors.state import Place


def vectors(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="YAML file with the settings.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the file's.")
    ] = None,
    evaluate: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Judge the vectors of a folder, or a file of vectors.")
    ] = None,
    questions: Annotated[Path | None, typer.Option(help="With --evaluate: a file of analogy questions.")] = None,
    nearest: Annotated[
        list[str] | None, typer.Option(help="With --evaluate: show the words nearest to this one.")
    ] = None,
) -> None:
    """Train word vectors (CBOW, skip-gram, GloVe), or judge them by analogies and neighbours; goes on where it stopped."""
    if (config is None) == (evaluate is None):
        raise typer.BadParameter("give a config to train, or --evaluate and a folder", param_hint="CONFIG")
    if evaluate is None and (questions or nearest):
        raise typer.BadParameter(
            "this goes with --evaluate; a config has the setting questions", param_hint="--questions"
        )
    if evaluate is not None and not (questions or nearest):
        raise typer.BadParameter("give --questions or --nearest", param_hint="--evaluate")
    if evaluate is not None:
        _judge(evaluate, questions, nearest or [])
        return
    assert config is not None
    raise typer.Exit(_train(config, overrides or []))


def _refuse_ranks() -> None:
    """Raises RefusedInput where a launcher has started several processes, each of which would do the same."""
    from disttrain import launch
    from disttrain.config.problems import Problem, RefusedInput

    rank = launch.detect(os.environ)
    if rank.world_size > 1:
        settings = ("disttrain vectors", f"launcher {rank.launcher} with {rank.world_size} ranks")
        fix = "run it once, outside the launcher"
        raise RefusedInput([Problem(settings, "word vectors are trained by one process", fix)])


def _train(path: Path, overrides: list[str]) -> int:
    """Train, write and judge; the exit code."""
    from disttrain.interruption import Interruption

    interruption = Interruption().listen()
    from disttrain.config.problems import RefusedInput
    from disttrain.failures import interrupted
    from disttrain.vectors import analogy
    from disttrain.vectors.corpus import read_corpus, text_files
    from disttrain.vectors.files import VECTORS, read_vectors
    from disttrain.vectors.schema import load_vectors
    from disttrain.vectors.training import changed, write_summary

    _refuse_ranks()
    config = load_vectors(path, overrides)
    problems, sections = [*changed(config), *text_files(config)[1]], None
    try:
        if config.questions:
            sections = analogy.read_questions(Path(config.questions).expanduser(), config.lowercase)
    except RefusedInput as refused:
        problems += refused.problems
    if problems:
        raise RefusedInput(problems)
    console = _console()
    corpus = read_corpus(config)
    left_out = corpus.read - len(corpus.tokens)
    console.print(f"{config.name}: {config.method}, {len(corpus.tokens):,} words of {len(corpus.words):,} different ones, "
                  f"{left_out:,} left out", highlight=False)  # fmt: skip
    place = _with_progress(config, corpus, interruption, console)
    if place is None:
        return interrupted()
    summary = {"words": len(corpus.tokens), "vocabulary": len(corpus.words), "left_out": left_out, "losses": place.losses,
               "train_seconds": place.seconds}  # fmt: skip
    if sections:
        found = read_vectors(config.folder / VECTORS)
        scores = analogy.answer(found, sections)
        summary |= {"analogies": [_as_json(score) for score in scores], "chance": analogy.chance(found)}
        console.print(_table(scores, analogy.chance(found)))
    write_summary(config.folder, summary)
    console.print(f"vectors: {config.folder / VECTORS}", highlight=False)
    return 0


def _with_progress(
    config: "VectorsConfig", corpus: "Corpus", interruption: "Interruption", console: "Console"
) -> "Place | None":
    """Train behind a progress bar; on something that is no terminal, a line after each epoch."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from disttrain.loggers import readable
    from disttrain.vectors.training import train

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    live = console.is_terminal and not console.is_dumb_terminal
    with Progress(*columns, console=console, transient=True, disable=not live) as bar:
        task = bar.add_task("counting", total=float(config.epochs))

        def show(place: "Place", batches: int) -> None:
            loss = readable.loss(place.loss / max(1, place.count))
            text = f"epoch {place.epoch + 1}/{config.epochs}  loss {loss}"
            bar.update(task, completed=place.epoch + place.batch / batches, description=text)
            if place.batch == batches:
                console.print(f"{text}  {readable.duration(place.seconds)}", highlight=False)

        return train(config, corpus, interruption, show)


def _judge(place: Path, questions: Path | None, nearest: list[str]) -> None:
    """Show analogies and neighbours of vectors in a folder or a file."""
    from disttrain.config.problems import Problem, RefusedInput
    from disttrain.vectors import analogy
    from disttrain.vectors.files import CONFIG, VECTORS, read_vectors
    from disttrain.vectors.schema import load_vectors

    began = place / CONFIG
    lowercase = began.exists() and load_vectors(began, ()).lowercase
    sections = analogy.read_questions(questions, lowercase) if questions else None
    found = read_vectors(place / VECTORS if place.is_dir() else place)
    unknown = [Problem((f"--nearest {word}",), "this word has no vector", "try another spelling or capital letters")
               for word in nearest if word not in found.words]  # fmt: skip
    if unknown:
        raise RefusedInput(unknown)
    console = _console()
    if sections:
        console.print(_table(analogy.answer(found, sections), analogy.chance(found)))
    for word in nearest:
        console.print(_neighbours(found, word))


def _neighbours(found: "Vectors", word: str) -> "Table":
    from rich.table import Table
    from rich.text import Text

    from disttrain.vectors.analogy import neighbours

    table = Table(title=f"nearest to {word}", title_justify="left", title_style="bold")
    table.add_column("word")
    table.add_column("cosine", justify="right")
    for other, cosine in neighbours(found, word, 10):
        table.add_row(Text(other), f"{cosine:.3f}")
    return table


def _table(scores: "list[Score]", chance: float) -> "Table":
    """Scores by section and their totals."""
    from rich.table import Table

    table = Table(title="Analogies, 3CosAdd", title_justify="left", title_style="bold",
                  caption=f"chance: {100 * chance:.4f} %; c alone: the neighbour of the third word",
                  caption_justify="left")  # fmt: skip
    table.add_column("section")
    for heading in ("asked", "left out", "right", "accuracy", "c alone"):
        table.add_column(heading, justify="right")
    for row in _rows(scores):
        total = row[0] in ("semantic", "syntactic", "total")
        table.add_row(*row, style="bold" if total else None)
    return table


def _rows(scores: "list[Score]") -> "Iterator[tuple[str, ...]]":
    from disttrain.loggers import readable

    for score in scores:
        alone = score.right_without_a_and_b / score.asked if score.asked else None
        yield (score.name, f"{score.asked:,}", f"{score.left_out:,}", f"{score.right:,}", readable.percent(score.accuracy),
               readable.percent(alone))  # fmt: skip


def _as_json(score: "Score") -> dict[str, object]:
    return {"section": score.name, "asked": score.asked, "left_out": score.left_out, "right": score.right,
            "accuracy": score.accuracy, "right_without_a_and_b": score.right_without_a_and_b}  # fmt: skip


def _console() -> "Console":
    from disttrain.loggers.console import for_tables

    return for_tables()
