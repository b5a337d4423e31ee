"""Checks of `pruning` and `quantization`: settings that nothing reads, and layouts that would train wrongly. No torch."""

from collections.abc import Iterator

from disttrain.config.problems import Problem
from disttrain.config.schema import Config
from disttrain.config.settings import given, no_effect, setting
from disttrain.config.smaller import PruningConfig

KEEP = ("method", "embeddings")
"""Settings of `pruning` that method=keep reads."""


def smaller_problems(config: Config, steps: int | None) -> Iterator[Problem]:
    """Every contradiction of `pruning` and `quantization`, in a run of so many steps."""
    method = config.pruning.method
    for name in PruningConfig.model_fields:
        read = method == "magnitude" or name == "method" or (method == "keep" and name in KEEP)
        if not read and given(config, f"pruning.{name}"):
            yield no_effect(config, f"pruning.{name}", "pruning.method", "pruning.method=magnitude")
    if method == "magnitude":
        yield from _schedule(config, steps)
    if method != "none" and config.outer.method != "none":
        yield Problem((setting(config, "pruning.method"), setting(config, "outer.method")),
                      "workers that take steps of their own would not have the same zeros",
                      "use outer.method=none")  # fmt: skip
    if config.quantization.aware:
        yield from _rounding(config)


def _schedule(config: Config, steps: int | None) -> Iterator[Problem]:
    pruning = config.pruning
    for name, example in (("sparsity", 0.8), ("end_step", max(1, (steps or 1000) * 3 // 4))):
        if getattr(pruning, name) is None:
            yield Problem(("pruning.method=magnitude", setting(config, f"pruning.{name}")),
                          "nothing says how much is pruned, or until when",
                          f"give pruning.{name}, {example} for example")  # fmt: skip
    if pruning.sparsity is not None and pruning.initial_sparsity >= pruning.sparsity:
        yield Problem((setting(config, "pruning.initial_sparsity"), setting(config, "pruning.sparsity")),
                      "the share of zeros would not grow", "use a smaller pruning.initial_sparsity")  # fmt: skip
    end = pruning.end_step
    if end is None:
        return
    if pruning.begin_step >= end:
        yield Problem((setting(config, "pruning.begin_step"), setting(config, "pruning.end_step")),
                      "pruning would end before it begins", f"use pruning.begin_step={end - 1} or less")  # fmt: skip
    if steps is not None and end > steps:
        yield Problem((setting(config, "pruning.end_step"), f"{steps} training steps"),
                      "the run would stop before the share of zeros is reached",
                      f"use at most pruning.end_step={steps}")  # fmt: skip


def _rounding(config: Config) -> Iterator[Problem]:
    if config.parallel.tensor > 1:
        yield Problem(("quantization.aware=true", setting(config, "parallel.tensor")),
                      "a rank would round by the largest weight of its own part of a row",
                      "use parallel.tensor=1, and ZeRO where memory is short")  # fmt: skip
    if config.model.source is not None:
        yield Problem(("quantization.aware=true", setting(config, "model.source")),
                      "only the layers of the families are rounded", "use model.source=null")  # fmt: skip
