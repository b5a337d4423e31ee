"""Checks of `profile`: settings that nothing reads, steps and ranks that a run does not have. No torch."""

from collections.abc import Iterator

from disttrain.config.problems import Problem
from disttrain.config.schema import Config
from disttrain.config.settings import given, no_effect, setting


def profile_problems(config: Config, world_size: int, total_steps: int | None) -> Iterator[Problem]:
    """Every contradiction of `profile`."""
    profile = config.profile
    for key in ("profile.steps", "profile.ranks"):
        if given(config, key) and not profile.enabled:
            yield no_effect(config, key, "profile.enabled", "profile.enabled=true")
    if profile.steps is not None:
        first, last = profile.steps
        if first < 2 or last < first:
            yield Problem(
                (setting(config, "profile.steps"),),
                "the first of the steps must be 2 or later, since the one before gives the memory, and not after the last",
                f"use profile.steps=[{max(first, 2)}, {max(first, last, 2)}]",
            )
        elif total_steps is not None and last > total_steps:
            yield Problem(
                (setting(config, "profile.steps"), f"{total_steps} training steps"),
                "the run ends before these steps are over",
                f"use profile.steps=[{max(min(first, total_steps), 2)}, {total_steps}]" if total_steps > 1
                else "train for more steps",
            )  # fmt: skip
    missing = sorted({rank for rank in profile.ranks or () if rank >= world_size})
    if missing:
        yield Problem(
            (setting(config, "profile.ranks"), f"world size {world_size}"),
            f"there is no rank {', '.join(map(str, missing))}",
            f"use ranks from 0 to {world_size - 1}",
        )
