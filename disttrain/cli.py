"""The command line. Heavy imports happen inside the commands, so that --help answers at once."""

import os
import sys
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from disttrain import calibrating, checking, checkpoint_commands, finetuning, planning, proving, smaller
from disttrain.compare import command as comparing
from disttrain.failures import exit_code, interrupted, lost_a_peer
from disttrain.hang import reading
from disttrain.importing import at_once
from disttrain.ngrams import command as ngrams
from disttrain.vectors import command as word_vectors

if TYPE_CHECKING:
    from rich.console import Console

    from disttrain.config.problems import Problem
    from disttrain.config.schema import Config
    from disttrain.data.preparation import Prepared
    from disttrain.interruption import Interruption


class Commands(TyperGroup):
    """Ctrl-C gets a line, which typer does not give it."""

    def invoke(self, ctx: typer.Context) -> object:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            sys.exit(interrupted())


app = typer.Typer(
    cls=Commands, name="disttrain", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Train GPT- and BERT-style models on one process or many, and measure it honestly.",
)  # fmt: skip
data_app = typer.Typer(no_args_is_help=True, help="Prepare training data.")
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_commands.app, name="checkpoint")
app.command("export")(checkpoint_commands.export)
app.command("import")(checkpoint_commands.import_model)
app.command("check")(checking.check)
app.command("verify")(proving.verify)
app.command("calibrate")(calibrating.calibrate)
app.command("compare")(comparing.compare)
app.command("report")(comparing.report)
app.command("plan")(planning.plan)
app.command("finetune")(finetuning.finetune)
app.command("evaluate")(finetuning.evaluate)
app.command("explain")(reading.show)
app.command("vectors")(word_vectors.vectors)
app.command("ngram")(ngrams.ngram)
app.command("prune")(smaller.prune)
app.command("quantize")(smaller.quantize)
app.command("measure")(smaller.measure)
ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file with the settings.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the file's.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, for example runs/gpt_tiny.")]


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Local ranks to start; not inside a launcher.")] = None,
    resume: Annotated[str | None, typer.Option(help="auto, never or a checkpoint: checkpoint.resume.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Look at some steps: profile.enabled=true.")] = False,
    profile_steps: Annotated[
        str | None, typer.Option(metavar="A:B", help="From which step to which; with --profile or without.")
    ] = None,
) -> None:
    """Train a model. Inside torchrun, deepspeed, horovodrun, mpirun or srun it joins that launcher's world."""
    words = [*(overrides or []), *([f"checkpoint.resume={resume}"] if resume else [])]
    if profile or profile_steps:
        words.append("profile.enabled=true")
    if profile_steps:
        first, colon, last = profile_steps.partition(":")
        if not (colon and first.isdecimal() and last.isdecimal()):
            raise typer.BadParameter(
                "give the first and the last step, 10:12 for example", param_hint="--profile-steps"
            )
        words.append(f"profile.steps=[{first}, {last}]")
    raise typer.Exit(_train(config, words, nproc))


@app.command()
def doctor(
    nproc: Annotated[int, typer.Option(min=1, help="Local ranks to measure with; not inside a launcher.")] = 1,
) -> None:
    """Show launcher, ranks, devices, versions and link speed, and explain contradictions."""
    from disttrain import launch
    from disttrain.config.problems import RefusedInput

    if nproc > 1:
        if (rank := launch.detect(os.environ)).launcher != "none":
            raise RefusedInput([_already_launched(nproc, rank.launcher)])
        from disttrain import local_ranks

        raise typer.Exit(local_ranks.start(nproc, _diagnose, None, local_ranks.method()))
    raise typer.Exit(_diagnose())


class Launchers(StrEnum):
    """How a Slurm script starts the ranks."""

    srun = "srun"
    torchrun = "torchrun"
    mpirun = "mpirun"


@app.command()
def slurm(
    config: ConfigPath,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the job.")] = 2,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="Ranks, each with a GPU; 0 trains on CPUs.")] = 8,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="Ranks on CPUs.")] = None,
    cpus_per_rank: Annotated[int, typer.Option(min=1, help="CPUs of a rank.")] = 4,
    account: Annotated[str | None, typer.Option(help="Account to charge; the cluster's default if not given.")] = None,
    partition: Annotated[str | None, typer.Option(help="Partition; the cluster's default if not given.")] = None,
    time: Annotated[str, typer.Option(help="Time limit: minutes, H:MM:SS or D-HH:MM:SS.")] = "1-00:00:00",
    launcher: Annotated[
        Launchers | None, typer.Option(help="srun, or mpirun for engine=horovod, if not given.")
    ] = None,
    requeue: Annotated[bool, typer.Option(help="Go on after preemption, the time limit or a lost node.")] = True,
    sweep: Annotated[Path | None, typer.Option(help="An array job: one run for each line of overrides.")] = None,
    python: Annotated[str, typer.Option(help="Python on the nodes.")] = sys.executable,
    out: Annotated[Path | None, typer.Option(help="File to write; standard output if not given.")] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Hand it to sbatch and print the job's id.")] = False,
) -> None:
    """Write a batch script for Slurm after every check the run itself would make, and submit it."""
    from disttrain import slurm_script
    from disttrain.config.problems import RefusedInput

    settings, words = _load(config, overrides), overrides or []
    chosen = launcher.value if launcher else slurm_script.launcher_for(settings)
    lines = (str(sweep), len(slurm_script.lines_of(sweep))) if sweep else None
    job = slurm_script.Job(nodes, gpus_per_node, ranks_per_node, cpus_per_rank, account, partition, time, chosen, requeue,
                           lines)  # fmt: skip
    problems = slurm_script.sweep_problems(sweep, config, words, job) if sweep else slurm_script.problems(settings, job)
    if problems:
        raise RefusedInput(problems)
    script = slurm_script.render(job, settings.run.name, [str(config), *words], python)
    if out:
        slurm_script.write(out, script)
    typer.echo(slurm_script.submit(script) if submit else "" if out else script, nl=submit)


@app.command()
def schema(
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON schema, for editors.")] = False,
) -> None:
    """Show every setting with its type, default and meaning."""
    from disttrain.config.describe import json_schema, table

    if as_json:
        typer.echo(json_schema())
    else:
        _console().print(table())


@data_app.command()
def prepare(
    config: ConfigPath,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; usable as data.path of corpus tokens.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every shard against its checksum afterwards.")] = False,
) -> None:
    """Turn the corpus of a config into memory-mapped token shards; can be interrupted and repeated."""
    from disttrain import data, preparing
    from disttrain.config.problems import RefusedInput

    settings = _load(config, overrides)
    problems = data.preflight(settings)
    if problems:
        raise RefusedInput(problems)
    with preparing.progress(quiet=False) as report:
        folders = [data.prepare_folder(settings, out, report)] if out else []
        folders = folders or [folder for folder, _ in data.prepare(settings, report).train]
    if verify and (damaged := [problem for folder in folders for problem in data.verify(folder)]):
        raise RefusedInput(damaged)
    for folder in folders:
        _console().print(f"prepared: {folder}", highlight=False)


@app.command()
def demo(
    config: ConfigPath,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=1, help="Local ranks to start.")] = 2,
) -> None:
    """Train a small GPT, compare its held-out loss with a trigram's and let it write."""
    from disttrain.preflight import run_folder

    if code := _train(config, overrides, nproc):
        raise typer.Exit(code)
    from disttrain.demo import show_what_was_learned

    raise typer.Exit(0 if show_what_was_learned(run_folder(_load(config, overrides)), _console()) else 1)


@app.command()
def sample(
    run: RunFolder,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "The ",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw among this many likeliest tokens.")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw.")] = 0,
) -> None:
    """Let a trained GPT continue a text."""
    with at_once():
        from disttrain.tasks.sample import continue_text

    typer.echo(continue_text(run, prompt, tokens, temperature, top_k, seed))


def main() -> None:
    """Entry point; every outcome has an exit code."""
    sys.exit(exit_code(lambda: app(standalone_mode=False)))


def _load(path: Path, overrides: list[str] | None) -> "Config":
    from disttrain.config.load import load

    return load(path, overrides or [])


def _train(config: Path, overrides: list[str] | None, nproc: int | None) -> int:
    """Check everything, prepare the data, then train here, as a launcher's rank, or on local ranks; the exit code."""
    from disttrain.interruption import Interruption

    interruption = Interruption().listen()
    from disttrain import inputs, preflight, preparing
    from disttrain.config.problems import RefusedInput
    from disttrain.elastic import goes_on, is_elastic, join, start_again
    from disttrain.launch.mpi import locate

    settings = _load(config, overrides)
    if is_elastic(os.environ):
        join(settings, interruption)
    rank = locate(os.environ, keep=settings.engine == "horovod")  # Horovod goes on with the MPI that is started
    inside = rank.launcher != "none"
    if inside and nproc is not None:
        raise RefusedInput([_already_launched(nproc, rank.launcher)])
    world_size = rank.world_size if inside else nproc or 1
    problems = preflight.problems(settings, world_size)
    if problems:
        raise RefusedInput(problems)
    prepared = preparing.prepare(settings, interruption, quiet=rank.rank != 0)
    settings = inputs.with_steps(settings, prepared)
    if settings.distill.teachers:
        from disttrain import teaching

        prepared = teaching.with_soft_labels(settings, prepared)
    with at_once():
        from disttrain import local_ranks
        from disttrain.engines import native  # noqa: F401  like `run`, before the ranks fork and not by each of them
        from disttrain.run import run

    if not inside and world_size > 1:
        as_a_rank = partial(_train_locally, settings, prepared)
        return local_ranks.start(world_size, as_a_rank, interruption, local_ranks.method())
    try:
        code = run(settings, rank, interruption, prepared)
    except Exception as error:
        if not (is_elastic(os.environ) and lost_a_peer(error)):
            raise
        start_again()
    if is_elastic(os.environ) and goes_on(code, interruption):
        start_again()
    return code


def _train_locally(settings: "Config", prepared: "Prepared", interruption: "Interruption") -> int:
    """One of the ranks that `--nproc` starts."""
    with at_once():
        from disttrain.launch import detect
        from disttrain.run import run

    return run(settings, detect(os.environ), interruption, prepared)


def _diagnose(interruption: "Interruption | None" = None) -> int:
    """Look at this rank's world; the first rank shows it. 1 where something contradicts itself."""
    with at_once():
        import torch  # noqa: F401  the slow part

        from disttrain.doctor import diagnose, render

    diagnosis = diagnose()
    if diagnosis.is_for_this_rank:
        render(diagnosis, _console())
    return 1 if diagnosis.problems else 0


def _already_launched(nproc: int, launcher: str) -> "Problem":
    from disttrain.config.problems import Problem

    return Problem((f"--nproc {nproc}", f"launcher {launcher}"), "the launcher already started the ranks",
                   "leave --nproc away, or run disttrain outside the launcher")  # fmt: skip


def _console() -> "Console":
    from rich.console import Console

    return Console()
