"""Checks of gradient compression: settings that another codec reads, and layouts without a link to compress. No torch."""

from collections.abc import Iterator

from disttrain.config.problems import Problem
from disttrain.config.schema import CompressionConfig, Config
from disttrain.config.settings import given, no_effect, setting

READ_BY = {
    "ratio": ("topk", "randomk"),
    "threshold": ("threshold",),
    "bits": ("qsgd",),
    "rank": ("powersgd",),
    "warm_start": ("powersgd",),
}
"""Settings that only some codecs read."""


def compression_problems(config: Config, world_size: int) -> Iterator[Problem]:
    """Every contradiction of `compression`, on this many ranks."""
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
