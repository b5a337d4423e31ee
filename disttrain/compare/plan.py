"""What a comparison runs: every strategy with its settings, checked before anything starts; the plan of its folder.

The plan is kept in the folder as compare.json, so that the same command goes on, a changed sweep is not mixed with runs
that are there, and the report needs nothing but the folder. Imports no torch.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from disttrain import preflight
from disttrain.compare.launching import STARTERS, starter
from disttrain.compare.schema import Strategy, Sweep, words_of
from disttrain.config.load import load, nearest, parsed
from disttrain.config.problems import Problem, RefusedInput
from disttrain.config.schema import Config, ParallelConfig
from disttrain.config.settings import setting
from disttrain.verify.layouts import Layout, parse

FILE = "compare.json"
NOT_COMPARED = ("run.name", "run.dir", "log")
"""Settings that make no difference to what is measured."""


@dataclass(frozen=True)
class Planned:
    """One strategy, ready to run."""

    name: str
    about: str | None
    nproc: int
    launcher: str | list[str]
    env: dict[str, str]
    own: list[str]
    """Its own settings, as words of the command."""
    words: list[str]
    """All settings that replace the config's: the common ones, then its own."""
    timeout_s: float
    config: dict[str, Any]
    """Every setting it trains with, those of NOT_COMPARED left out."""
    refused: list[Problem]
    """Why it cannot run here; only of strategies that are optional."""


@dataclass(frozen=True)
class Task:
    """One run of one strategy."""

    strategy: str
    repeat: int
    """From 1."""

    @property
    def name(self) -> str:
        """Name of its run."""
        return f"{self.strategy}-{self.repeat}"


@dataclass(frozen=True)
class Plan:
    """A comparison."""

    sweep: str
    """The sweep's file, as it was given."""
    config: str
    """The config's file."""
    folder: Path
    repeats: int
    baseline: str
    price_per_rank_hour: float | None
    currency: str
    keep_checkpoints: bool
    common: list[str]
    """Settings of all strategies, as words of the command."""
    ranks_per_node: int | None
    """Ranks that a node of an array job has."""
    strategies: list[Planned]

    @property
    def tasks(self) -> list[Task]:
        """Every run in its order: each strategy once, then each again."""
        return [Task(s.name, repeat) for repeat in range(1, self.repeats + 1) for s in self.strategies]

    def strategy(self, name: str) -> Planned:
        """The strategy of this name."""
        return next(s for s in self.strategies if s.name == name)

    def run_folder(self, task: Task) -> Path:
        """Where a run has its records."""
        return self.folder / "runs" / task.name


def make(sweep: Sweep, path: Path, folder: Path, overrides: Sequence[str] = ()) -> Plan:
    """Check every strategy as `disttrain check` does; `overrides` replace the common settings.

    Raises RefusedInput with the problems of all strategies that cannot run, less those of optional ones.
    """
    common = [*_words(sweep.settings), *overrides]
    base = load(sweep.config, common)  # raises for the config and the common settings, once for all
    if base.checkpoint.resume != "auto":
        raise RefusedInput([Problem((setting(base, "checkpoint.resume"),), "a comparison goes on with its runs",
                                    "use checkpoint.resume=auto; checkpoint.weights gives first weights")])  # fmt: skip
    if base.log.wandb and base.log.wandb_group is None:
        common.append(f"log.wandb_group={folder.name}")
    planned, problems = [], []
    for name, strategy in sweep.strategies.items():
        try:
            one = _planned(name, strategy, sweep, base, common, folder)
        except RefusedInput as refused:
            problems += _of(name, refused.problems)
            continue
        planned.append(one)
        if not (sweep.optional if strategy.optional is None else strategy.optional):
            problems += _of(name, one.refused)
    if problems:
        raise RefusedInput(problems)
    baseline = sweep.baseline or planned[0].name
    per_node = (sweep.slurm.gpus_per_node or sweep.slurm.ranks_per_node) if sweep.slurm else None
    return Plan(str(path), sweep.config, folder, sweep.repeats, baseline, sweep.price_per_rank_hour, sweep.currency,
                sweep.keep_checkpoints, common, per_node, planned)  # fmt: skip


def _planned(name: str, strategy: Strategy, sweep: Sweep, base: Config, common: list[str], folder: Path) -> Planned:
    launcher = sweep.launcher if strategy.launcher is None else strategy.launcher
    problems = list(_launcher_problems(launcher))
    if problems:
        raise RefusedInput(problems)
    nproc, own = strategy.nproc or sweep.nproc, []
    if strategy.layout is not None:
        layout = parse(strategy.layout)
        if strategy.nproc not in (None, layout.world):
            raise RefusedInput([Problem((f"layout={strategy.layout}", f"nproc={strategy.nproc}"),
                                        f"the layout has {layout.world} ranks", "leave nproc away")])  # fmt: skip
        nproc, own = layout.world, _words(_settings(layout, base))
    own += _words(strategy.settings)
    words = [*common, *own]
    config = load(sweep.config, [*words, f"run.dir={folder / 'runs'}", f"run.name={name}-1"])
    refused = [*_not_there(launcher), *preflight.problems(config, nproc)]
    timeout_s = strategy.timeout_s or sweep.timeout_s
    return Planned(name, strategy.about, nproc, launcher, dict(strategy.env), own, words, timeout_s, _compared(config),
                   refused)  # fmt: skip


def _settings(layout: Layout, base: Config) -> dict[str, Any]:
    """Settings under which a config has this layout, as far as it has not got them."""
    wanted = {f"parallel.{name}": getattr(layout, name) for name in ParallelConfig.model_fields}
    wanted |= {"run.compile": layout.compile, "engine": layout.engine}
    if layout.micro_batch is not None:
        wanted["train.micro_batch_size"] = layout.micro_batch
    return {key: value for key, value in wanted.items() if value != _at(base, key)}


def _at(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _words(settings: dict[str, Any]) -> list[str]:
    """Settings as words of the command: key=value, the value in YAML that fits a line."""
    return [f"{key}={value if _plain(value) else json.dumps(value)}" for key, value in words_of(settings)]


def _plain(value: Any) -> bool:
    """Whether text reads back as the same text without quotes."""
    return isinstance(value, str) and value != "" and parsed(value) == value


def _compared(config: Config) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    for key in NOT_COMPARED:
        section, _, name = key.partition(".")
        tree.pop(section) if not name else tree[section].pop(name)
    return tree


def _launcher_problems(launcher: str | list[str]) -> Iterator[Problem]:
    if isinstance(launcher, str) and launcher not in STARTERS:
        near = nearest(launcher, list(STARTERS))
        known = f"did you mean '{near}'? There are" if near else "there are"
        yield Problem((f"launcher={launcher}",), "this launcher is not known",
                      f"{known} {', '.join(STARTERS)}, or a list of words with {{nproc}}")  # fmt: skip
    elif isinstance(launcher, list) and not any("{nproc}" in word for word in launcher):
        yield Problem((f"launcher={launcher}",), "nothing tells this command how many ranks to start",
                      "write {nproc} where the number belongs")  # fmt: skip


def _not_there(launcher: str | list[str]) -> Iterator[Problem]:
    first = starter(launcher).words[0]
    if first != "{python}" and shutil.which(first) is None:
        yield Problem((f"launcher={launcher}", "PATH"), f"there is no {first} on this machine",
                      "install it, or use launcher: local")  # fmt: skip


def _of(name: str, problems: list[Problem]) -> list[Problem]:
    return [Problem((f"strategy {name}", *p.settings), p.message, p.fix) for p in problems]


def save(plan: Plan) -> str:
    """The text of compare.json."""
    return json.dumps({**asdict(plan), "folder": None}, indent=1) + "\n"


def read(folder: Path) -> Plan:
    """The plan of a comparison's folder. Raises RefusedInput where there is none or it is broken."""
    path = folder / FILE
    try:
        tree = json.loads(path.read_text())
        strategies = [Planned(**{**s, "refused": [_problem(p) for p in s["refused"]]}) for s in tree["strategies"]]
        return replace(Plan(**{**tree, "strategies": strategies}), folder=folder)
    except OSError as error:
        raise RefusedInput([Problem((str(path),), f"it cannot be read: {error.strerror}",
                                    "give the folder of a comparison")]) from error  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise RefusedInput([Problem((str(path),), f"this is no plan of a comparison: {error}",
                                    "compare again with another --out")]) from error  # fmt: skip


def _problem(tree: dict[str, Any]) -> Problem:
    return Problem(tuple(tree["settings"]), tree["message"], tree["fix"])


def changes(before: Plan, now: Plan) -> list[Problem]:
    """Why runs that are there cannot be compared with those that `now` would add."""
    found, fix = [], "put it back, or use another --out"
    ours = {s.name: s for s in now.strategies}
    for was in before.strategies:
        if not any((before.folder / "runs").glob(f"{was.name}-*/metrics.jsonl")):
            continue
        name, is_ = f"strategy {was.name}", ours.get(was.name)
        if is_ is None:
            found.append(Problem((name,), f"{before.folder} has runs of it, and it is not in the sweep any more", fix))
            continue
        pairs = {key: (getattr(was, key), getattr(is_, key)) for key in ("nproc", "launcher", "env")}
        pairs |= _differences(was.config, is_.config)
        for key, (old, new) in pairs.items():
            if old != new:
                found.append(Problem((f"{name}, {key}={_short(new)}", f"{before.folder} has {key}={_short(old)}"),
                                     "it has been run with another value, and the two cannot be mixed", fix))  # fmt: skip
    return found


def _differences(before: Any, after: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    if isinstance(before, dict) and isinstance(after, dict):
        parts = [_differences(before.get(k), after.get(k), f"{prefix}{k}.") for k in {**before, **after}]
        return {key: pair for part in parts for key, pair in part.items()}
    return {} if before == after else {prefix[:-1]: (before, after)}


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
