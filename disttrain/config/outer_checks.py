"""Checks of local steps: settings that another method reads, and layouts without workers of their own. No torch."""

from collections.abc import Iterator

from disttrain.config.problems import Problem
from disttrain.config.schema import Config, OuterConfig
from disttrain.config.settings import given, no_effect, setting


def outer_problems(config: Config) -> Iterator[Problem]:
    """Every contradiction of `outer`."""
    yield from _unread(config)
    if config.outer.method != "none":
        yield from _workers(config)
        yield from _rounds(config)
        yield from _codec(config)


def _unread(config: Config) -> Iterator[Problem]:
    outer = config.outer
    for name in OuterConfig.model_fields:
        key = f"outer.{name}"
        read = outer.method == "nesterov" or (outer.method != "none" and name not in ("lr", "momentum"))
        if name == "method" or not given(config, key):
            continue
        if not read:
            yield no_effect(config, key, "outer.method", "outer.method=nesterov")
        elif name == "mixing" and not outer.overlap:
            yield no_effect(config, key, "outer.overlap", "outer.overlap=1")


def _workers(config: Config) -> Iterator[Problem]:
    """Which ranks can have weights of their own."""
    parallel, method = config.parallel, setting(config, "outer.method")
    replicas = parallel.zero and parallel.replicate > 1
    if parallel.zero and not replicas:
        yield Problem((method, setting(config, "parallel.zero")),
                      "ranks that share their weights by ZeRO cannot update them on their own",
                      "use parallel.replicate for workers that ZeRO shards inside, or parallel.zero=0")  # fmt: skip
    if parallel.context > 1 and not replicas:
        yield Problem((method, setting(config, "parallel.context")),
                      "ranks that share a sequence cannot update their weights on their own",
                      "use parallel.zero=1 with parallel.replicate, or parallel.context=1")  # fmt: skip
    if parallel.offload:
        yield Problem((method, "parallel.offload=true"), "weights that are kept in host memory do not meet",
                      "use parallel.offload=false or outer.method=none")  # fmt: skip


def _rounds(config: Config) -> Iterator[Problem]:
    outer, most = config.outer, min(config.outer.every, config.model.layers + 1)
    if outer.overlap >= outer.every:
        yield Problem((setting(config, "outer.overlap"), setting(config, "outer.every")),
                      "changes would still travel when the next ones are due",
                      f"use outer.overlap={outer.every - 1} or a larger outer.every")  # fmt: skip
    if outer.fragments > most:
        yield Problem((setting(config, "outer.fragments"), setting(config, "outer.every"),
                       setting(config, "model.layers")),
                      "there are fewer steps in a round, or fewer blocks and what is around them, than fragments",
                      f"use outer.fragments={most}")  # fmt: skip


def _codec(config: Config) -> Iterator[Problem]:
    """What of the rest auto and Adasum exclude."""
    method = setting(config, "outer.method")
    if config.compression.codec == "auto":
        yield Problem((method, "compression.codec=auto"), "auto counts a sum of gradients every step",
                      "name a codec, int8 for example, or use compression.codec=none")  # fmt: skip
    elif config.outer.method == "adasum" and config.compression.codec != "none":
        yield Problem((method, setting(config, "compression.codec")), "Adasum needs the changes themselves",
                      "use compression.codec=none, or outer.method=nesterov")  # fmt: skip
    if config.outer.method == "adasum" and config.outer.overlap:
        yield Problem((method, setting(config, "outer.overlap")), "Adasum's products travel with the step's own messages",
                      "use outer.overlap=0, or outer.method=nesterov")  # fmt: skip
    if config.outer.method == "adasum" and config.parallel.zero:
        yield Problem((method, setting(config, "parallel.zero")), "Adasum needs whole parameters",
                      "use parallel.zero=0, or outer.method=nesterov")  # fmt: skip
