"""Checks of `watch`: settings that nothing reads, and rollbacks without checkpoints to go back to. No torch."""

from collections.abc import Iterator

from disttrain.config.problems import Problem
from disttrain.config.schema import Config
from disttrain.config.settings import given, no_effect, setting


def watch_problems(config: Config, world_size: int) -> Iterator[Problem]:
    """Every contradiction of `watch`."""
    watch = config.watch
    back = [key for key in ("watch.on_spike", "watch.on_nonfinite") if setting(config, key).endswith("=rollback")]
    if watch.loss_z is None:
        for key in ("watch.window", "watch.on_spike"):
            if given(config, key):
                yield no_effect(config, key, "watch.loss_z", "a number, watch.loss_z=6 for example")
    if back and config.checkpoint.every == 0:
        yield Problem(
            (*(setting(config, key) for key in back), "checkpoint.every=0"),
            "no checkpoint is written that the run could go back to",
            "give checkpoint.every, for example 100",
        )
    if given(config, "watch.max_rollbacks") and not back:
        yield no_effect(config, "watch.max_rollbacks", "watch.on_spike", "watch.on_spike=rollback")
    if given(config, "watch.max_skips") and watch.on_nonfinite != "skip":
        yield no_effect(config, "watch.max_skips", "watch.on_nonfinite", "watch.on_nonfinite=skip")
    if watch.on_nonfinite == "skip" and config.precision == "fp16":
        yield Problem(
            ("watch.on_nonfinite=skip", "precision=fp16"),
            "the loss scale of fp16 skips such updates already, and stops the run at loss_scale.minimum",
            "remove watch.on_nonfinite or use precision=bf16",
        )
    if given(config, "watch.slow_rank") and watch.slow_rank is not None and world_size == 1:
        yield Problem(
            (setting(config, "watch.slow_rank"), "world size 1"),
            "a rank that is alone has no peers to be slower than",
            "remove watch.slow_rank or use more ranks",
        )
