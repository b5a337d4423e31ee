"""Whether a config's layout can run on so many ranks: one call for `check`, `verify` and the planner. No torch."""

from collections.abc import Iterator

from disttrain import capabilities, deepspeed_config
from disttrain.config.checks import micro_batches, validate
from disttrain.config.problems import Problem
from disttrain.config.schema import Config
from disttrain.config.settings import setting
from disttrain.stages import SCHEDULES, schedule_problems, theoretical_bubble, virtual_stages


def problems(config: Config, world_size: int) -> list[Problem]:
    """Everything wrong with these settings on this many ranks that can be known without looking at files."""
    own = (capabilities.missing(config), deepspeed_config.problems(config), _pipeline(config, world_size))
    return [*validate(config, world_size), *(problem for problems_of in own for problem in problems_of)]


def bubble(config: Config, world_size: int) -> float | None:
    """The theoretical bubble of the pipeline, from 0 to 1; None without one, or where the batch does not divide."""
    parallel, count = config.parallel, micro_batches(config, world_size)
    if parallel.pipeline == 1 or count is None:
        return None
    virtual = virtual_stages(parallel.schedule, parallel.virtual_stages)
    return theoretical_bubble(parallel.schedule, parallel.pipeline, virtual, count)


def _pipeline(config: Config, world_size: int) -> Iterator[Problem]:
    parallel, schedule = config.parallel, config.parallel.schedule
    if parallel.pipeline == 1:
        return
    fixed = SCHEDULES[schedule].virtual_stages
    if fixed and parallel.virtual_stages not in (None, fixed):
        yield Problem(
            (setting(config, "parallel.virtual_stages"), setting(config, "parallel.schedule")),
            f"under this schedule a rank always holds {fixed} of the stages",
            "remove parallel.virtual_stages or use parallel.schedule=interleaved_1f1b",
        )
    if parallel.zero == 3 and SCHEDULES[schedule].splits_backward:
        yield Problem(
            (setting(config, "parallel.schedule"), "parallel.zero=3"),
            "this schedule computes the gradients of weights later, when their sharded values are gone: torch then "
            "trains wrongly without saying so",
            "use parallel.zero=2, or parallel.schedule=1f1b or interleaved_1f1b",
        )
    steps = micro_batches(config, world_size) or 2 * parallel.pipeline  # enough for any schedule: said elsewhere
    stages = virtual_stages(schedule, parallel.virtual_stages)
    layers, recompute = config.model.layers, config.parallel.recompute
    yield from schedule_problems(schedule, parallel.pipeline, stages, steps, layers, recompute, config.run.compile)
