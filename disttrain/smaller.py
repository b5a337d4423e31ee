"""`disttrain prune`, `quantize` and `measure`: smaller models from trained ones (docs/smaller.md)."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, for example runs/gpt_tiny.")]
Out = Annotated[Path, typer.Option("--out", help="Folder to write, which is not there.")]


class Importance(StrEnum):
    """What heads, neurons and layers are chosen by."""

    magnitude = "magnitude"
    taylor = "taylor"


class Scope(StrEnum):
    """Among which weights the smallest are looked for."""

    all_ = "global"
    matrix = "matrix"


class Method(StrEnum):
    """How weights are made smaller."""

    fp16 = "fp16"
    bf16 = "bf16"
    int8_dynamic = "int8-dynamic"
    int8_static = "int8-static"
    kmeans = "kmeans"


def prune(
    run: Run,
    out: Out,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers that stay.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Heads of each layer that stay.")] = None,
    ffn_hidden_size: Annotated[int | None, typer.Option(min=1, help="Neurons of each layer that stay.")] = None,
    importance: Annotated[
        Importance, typer.Option(help="By the size of weights, or by gradients.")
    ] = Importance.magnitude,
    batches: Annotated[
        int | None, typer.Option(min=1, help="Batches of 16 sequences for taylor; 8 if not given.")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="Share of single weights that become zero.")] = None,
    scope: Annotated[Scope, typer.Option(help="The smallest of all matrices together, or of each.")] = Scope.all_,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Zero those of embeddings too.")] = False,
) -> None:
    """Make a smaller run of a trained one: fewer layers, heads and neurons, or the smallest weights zero."""
    from disttrain.config.problems import Problem, RefusedInput
    from disttrain.loggers import readable
    from disttrain.model_compression import pruning

    if sparsity is not None and not 0 < sparsity < 1:
        raise RefusedInput(
            [Problem((f"--sparsity {sparsity:g}",), "it is no share between 0 and 1", "give 0.5 for example")]
        )
    asked = pruning.Pruning(
        layers, heads, ffn_hidden_size, importance.value, batches, sparsity, scope.value, embeddings
    )
    found = pruning.prune(run, out, asked)
    before, after = readable.count(found.parameters_before), readable.count(found.parameters)
    typer.echo(f"written: {out}; {before} -> {after} parameters, {readable.percent(found.zeros)} of the matrices zero")
    typer.echo(f"train on from it: disttrain train {out / 'config.yaml'} run.name=NAME")


def quantize(
    run: Run,
    out: Out,
    method: Annotated[Method, typer.Option(help="How.")],
    batches: Annotated[
        int | None, typer.Option(min=1, help="Batches of 16 sequences to calibrate int8-static; 16 if not given.")
    ] = None,
    bits: Annotated[
        int | None, typer.Option(min=1, max=12, help="2^bits values a matrix (kmeans); 5 if not given.")
    ] = None,
    finetune_batches: Annotated[
        int | None, typer.Option(min=1, help="Batches of 16 sequences to train the values of kmeans on.")
    ] = None,
    finetune_lr: Annotated[float | None, typer.Option(help="Learning rate of that; 1e-4 if not given.")] = None,
) -> None:
    """Write a trained run's model with weights of fewer bits."""
    from disttrain.config.problems import Problem, RefusedInput
    from disttrain.model_compression import quantization
    from disttrain.model_compression.folder import DESCRIPTION, WEIGHTS

    if finetune_lr is not None and not 0 < finetune_lr < float("inf"):
        raise RefusedInput([Problem((f"--finetune-lr {finetune_lr:g}",), "it is not above 0", "give 1e-4 for example")])
    asked = quantization.Quantization(method.value, batches, bits, finetune_batches, finetune_lr)
    quantization.quantize(run, out, asked)
    size = sum((out / name).stat().st_size for name in (WEIGHTS, DESCRIPTION))
    typer.echo(f"written: {out}, {size / 2**20:.2f} MiB; compare it: disttrain measure {run} {out}")


def measure(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Runs and quantised folders; the first is the measure.")
    ],
    out: Annotated[Path | None, typer.Option(help="Write OUT.json and OUT.md as well.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Sequences of a pass; 1 and 32 if not given.")] = None,
    sequence_length: Annotated[int | None, typer.Option(min=1, help="Tokens; the runs' own if not given.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds.")] = 20,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch; its own choice if not given.")] = None,
    sequences: Annotated[
        int | None, typer.Option(min=1, help="Held-out sequences of the score; the runs' own.")
    ] = None,
) -> None:
    """Show bytes, parameters, milliseconds and held-out loss of models side by side."""
    import json
    from functools import partial

    from rich.console import Console

    from disttrain.folders import write_atomically
    from disttrain.model_compression import measuring, tables
    from disttrain.model_compression.evaluation import held_out_scores

    score = partial(held_out_scores, sequences=sequences)
    found = measuring.measure(runs, score, batch or (1, 32), sequence_length, repeats, threads)
    Console().print(tables.shown(found))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out.with_suffix(".json"), json.dumps(measuring.as_json(found), indent=1) + "\n")
        write_atomically(out.with_suffix(".md"), tables.markdown(found))
        typer.echo(f"written: {out.with_suffix('.json')}, {out.with_suffix('.md')}")
