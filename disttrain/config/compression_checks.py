"""Checks of gradient compression: settings that another codec reads, and layouts without a link to compress. No torch."""

from collections.abc import Iterator

from disttrain.config.problems import Problem
from disttrain.config.schema import ONE_BIT, CompressionConfig, Config
from disttrain.config.settings import given, no_effect, setting

READ_BY = {
    "ratio": ("topk", "randomk"),
    "threshold": ("threshold",),
    "bits": ("qsgd",),
    "rank": ("powersgd",),
    "warm_start": ("powersgd",),
    "candidates": ("auto",),
    "look_every": ("auto",),
}
"""Settings that only some codecs read."""


def compression_problems(config: Config, world_size: int, steps: int | None) -> Iterator[Problem]:
    """Every contradiction of `compression`, on this many ranks, in a run of so many steps."""
    compression, parallel = config.compression, config.parallel
    for name in CompressionConfig.model_fields:
        codecs = READ_BY.get(name, () if name == "codec" else None)
        if codecs is None:
            unread = compression.codec == "none"
        else:
            unread = bool(codecs) and compression.codec not in (*codecs, "auto")
        if unread and given(config, f"compression.{name}"):
            fix = f"compression.codec={codecs[0]}" if codecs else "another compression.codec"
            yield no_effect(config, f"compression.{name}", "compression.codec", fix)
    if compression.codec == "none":
        return
    if (
        world_size > 1 and world_size == parallel.tensor * parallel.pipeline
    ):  # a rank that is alone sends nothing anyway
        yield Problem((setting(config, "compression.codec"), f"world size {world_size}"),
                      "no gradients travel between data ranks here, so that there is nothing to compress",
                      "use compression.codec=none, or more ranks than tensor x pipeline")  # fmt: skip
    if parallel.offload:
        yield Problem((setting(config, "compression.codec"), "parallel.offload=true"),
                      "gradients that are kept in host memory are not coded",
                      "use parallel.offload=false or compression.codec=none")  # fmt: skip
    if steps is not None and compression.warmup_steps >= steps and compression.codec not in ONE_BIT:
        yield Problem((setting(config, "compression.warmup_steps"), f"{steps} training steps"),
                      "the run ends before a gradient is coded",
                      f"use at most compression.warmup_steps={steps - 1}")  # fmt: skip
    if compression.codec in ONE_BIT:
        yield from _one_bit(config, steps)


def _one_bit(config: Config, steps: int | None) -> Iterator[Problem]:
    """1-bit Adam and 1-bit LAMB: what they need of the optimizer, of the layout and of the run's length."""
    codec, warmup, optimizer = (
        config.compression.codec,
        config.compression.warmup_steps,
        ONE_BIT[config.compression.codec],
    )
    if config.optim.name != optimizer:
        other = next((c for c, name in ONE_BIT.items() if name == config.optim.name), "sign")
        yield Problem((setting(config, "compression.codec"), setting(config, "optim.name")),
                      f"{codec} sends the momentum of {optimizer}, with second moments that it keeps",
                      f"use optim.name={optimizer} or compression.codec={other}")  # fmt: skip
    if config.outer.method != "none":
        yield Problem((setting(config, "compression.codec"), setting(config, "outer.method")),
                      "changes of weights are not a momentum",
                      "use compression.codec=sign or outer.method=none")  # fmt: skip
    if config.parallel.zero:
        yield Problem((setting(config, "compression.codec"), setting(config, "parallel.zero")),
                      "every rank must know the whole momentum, which ZeRO shards",
                      "use parallel.zero=0 or compression.codec=sign")  # fmt: skip
    if warmup == 0 or (steps is not None and warmup >= steps):
        number = f"{steps} training steps" if steps else "train.steps"
        share = max(1, (steps or 1000) * 3 // 20)
        yield Problem((setting(config, "compression.codec"), setting(config, "compression.warmup_steps"), number),
                      "second moments are learned from whole gradients first, and momentum is sent after that",
                      f"give compression.warmup_steps, less than the run's steps, for example {share}")  # fmt: skip
