"""The file that `disttrain compare` reads: strategies, and what they have in common. Imports no torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator

from disttrain.config.load import all_keys, explain, read_tree
from disttrain.config.problems import Problem, RefusedInput
from disttrain.config.section import NonNegative, Positive, Section, Size

REFERENCE = "docs/compare.md"
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,39}$")]
"""A strategy's name: 40 letters, digits and _ . + - at the most, since folders are called so."""
Launcher = str | Annotated[list[str], Field(min_length=1)]
Seconds = Annotated[float, Field(gt=0)]


class Strategy(Section):
    """One way to train the model."""

    about: str | None = None
    """What it is, in a sentence for somebody who does not know it; shown in the report."""
    layout: str | None = None
    """Layout by its short name, for example 'tp2.sp.dp2.zero2 on 4' (docs/verify.md); it says how many ranks there are."""
    nproc: Size | None = None
    """Ranks; the sweep's when not given."""
    settings: dict[str, Any] = {}
    """Settings that replace the config's and the common ones, by dotted names."""
    env: dict[str, str] = {}
    """Environment variables of its processes."""
    launcher: Launcher | None = None
    """What starts its ranks; the sweep's when not given."""
    timeout_s: Seconds | None = None
    """Seconds that one run of it may take; the sweep's when not given."""
    optional: bool | None = None
    """Whether the rest is run where this one is refused, for example without its engine; the sweep's when not given."""


class SlurmArray(Section):
    """What every task of a Slurm array asks for; `disttrain compare SWEEP --array` writes the script."""

    nodes: Positive = 1
    """Nodes."""
    gpus_per_node: NonNegative = 8
    """Ranks of a node, each with a GPU; 0 trains on CPUs."""
    ranks_per_node: Positive | None = None
    """Ranks of a node on CPUs."""
    cpus_per_rank: Positive = 4
    """CPUs of a rank."""
    account: str | None = None
    """Account to charge; the cluster's default when not given."""
    partition: str | None = None
    """Partition; the cluster's default when not given."""
    time: str = "4:00:00"
    """Time limit of a task in sbatch's notation."""
    at_once: Positive = 1
    """Tasks that may run at the same time; those that share a network or a file system disturb each other's speed."""


class Sweep(Section):
    """Strategies to compare on one model and data."""

    config: str
    """Config that all strategies start from."""
    settings: dict[str, Any] = {}
    """Settings of all strategies that replace the config's, by dotted names."""
    nproc: Size = 1
    """Ranks of a strategy that does not say."""
    repeats: Annotated[int, Field(ge=1, le=100)] = 3
    """How often each strategy is run: every strategy once, then every strategy again, and so on."""
    baseline: str | None = None
    """Strategy that the others are compared with; the first one when not given."""
    launcher: Launcher = "local"
    """What starts the ranks: local, torchrun, mpirun, horovodrun, srun, or the words of a command of your own, in which
    {nproc} is the number of ranks and {python} this Python; `train CONFIG ...` is put behind them."""
    timeout_s: Seconds = 3600.0
    """Seconds that one run may take; then it is stopped and counts as failed."""
    optional: bool = False
    """Whether strategies that cannot run here are left out and reported; otherwise they are an error, and nothing starts."""
    price_per_rank_hour: Annotated[float, Field(gt=0)] | None = None
    """What one rank costs for an hour; with it the report says what a million tokens cost."""
    currency: str = "USD"
    """Currency of the price."""
    keep_checkpoints: bool = False
    """Keep the checkpoints of runs that are done; otherwise they are removed, and the records stay."""
    slurm: SlurmArray | None = None
    """For an array job."""
    strategies: Annotated[dict[Name, Strategy], Field(min_length=1)]
    """Strategies by name, in the order in which they are run and shown."""

    @field_validator("strategies", mode="before")
    @classmethod
    def _empty_is_all_defaults(cls, value: Any) -> Any:
        """`ddp:` with nothing behind it is the config as it is."""
        return {name: {} if s is None else s for name, s in value.items()} if isinstance(value, dict) else value


def load_sweep(path: Path) -> Sweep:
    """Read a sweep. Raises RefusedInput with every problem of its text; settings of strategies are `plan`'s."""
    problems: list[Problem] = []
    tree = read_tree(path, problems)
    if problems:
        raise RefusedInput(problems)
    try:
        sweep = Sweep.model_validate(tree)
    except ValidationError as error:
        raise RefusedInput([_explain(e) for e in error.errors()]) from error
    problems = list(_contradictions(sweep))
    if problems:
        raise RefusedInput(problems)
    return sweep


def words_of(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting; sections may be nested or dotted."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from words_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _explain(error: Any) -> Problem:
    place = [str(part) for part in error["loc"]]
    if place[:1] == ["strategies"] and place[-1] == "[key]":
        return Problem((f"strategy '{place[1]}'",), "folders are named after strategies",
                       "use at most 40 letters, digits, and _ . + - inside")  # fmt: skip
    if place[:1] == ["strategies"] and len(place) > 2:
        known = [f"strategies.{place[1]}.{key}" for key in Strategy.model_fields]
    else:
        known = [*Sweep.model_fields, *(f"slurm.{key}" for key in SlurmArray.model_fields)]
    found = explain({**error, "loc": place}, known, REFERENCE)
    if error["type"] == "extra_forbidden" and place[-1].split(".")[0] in {key.split(".")[0] for key in all_keys()}:
        return Problem(found.settings, found.message, "settings of the config stand below 'settings:'")
    return found


def _contradictions(sweep: Sweep) -> Iterator[Problem]:
    if sweep.baseline is not None and sweep.baseline not in sweep.strategies:
        yield Problem((f"baseline={sweep.baseline}",), "there is no strategy of this name",
                      f"give one of: {', '.join(sweep.strategies)}")  # fmt: skip
    if "currency" in sweep.model_fields_set and sweep.price_per_rank_hour is None:
        yield Problem((f"currency={sweep.currency}",), "nothing is priced", "give price_per_rank_hour as well")
