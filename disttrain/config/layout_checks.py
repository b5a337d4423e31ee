"""Cross-checks of a layout: which parallel settings contradict each other, the model or the batch. No torch."""

from collections.abc import Callable, Iterator

from disttrain.config.problems import Problem
from disttrain.config.schema import Config
from disttrain.config.settings import given, no_effect, setting


def layout_problems(config: Config, world_size: int) -> list[Problem]:
    """Every contradiction of the layout, on this many ranks."""
    checks = (_ranks(config, world_size), _tensor(config), _context(config), _sequence(config), _without_effect(config))
    return [problem for check in checks for problem in check]


def _ranks(config: Config, world_size: int) -> Iterator[Problem]:
    parallel = config.parallel
    copies = parallel.tensor * parallel.pipeline * parallel.context * parallel.replicate
    if world_size % copies:
        axes = ("tensor", "pipeline", "context", "replicate")
        yield Problem(
            (f"world size {world_size}", *(setting(config, f"parallel.{axis}") for axis in axes)),
            f"tensor x pipeline x context x replicate = {copies} does not divide the number of ranks",
            f"start a multiple of {copies} ranks or make the parallel sizes smaller",
        )


def _tensor(config: Config) -> Iterator[Problem]:
    model, ranks = config.model, config.parallel.tensor
    width = model.ffn_hidden_size or 4 * model.hidden_size
    fix = f"use parallel.tensor={_largest(ranks, lambda n: model.heads % n == 0 and width % n == 0)}"
    for key, size, what in (("heads", model.heads, "heads"), ("ffn_hidden_size", width, "feed-forward features")):
        if size % ranks:
            yield Problem(
                (setting(config, "parallel.tensor"), f"model.{key}={size}"),
                f"{size} {what} cannot be split evenly over {ranks} ranks",
                f"{fix}, or another model.{key}",
            )
    if model.vocab_size is not None and model.vocab_size < ranks:
        yield Problem(
            (setting(config, "parallel.tensor"), setting(config, "model.vocab_size")),
            "there are fewer rows in the vocabulary than ranks to share them",
            f"use parallel.tensor={_largest(model.vocab_size, lambda n: model.heads % n == 0)}",
        )


def _context(config: Config) -> Iterator[Problem]:
    parallel, length = config.parallel, config.data.sequence_length
    if parallel.context == 1:
        return
    chunks = parallel.context * (2 if config.model.family == "gpt" else 1)
    if length % chunks:
        yield Problem(
            (setting(config, "data.sequence_length"), setting(config, "parallel.context")),
            f"a {config.model.family} sequence is cut into {chunks} chunks, which {length} tokens do not fill evenly",
            f"use data.sequence_length={-(-length // chunks) * chunks} or another parallel.context",
        )
    heads, rest = divmod(config.model.heads, parallel.tensor)
    if parallel.context_method == "ulysses" and not rest and heads % parallel.context:
        yield Problem(
            ("parallel.context_method=ulysses", setting(config, "parallel.context"), setting(config, "model.heads"),
             setting(config, "parallel.tensor")),
            f"each tensor rank has {heads} heads, which cannot be shared by {parallel.context} context ranks",
            f"use parallel.context_method=ring or parallel.context={_largest(heads, lambda n: heads % n == 0)}",
        )  # fmt: skip


def _sequence(config: Config) -> Iterator[Problem]:
    parallel, length = config.parallel, config.data.sequence_length
    if not parallel.sequence or parallel.tensor == 1 or length % parallel.context:
        return
    share = length // parallel.context
    if share % parallel.tensor:
        chunks = parallel.context * parallel.tensor
        yield Problem(
            ("parallel.sequence=true", setting(config, "parallel.tensor"), setting(config, "parallel.context"),
             setting(config, "data.sequence_length")),
            f"the {share} positions of a context rank cannot be split evenly over {parallel.tensor} tensor ranks",
            f"use data.sequence_length={-(-length // chunks) * chunks} or parallel.sequence=false",
        )  # fmt: skip


def _without_effect(config: Config) -> Iterator[Problem]:
    parallel = config.parallel
    if parallel.sequence and parallel.tensor == 1:
        yield no_effect(config, "parallel.sequence", "parallel.tensor", "parallel.tensor=2 or more")
    for key in ("replicate", "offload"):
        if given(config, f"parallel.{key}") and parallel.zero == 0:
            yield no_effect(config, f"parallel.{key}", "parallel.zero", "parallel.zero=1, 2 or 3")
    for key in ("schedule", "virtual_stages"):
        if given(config, f"parallel.{key}") and parallel.pipeline == 1:
            yield no_effect(config, f"parallel.{key}", "parallel.pipeline", "parallel.pipeline=2 or more")
    if given(config, "parallel.context_method") and parallel.context == 1:
        yield no_effect(config, "parallel.context_method", "parallel.context", "parallel.context=2 or more")


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to `limit` that fits; 1 always does."""
    return next(n for n in range(limit, 0, -1) if fits(n) or n == 1)
