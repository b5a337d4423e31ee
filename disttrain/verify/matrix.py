"""Which layouts to verify: every legal one, a dozen that show each feature once, or a sample. No torch."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import get_args

from disttrain.config.schema import Config, ParallelConfig
from disttrain.verify.layouts import Layout, parse

MAX_WORLD = 8

SMALL = (
    "full.mb2 on 1", "selective on 1",
    "dp2.mb1 on 2", "tp2 on 2", "tp2.sp.mb4 on 2", "cp2-ring on 2", "cp2-ulysses.mb2 on 2",
    "pp2-1f1b.mb2 on 2", "pp2-gpipe.mb4 on 2", "pp2-interleaved_1f1b.mb2 on 2", "pp2-zbv.mb2 on 2",
    "dp2.zero1 on 2", "dp2.zero2.mb2 on 2", "dp2.zero3.full on 2", "dp4.zero2.rep2 on 4", "tp4.sp on 4",
    "tp2.sp.pp2-1f1b.dp2.zero1.mb2 on 8", "tp2.pp2-interleaved_1f1b.cp2-ring.mb2 on 8",
    "tp2.sp.cp2-ulysses.dp2.zero3.selective on 8", "pp2-1f1b.cp2-ring.dp2.zero2.mb1 on 8",
)  # fmt: skip
"""Each feature once, and four combinations on 8 ranks. Those that a model does not allow are left out."""


OTHER_ENGINES = {
    "deepspeed": (
        "dp2.mb4.deepspeed on 2", "dp2.zero1.mb4.deepspeed on 2", "dp2.zero2.full.mb2.deepspeed on 2",
        "dp2.zero3.deepspeed on 2", "dp2.zero3.offload.mb2.deepspeed on 2", "dp4.zero2.mb1.deepspeed on 4",
        "dp4.zero1.offload.selective.deepspeed on 4",
    ),
    "horovod": ("dp2.horovod on 2", "dp2.full.mb4.horovod on 2", "dp4.selective.mb1.horovod on 4"),
}  # fmt: skip
"""What is verified, small or full, where the config names an engine that only knows data parallelism."""


FEW, MANY = (2, 1), (4, 8, 16)
"""Micro-batches of a step: what is usual, and what some schedules need. Each takes all of a step's messages again."""


def small_matrix(config: Config, max_world: int = MAX_WORLD) -> list[Layout]:
    """About a dozen and a half layouts: each feature once, and combinations on 8 ranks, as far as they are legal."""
    names = OTHER_ENGINES.get(config.engine, SMALL)
    return [x for x in map(parse, names) if x.world <= max_world and not x.problems(config)]


def full_matrix(config: Config, max_world: int = MAX_WORLD) -> list[Layout]:
    """Every legal combination of axis sizes, sequence parallelism, schedule, context method, ZeRO stage and replicas.

    What changes no message between ranks (recomputation, micro-batch, offload) is not multiplied with these but goes
    round, each combination taking the next variant that is legal for it.
    """
    if config.engine != "native":
        return small_matrix(config, max_world)
    layouts = []
    for base in _combinations(max_world):
        variants = list(_variants(config, base, FEW))
        turn = len(layouts) % len(variants)
        variants = [*variants[turn:], *variants[:turn], *_variants(config, base, MANY)]
        legal = (v for v in variants if not v.problems(config))
        if (layout := next(legal, None)) is not None:
            layouts.append(layout)
    return layouts


def enumerate_layouts(config: Config, max_world: int = MAX_WORLD) -> Iterator[Layout]:
    """Every legal layout on up to `max_world` ranks: thousands, the smaller worlds first."""
    for base in _combinations(max_world):
        for layout in _variants(config, base, FEW + MANY):
            if not layout.problems(config):
                yield layout


def sample(layouts: Sequence[Layout], count: int, seed: int) -> list[Layout]:
    """`count` different layouts, the same for the same seed, in their given order."""
    chosen = random.Random(seed).sample(range(len(layouts)), min(count, len(layouts)))
    return [layouts[i] for i in sorted(chosen)]


def _combinations(max_world: int) -> Iterator[Layout]:
    """All combinations of what decides who sends what to whom, legal or not."""
    schedules = _choices("schedule")
    for world in range(1, max_world + 1):
        for tensor, pipeline, context in product(_divisors(world), repeat=3):
            if world % (tensor * pipeline * context):
                continue
            data = world // (tensor * pipeline * context)
            axes = product(
                (False, True) if tensor > 1 else (False,),
                schedules if pipeline > 1 else schedules[:1],
                _choices("context_method") if context > 1 else ("ring",),
                (0, 1, 2, 3) if data * context > 1 else (0,),
                _divisors(data),
            )
            for sequence, schedule, method, zero, replicate in axes:
                if zero == 0 and replicate > 1:
                    continue
                yield Layout(world, tensor, sequence, pipeline, schedule if pipeline > 1 else "1f1b", None,
                             context, method, zero, replicate)  # fmt: skip


def _variants(config: Config, base: Layout, numbers: Sequence[int]) -> Iterator[Layout]:
    """The same messages with every recomputation, offload, and these numbers of micro-batches."""
    share = config.train.global_batch_size // base.data
    sizes = [None if number == 1 else share // number for number in numbers if share % number == 0]
    for recompute, offload, micro_batch in product(
        ("none", "full", "selective"), (False, True) if base.zero else (False,), sizes
    ):
        yield replace(base, recompute=recompute, micro_batch=micro_batch, offload=offload)


def _choices(name: str) -> tuple[str, ...]:
    """The values the schema lists for a setting under `parallel`."""
    return get_args(ParallelConfig.model_fields[name].annotation)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
