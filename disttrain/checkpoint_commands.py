"""`disttrain checkpoint`: what is in a checkpoint, whether it is whole, how two differ, and as few files."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from disttrain import checkpoint, checkpoint_contents
from disttrain.checkpoint_contents import Entry
from disttrain.config.problems import Problem, RefusedInput

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

app = typer.Typer(no_args_is_help=True, help="Look at checkpoints, check them, compare them, make one of few files.")
CheckpointPath = Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint, or a run, for its newest one.")]
MOST_LINES = 20
"""Tensors that are named at the most."""


@app.command()
def inspect(
    path: CheckpointPath, tensors: Annotated[bool, typer.Option("--tensors", help="Name every tensor.")] = False
) -> None:
    """Show what a checkpoint holds: step, sections, parameters, bytes."""
    from disttrain.loggers import readable

    folder = _one(path)
    held = _entries(folder)
    table = _table(str(folder), "section", "tensors", "elements", "bytes", "types")
    for section in dict.fromkeys(entry.section for entry in held.values()):
        inside = [entry for entry in held.values() if entry.section == section]
        elements = sum(_elements(entry) for entry in inside)
        types = ", ".join(sorted({entry.dtype for entry in inside}))
        table.add_row(section, str(len(inside)), readable.count(elements), _bytes(inside), types)
    files = list(folder.glob("*.safetensors"))
    table.caption = f"step {checkpoint.step_of(folder)}, {len(files)} files, {_bytes(held.values())} of tensors"
    _print(table)
    if tensors:
        table = _table("", "tensor", "shape", "type", "parts")
        for name, entry in sorted(held.items()):
            table.add_row(name, " x ".join(map(str, entry.shape)) or "scalar", entry.dtype, str(len(entry.parts)))
        _print(table)


@app.command()
def verify(path: CheckpointPath) -> None:
    """Check sizes and checksums, that every tensor is complete, and that all numbers are finite: of every checkpoint of a
    run, or of one. 0 good, 1 not."""
    bad = 0
    for folder in _all(path):
        reasons = list(_faults(folder))
        bad += bool(reasons)
        typer.echo(f"{folder.name}: {'; '.join(reasons) or 'good'}")
    raise typer.Exit(1 if bad else 0)


def _faults(folder: Path) -> Iterator[str]:
    reason = checkpoint.damage(folder)
    if reason is not None:
        yield reason
        return
    try:
        held = checkpoint_contents.entries(folder)
    except (OSError, ValueError) as error:
        yield str(error)
        return
    if holes := [entry.name for entry in held.values() if entry.has_holes]:
        yield f"not complete: {_named(holes)}"
    complete = [entry for entry in held.values() if not entry.has_holes]
    if wild := [entry.name for entry, values in _tensors(complete, folder.name) if not bool(values.isfinite().all())]:
        yield f"NaN or infinity in {_named(wild)}"


@app.command()
def diff(
    before: CheckpointPath,
    after: CheckpointPath,
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Relative to a tensor's largest magnitude; what differs less is equal.")
    ] = 0.0,
) -> None:
    """Compare two checkpoints tensor by tensor, whatever layout wrote them. 0 equal, 1 not."""
    one, other = _one(before), _one(after)
    ours, theirs = _complete(one), _complete(other)
    table = _table(f"{one} and {other}", "tensor", "largest difference", "relative")
    rows: list[tuple[float, str, str, str]] = []
    for name in sorted(ours.keys() ^ theirs.keys()):
        rows.append((float("inf"), name, "-", f"only in {one if name in ours else other}"))
    shared = sorted(ours.keys() & theirs.keys())
    for entry, values in _tensors((ours[name] for name in shared), "comparing"):
        name = entry.name
        if ours[name].shape != theirs[name].shape:
            rows.append((float("inf"), name, "-", f"shapes {ours[name].shape} and {theirs[name].shape}"))
            continue
        largest, relative = _apart(values, checkpoint_contents.tensor(theirs[name]))
        if not relative <= tolerance:  # NaN is no difference that is small enough
            rows.append((relative, name, f"{largest:.3e}", f"{relative:.3e}"))
    for _, *cells in sorted(rows, key=lambda row: -row[0])[:MOST_LINES]:
        table.add_row(*cells)
    if rows:
        table.caption = f"{len(rows)} of {len(ours.keys() | theirs.keys())} tensors differ"
        _print(table)
        raise typer.Exit(1)
    typer.echo(f"equal: {len(shared)} tensors")


def _apart(one: "Tensor", other: "Tensor") -> tuple[float, float]:
    """Largest absolute difference, and relative to the largest magnitude; 0 where both are NaN."""
    if not one.numel():
        return 0.0, 0.0
    one, other = one.double(), other.double()
    same = (one == other) | (one.isnan() & other.isnan())
    largest = float((one - other).abs().masked_fill(same, 0.0).max())
    scale = max(
        float(one.abs().nan_to_num(0.0, posinf=0.0).max()), float(other.abs().nan_to_num(0.0, posinf=0.0).max())
    )
    return largest, largest / scale if scale else 0.0 if largest == 0 else float("inf")


@app.command()
def convert(
    path: CheckpointPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write, which is not there.")],
) -> None:
    """Write a checkpoint of many ranks as whole tensors in files of a GiB: one that goes on under any layout, and that any
    reader of safetensors understands."""
    folder = _one(path)
    if out.exists():
        raise RefusedInput([Problem((f"OUT={out}",), "it is there already", "name a folder that is not there")])
    if (reason := checkpoint.damage(folder)) is not None:
        raise RefusedInput([Problem((f"PATH={folder}",), reason, "take another checkpoint")])
    trainer = json.loads((folder / checkpoint.TRAINER).read_text())
    with checkpoint_contents.appearing(out) as writing:
        named = ((entry.name, values) for entry, values in _tensors(_complete(folder).values(), "writing"))
        for number, tensors in enumerate(checkpoint_contents.in_files(named), start=1):
            checkpoint_contents.write(tensors, writing / f"shard-00001-model-{number:05d}.safetensors")
        checkpoint.describe(writing, trainer, [checkpoint.checksums_of(writing, "shard-")])
    typer.echo(f"written: {out}")


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write, which is not there.")],
) -> None:
    """Write the model of a run as a Hugging Face GPT-2 or BERT, with its tokenizer."""
    from disttrain.tasks.hugging_face import export

    for file in export(run, out):
        typer.echo(f"written: {file}")


def import_model(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder of a Hugging Face model (safetensors).")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write, which is not there.")],
) -> None:
    """Make a run of step 0 of a Hugging Face GPT-2 or BERT: to sample from, to look at, to train on from."""
    from disttrain.tasks.hugging_face import import_model

    for name in import_model(source, out):
        typer.echo(f"not in {source}, drawn at random: {name}")
    typer.echo(f"written: {out}; train on from it: disttrain train {out / 'config.yaml'} run.name=NAME")


def _tensors(held: Iterable[Entry], what: str) -> "Iterator[tuple[Entry, Tensor]]":
    """One after the other, with a progress bar."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    for entry in track(list(held), what, console=console, transient=True, disable=not console.is_terminal):
        yield entry, checkpoint_contents.tensor(entry)


def _all(path: Path) -> list[Path]:
    """The checkpoint, or those of a run. Raises RefusedInput where there is none."""
    if (path / checkpoint.MANIFEST).exists() or checkpoint.NAME.match(path.name):
        found = [path] if path.is_dir() else []
    else:
        found = checkpoint.checkpoints(path / "checkpoints") or checkpoint.checkpoints(path)
    if not found:
        fix = "give a run, for example runs/gpt_tiny, or one of its checkpoints"
        raise RefusedInput([Problem((f"PATH={path}",), "there is no checkpoint", fix)])
    return found


def _one(path: Path) -> Path:
    return _all(path)[-1]


def _entries(folder: Path) -> dict[str, Entry]:
    """Raises RefusedInput for what is not a checkpoint."""
    try:
        checkpoint.step_of(folder)
        return checkpoint_contents.entries(folder)
    except (OSError, ValueError) as error:
        fix = "run `disttrain checkpoint verify` on the run, and take a good one"
        raise RefusedInput([Problem((f"PATH={folder}",), f"it cannot be read: {error}", fix)]) from error


def _complete(folder: Path) -> dict[str, Entry]:
    """Raises RefusedInput also where a tensor has holes."""
    held = _entries(folder)
    if holes := [entry.name for entry in held.values() if entry.has_holes]:
        raise RefusedInput([Problem((f"PATH={folder}",), f"not complete: {_named(holes)}", "take another checkpoint")])
    return held


def _elements(entry: Entry) -> int:
    return entry.nbytes // checkpoint_contents.BYTES.get(entry.dtype, 1)


def _bytes(held: Iterable[Entry]) -> str:
    from disttrain.loggers import readable

    return readable.size(sum(entry.nbytes for entry in held))


def _named(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _table(title: str, *columns: str) -> "Table":
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption_justify="left", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(
            column, justify="right" if number and column not in ("type", "types") else "left", overflow="fold"
        )
    return table


def _print(what: Any) -> None:
    from rich.console import Console

    Console().print(what)
