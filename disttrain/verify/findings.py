"""What a failed layout is told: the first difference, the smallest layout that has it, its cause, how to rerun it."""

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from disttrain.config.schema import Config
from disttrain.verify.causes import Facts, axes_of, likely_cause
from disttrain.verify.compare import Difference
from disttrain.verify.layouts import Layout

Failures = Sequence[Difference]
"""Of the first phase that differs, the worst first; empty when nothing does."""

Fails = Callable[[Layout, Config, Difference], Failures]
"""Runs a layout under a config, as far as a difference that was seen before, and says how it differs."""


@dataclass(frozen=True)
class Finding:
    """Why a layout is not equal to one process."""

    first: Difference
    others: int
    """Further quantities that differ in the same phase and step."""
    smallest: Layout
    """The smallest layout that was seen to differ in the same phase."""
    axes: tuple[str, ...]
    """What it cannot do without: axes of the layout, and settings such as dropout."""
    cause: str
    rerun: str
    """The command that does just that layout again."""

    def lines(self) -> list[str]:
        """As a person reads it."""
        d = self.first
        more = f" and {self.others} more" if self.others else ""
        where = "before training" if d.step == 0 else f"step {d.step}"
        notes = ", ".join(filter(None, (d.part.replace("_", " "), d.note)))
        note = f" ({notes})" if notes else ""
        ratio = f", a factor of {d.ratio:.6g}" if d.ratio is not None and abs(d.ratio - 1) > 0.01 else ""
        size = "" if d.error == float("inf") else f" by {d.error:.2g} of its size (at most {d.bound:.1g} passes)"
        return [
            f"first difference: {d.phase.replace('_', ' ')}, {where}: {d.name}{more}{note}{size}",
            f"value {d.ours:.10g}, one process has {d.expected:.10g}{ratio}" if d.expected == d.expected else "",
            f"needs: {', '.join(self.axes) or 'nothing: one process differs from itself'}",
            f"smallest failing layout: {self.smallest}",
            f"likely cause: {self.cause}",
            f"rerun: {self.rerun}",
        ]


def explain(
    config: Config, layout: Layout, failures: Failures, fails: Fails,
    tied: frozenset[str], command: str, bisect: bool = True,
) -> Finding:  # fmt: skip
    """The finding about a layout that differs from one process as `failures` say.

    With `bisect` the layout is taken apart: every axis that can go while the same phase still differs, goes; then
    dropout and label smoothing are tried without.
    """
    settings: set[str] = set()
    smallest, wanted = layout, failures[0]

    def same(found: Failures) -> bool:
        return bool(found) and found[0].phase == wanted.phase

    if bisect:
        smallest, failures = _smallest(
            config, layout, failures, lambda candidate: fails(candidate, config, wanted), same
        )
        for name, changed in _without(config) if wanted.phase != "run" else ():
            if not same(fails(smallest, changed, wanted)):
                settings.add(name)
    axes = needed(config, smallest)
    facts = Facts(failures, smallest, axes, frozenset(settings), tied)
    rerun = f"{command} --layouts {shlex.quote(smallest.name)}"
    axes = (*axes, *sorted(settings))
    return Finding(failures[0], len(failures) - 1, smallest, axes, likely_cause(facts), rerun)


def needed(config: Config, smallest: Layout) -> tuple[str, ...]:
    """What a smallest layout does; without micro-batches where its pipeline cannot do with one alone."""
    whole = replace(smallest, micro_batch=None)
    implied = smallest.micro_batch is not None and smallest.pipeline > 1 and bool(whole.problems(config))
    return tuple(axis for axis in axes_of(smallest) if not (axis == "micro_batch" and implied))


def _smallest(
    config: Config, layout: Layout, failures: Failures, fails: Callable[[Layout], Failures],
    same: Callable[[Failures], bool],
) -> tuple[Layout, Failures]:  # fmt: skip
    tried = {layout}
    shrunk = True
    while shrunk:
        shrunk = False
        for candidate in reductions(layout):
            if candidate in tried or candidate.problems(config):
                continue
            tried.add(candidate)
            found = fails(candidate)
            if same(found):
                layout, failures, shrunk = candidate, found, True
                break
    return layout, failures


def reductions(layout: Layout) -> Iterator[Layout]:
    """The layout without one of its axes each; those that leave whole ranks away come first."""
    yield from _fewer_ranks(layout)
    if layout.zero:
        yield replace(layout, zero=0, offload=False, replicate=1)
    if layout.pipeline > 1 and layout.schedule != "1f1b":
        yield replace(layout, schedule="1f1b", virtual_stages=None)
    plain = {"replicate": 1, "sequence": False, "offload": False, "recompute": "none", "compile": False,
             "micro_batch": None, "engine": "native"}  # fmt: skip
    for name, value in plain.items():
        if getattr(layout, name) != value:
            yield replace(layout, **{name: value})


def _fewer_ranks(layout: Layout) -> Iterator[Layout]:
    unsharded = {"zero": 0, "offload": False, "replicate": 1}
    if layout.data > 1:
        rest = {"replicate": 1} if layout.context > 1 else unsharded
        yield replace(layout, world=layout.world // layout.data, **rest)
    if layout.context > 1:
        rest = {} if layout.data > 1 else unsharded
        yield replace(layout, world=layout.world // layout.context, context=1, context_method="ring", **rest)
    if layout.pipeline > 1:
        world = layout.world // layout.pipeline
        yield replace(layout, world=world, pipeline=1, schedule="1f1b", virtual_stages=None)
    if layout.tensor > 1:
        yield replace(layout, world=layout.world // layout.tensor, tensor=1, sequence=False)


def _without(config: Config) -> Iterator[tuple[str, Config]]:
    if config.model.dropout:
        yield "dropout", config.model_copy(update={"model": config.model.model_copy(update={"dropout": 0.0})})
    if config.train.label_smoothing:
        train = config.train.model_copy(update={"label_smoothing": 0.0})
        yield "label_smoothing", config.model_copy(update={"train": train})
