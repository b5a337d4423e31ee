"""A layout: how a training step is spread over ranks, as one value with a short name that reads back. No torch.

``tp2.sp.pp2-1f1b.dp2.zero2.full.mb1 on 8`` is 8 ranks: tensor 2 with sequence parallelism, 2 pipeline stages under
1F1B, 2 data ranks with ZeRO-2, full recomputation, micro-batches of one sequence.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from disttrain import layout as rules
from disttrain.config.load import nearest
from disttrain.config.problems import Problem, RefusedInput
from disttrain.config.schema import Config, HorovodConfig, ParallelConfig


@dataclass(frozen=True, order=True)
class Layout:
    """Settings under `parallel` with their keys' names, the micro-batch and the number of ranks."""

    world: int = 1
    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    schedule: str = "1f1b"
    virtual_stages: int | None = None
    context: int = 1
    context_method: str = "ring"
    zero: int = 0
    replicate: int = 1
    offload: bool = False
    recompute: str = "none"
    micro_batch: int | None = None
    """Sequences of one forward pass; None takes a data rank's whole share at once."""
    compile: bool = False
    engine: str = "native"

    @property
    def data(self) -> int:
        """Ranks that read different sequences."""
        return self.world // (self.tensor * self.pipeline * self.context)

    @property
    def name(self) -> str:
        """The short name; `parse` reads it back."""
        stages = f"-v{self.virtual_stages}" if self.virtual_stages else ""
        words = {
            f"tp{self.tensor}": self.tensor > 1,
            "sp": self.sequence,
            f"pp{self.pipeline}-{self.schedule}{stages}": self.pipeline > 1,
            f"cp{self.context}-{self.context_method}": self.context > 1,
            f"dp{self.data}": self.data > 1,
            f"zero{self.zero}": self.zero > 0,
            f"rep{self.replicate}": self.replicate > 1,
            "offload": self.offload,
            self.recompute: self.recompute != "none",
            f"mb{self.micro_batch}": self.micro_batch is not None,
            "compile": self.compile,
            self.engine: self.engine != "native",
        }
        return f"{'.'.join(word for word, there in words.items() if there) or 'single'} on {self.world}"

    def __str__(self) -> str:
        """The name."""
        return self.name

    def applied(self, config: Config) -> Config:
        """The config under this layout."""
        names = set(ParallelConfig.model_fields)
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name in names}
        train = config.train.model_copy(update={"micro_batch_size": self.micro_batch})
        run = config.run.model_copy(update={"compile": self.compile})
        parallel = ParallelConfig.model_validate(values)
        theirs = {
            name: value for name, value in (("deepspeed", {}), ("horovod", HorovodConfig())) if name != self.engine
        }
        return config.model_copy(
            update={"parallel": parallel, "train": train, "run": run, "engine": self.engine, **theirs}
        )

    def problems(self, config: Config) -> list[Problem]:
        """Why this config cannot be trained under this layout; nothing when it can."""
        try:
            applied = self.applied(config)
        except ValueError as error:  # pydantic's: a schedule that is not known
            reason = str(error).splitlines()[-2].strip() if len(str(error).splitlines()) > 2 else str(error)
            return [Problem((self.name,), reason, "see `disttrain schema`")]
        return rules.problems(applied, self.world)


_WORDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"tp(\d+)", ("tensor",)),
    (r"sp", ("sequence",)),
    (r"pp(\d+)(?:-([a-z0-9_]+?))?(?:-v(\d+))?", ("pipeline", "schedule", "virtual_stages")),
    (r"cp(\d+)(?:-([a-z]+))?", ("context", "context_method")),
    (r"dp(\d+)", ("data",)),
    (r"zero([0-3])", ("zero",)),
    (r"rep(\d+)", ("replicate",)),
    (r"offload", ("offload",)),
    (r"(full|selective)", ("recompute",)),
    (r"mb(\d+)", ("micro_batch",)),
    (r"compile", ("compile",)),
    (r"(deepspeed|horovod)", ("engine",)),
    (r"single", ()),
)
_EXAMPLES = ("tp2", "sp", "pp2-1f1b", "cp2-ring", "dp2", "zero2", "rep2", "offload", "full", "selective", "mb1",
             "compile", "deepspeed", "horovod", "single")  # fmt: skip


def parse(text: str) -> Layout:
    """The layout of a name; without ``on N`` the sizes say how many ranks there are. Raises RefusedInput."""
    body, on, ranks = text.strip().partition(" on ")
    if on and not ranks.strip().isdigit():
        raise _refused(text, f"'{ranks}' is not a number of ranks", "end the name with, for example, ' on 8'")
    values: dict[str, Any] = {}
    for word in body.split("."):
        values |= _parse_word(text, word)
    data = values.pop("data", None)
    model_ranks = values.get("tensor", 1) * values.get("pipeline", 1) * values.get("context", 1)
    fewest = model_ranks * (data or values.get("replicate", 1))
    layout = Layout(world=int(ranks) if on else fewest, **values)
    if layout.world == 0 or layout.world % model_ranks or (data and layout.world != fewest):
        message = f"the sizes make {fewest} ranks, which {layout.world} is not"
        raise _refused(text, message, f"end it with ' on {fewest}', or leave ' on {layout.world}' away")
    return layout


def parse_list(text: str) -> list[Layout]:
    """Layouts separated by commas. Raises RefusedInput with every name that is none."""
    layouts, problems = [], []
    for name in text.split(","):
        try:
            layouts.append(parse(name))
        except RefusedInput as refused:
            problems += refused.problems
    if problems:
        raise RefusedInput(problems)
    return layouts


def _parse_word(text: str, word: str) -> dict[str, Any]:
    for pattern, names in _WORDS:
        match = re.fullmatch(pattern, word)
        if match is None:
            continue
        if not match.groups():
            return dict.fromkeys(names, True)
        found = zip(names, match.groups(), strict=True)
        return {name: int(value) if value.isdigit() else value for name, value in found if value is not None}
    near = nearest(word, _EXAMPLES)
    known = f"did you mean '{near}'? There are" if near else "there are"
    raise _refused(text, f"'{word}' is no part of a layout's name", f"{known} {', '.join(_EXAMPLES)}")


def _refused(text: str, message: str, fix: str) -> RefusedInput:
    return RefusedInput([Problem((f"layout {text.strip()!r}",), message, fix)])


def refuse_illegal(config: Config, layouts: Sequence[Layout]) -> None:
    """Raises RefusedInput with the reasons of every layout that this config cannot be trained under."""
    problems = [
        Problem((f"layout {layout}", *problem.settings), problem.message, problem.fix)
        for layout in layouts
        for problem in layout.problems(config)
    ]
    if problems:
        raise RefusedInput(problems)
