"""What the planner predicts for runs that others have published, beside what they measured; nothing is fitted to them.

    python benchmarks/megatron_table.py            # about five minutes on two cores; writes megatron_table.md

The layouts are theirs. The habits of their codes (`Execution`) follow from the papers, the rest of the model is the
planner's.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from disttrain.config.schema import Config
from disttrain.planner import space
from disttrain.planner.devices import speeds_of
from disttrain.planner.execution import Execution
from disttrain.planner.prediction import Prediction, Predictor
from disttrain.planner.search import Plan, search
from disttrain.planner.speeds import Speeds
from disttrain.verify.layouts import Layout

HERE = Path(__file__).parent

MEGATRON_2021 = Execution(4, 2, 2, 0, 10, True, False, False, 0)
"""Narayanan et al. 2021, section 4.2: fp16 weights and activations, fused bias, GELU, dropout, sum and softmax, scores
in memory; gradients are copied into fp32 sums (2 + 8 bytes)."""
MEGATRON_2022 = Execution(4, 2, 2, 0, 8, True, False, False, 0)
"""Korthikanti et al. 2022: as before; the product adds the gradient to its fp32 sum."""
MEGATRON_CORE = Execution(4, 2, 2, 0, 8, True, True, True, 0)
"""README of Megatron-LM, 2024: fused attention, and messages of tensor parallelism that overlap products."""


DROPOUT = 0.1
"""Of hidden states and attention weights: the default of both codes."""


class Row(NamedTuple):
    """A published run of a GPT."""

    name: str
    heads: int
    hidden: int
    layers: int
    tensor: int
    pipeline: int
    gpus: int
    batch: int
    share: float
    """Of the peak, as the source counts it."""
    micro_batch: int | None = None
    virtual: int | None = None
    """Stages of a rank; None where the source does not say."""


WEAK_SCALING = (
    Row("1.7B", 24, 2304, 24, 1, 1, 32, 512, 0.44), Row("3.6B", 32, 3072, 30, 2, 1, 64, 512, 0.44),
    Row("7.5B", 32, 4096, 36, 4, 1, 128, 512, 0.46), Row("18.4B", 48, 6144, 40, 8, 1, 256, 1024, 0.43),
    Row("39.1B", 64, 8192, 48, 8, 2, 512, 1536, 0.44), Row("76.1B", 80, 10240, 60, 8, 4, 1024, 1792, 0.45),
    Row("145.6B", 96, 12288, 80, 8, 8, 1536, 2304, 0.47), Row("310.1B", 128, 16384, 96, 8, 16, 1920, 2160, 0.50),
    Row("529.6B", 128, 20480, 105, 8, 35, 2520, 2520, 0.52), Row("1008.0B", 160, 25600, 128, 8, 64, 3072, 3072, 0.52),
)  # fmt: skip
"""Narayanan et al. 2021, table 1: A100 80 GB, 2,048 tokens, vocabulary 51,200, everything recomputed. The share counts
what is recomputed: 96 B s l h^2 (1 + s / 6h + V / 16 l h) FLOPs a step. Micro-batch and interleaving are not given."""

SEQUENCE_PARALLEL = (
    Row("22B", 64, 6144, 48, 8, 1, 8, 4, 0.415, 4, 1), Row("175B", 96, 12288, 96, 8, 8, 64, 64, 0.514, 1, 3),
    Row("530B", 128, 20480, 105, 8, 35, 280, 280, 0.560, 1, 3), Row("1T", 160, 25600, 128, 8, 64, 512, 512, 0.563, 1, 1),
)  # fmt: skip
"""Korthikanti et al. 2022, tables 3 and 5: A100 80 GB, sequence parallelism, selective recomputation; MFU over the
square."""

FSDP = (
    Row("1B", 16, 2048, 24, 1, 1, 128, 1536, 0.4060, 12), Row("1B", 16, 2048, 24, 1, 1, 512, 6144, 0.3665, 12),
    Row("3B", 32, 2560, 32, 1, 1, 128, 1024, 0.4243, 8), Row("3B", 32, 2560, 32, 1, 1, 512, 4096, 0.3924, 8),
    Row("7B", 32, 4096, 32, 1, 1, 128, 768, 0.4571, 6), Row("7B", 32, 4096, 32, 1, 1, 512, 3072, 0.4220, 6),
    Row("13B", 40, 5120, 40, 1, 1, 128, 2048, 0.4218, 16), Row("13B", 40, 5120, 40, 1, 1, 512, 8192, 0.4112, 16),
    Row("30B", 56, 7168, 48, 1, 1, 128, 1024, 0.4185, 8), Row("30B", 56, 7168, 48, 1, 1, 512, 4096, 0.4027, 8),
    Row("70B", 64, 8192, 80, 1, 1, 128, 1024, 0.4336, 8), Row("70B", 64, 8192, 80, 1, 1, 512, 4096, 0.4125, 8),
)  # fmt: skip
"""MosaicML llm-foundry, scripts/train/benchmarking/README.md: MPT on H100 80 GB by FSDP, 2,048 tokens, MFU over the
square; 1B and 3B keep weights (ZeRO 2), 13B and more recompute everything."""

STRONG_SCALING = ((96, 0.47), (192, None), (384, None), (768, None), (1536, None), (3072, None), (4608, 0.42))
"""README of Megatron-LM: GPT-3 175B with a vocabulary of 131,072 and 4,096 tokens, 1,152 sequences a step on H100; only
the ends are given in words, and no layouts."""


def config_of(row: Row, length: int, vocabulary: int, dropout: float = 0.0) -> Config:
    """Training of a GPT of this shape."""
    shape = {"layers": row.layers, "hidden_size": row.hidden, "heads": row.heads, "ffn_hidden_size": 4 * row.hidden}
    return Config.model_validate(
        {
            "model": {**shape, "max_positions": length, "vocab_size": vocabulary, "dropout": dropout},
            "data": {"corpus": "tokens", "path": "tokens", "sequence_length": length},
            "train": {"steps": 100, "global_batch_size": row.batch},
            "precision": "bf16",
        }
    )


def megatron_flops(row: Row, length: int, vocabulary: int) -> float:
    """Of one step, as Narayanan et al. 2021 count them, equation 3."""
    h, layers = row.hidden, row.layers
    return 96 * row.batch * length * layers * h**2 * (1 + length / (6 * h) + vocabulary / (16 * layers * h))


def theirs(row: Row, config: Config, speeds: Speeds, execution: Execution, **settings: Any) -> Prediction:
    """Their layout; what of it is not published is chosen as is fastest and fits."""
    predictor = Predictor(config, row.gpus, speeds, execution)
    axes = space.Axes(row.tensor, row.pipeline, 1)
    best: Prediction | None = None
    sizes = (row.micro_batch,) if row.micro_batch else space.micro_batch_sizes(config, row.gpus, axes)
    for size in sizes:
        for cut in _their_schedules(row, config, axes):
            count = row.batch // axes.data(row.gpus) // size
            if not space.schedule_takes(config, axes, cut, count, settings.get("recompute", "none")):
                continue
            layout = Layout(
                row.gpus, row.tensor, pipeline=row.pipeline, schedule=cut.schedule, virtual_stages=cut.virtual,
                micro_batch=size, **settings,
            )  # fmt: skip
            found = predictor.of(layout)
            if best is None or (found.memory.total <= speeds.memory_bytes and found.step_seconds < best.step_seconds):
                best = found
    assert best is not None, row
    return best


def _their_schedules(row: Row, config: Config, axes: space.Axes) -> Iterator[space.Cut]:
    for cut in space.cuts(config, axes):
        plain = cut.schedule == "1f1b" and row.virtual in (None, 1)
        interleaved = cut.schedule == "interleaved_1f1b" and row.virtual in (None, cut.virtual)
        if not cut.sequence and (plain or interleaved):
            yield cut


def place_of(row: Row, plan: Plan) -> str:
    """Where their sizes of the axes are among ours, and how much slower than the first."""
    for place, one in enumerate(plan.best, start=1):
        layout = one.layout
        if (layout.tensor, layout.pipeline, layout.context) == (row.tensor, row.pipeline, 1):
            slower = one.step_seconds / plan.best[0].step_seconds - 1
            return f"{place} of {len(plan.best)} (+{100 * slower:.0f} %)"
    return "does not fit"


def points(predicted: float, published: float) -> str:
    """Difference in percentage points."""
    return f"{100 * (predicted - published):+.1f}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share."""
    return "" if share is None else f"{100 * share:.{digits}f} %"


def short(prediction: Prediction) -> str:
    """A layout's name without its ranks."""
    return prediction.layout.name.split(" on ")[0]


def line(*cells: object) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |\n"


def weak_scaling(rows: tuple[Row, ...] = WEAK_SCALING) -> Iterator[str]:
    """The table of Narayanan et al."""
    yield line(
        "model", "GPUs", "their layout", "published", "predicted", "points", "place of their axes", "first choice"
    )
    yield line("---", "---:", "---", "---:", "---:", "---:", "---", "---")
    for row in rows:
        config, speeds = config_of(row, 2048, 51200, DROPOUT), speeds_of("a100-sxm-80gb", "bf16", row.gpus)
        found = theirs(row, config, speeds, MEGATRON_2021, recompute="full")
        peak = (speeds.peak_flops_per_second or 0.0) * row.gpus
        share = megatron_flops(row, 2048, 51200) / found.step_seconds / peak
        plan = search(config_of(row, 2048, 51200), row.gpus, speeds, speeds.memory_bytes)
        first = plan.best[0]
        yield line(
            row.name, f"{row.gpus:,}", short(found), percent(row.share, 0), percent(share), points(share, row.share),
            place_of(row, plan), f"{short(first)}, MFU {percent(first.mfu_full)}",
        )  # fmt: skip


def sequence_parallel(rows: tuple[Row, ...] = SEQUENCE_PARALLEL) -> Iterator[str]:
    """The table of Korthikanti et al."""
    yield line("model", "GPUs", "their layout", "published MFU", "predicted", "points", "this code, no dropout")
    yield line("---", "---:", "---", "---:", "---:", "---:", "---:")
    for row in rows:
        config, speeds = config_of(row, 2048, 51200, DROPOUT), speeds_of("a100-sxm-80gb", "bf16", row.gpus)
        found = theirs(row, config, speeds, MEGATRON_2022, recompute="selective", sequence=True)
        own = Predictor(config_of(row, 2048, 51200), row.gpus, speeds).of(found.layout)
        share = found.mfu_full or 0.0
        yield line(row.name, row.gpus, short(found), percent(row.share), percent(share), points(share, row.share),
                   percent(own.mfu_full))  # fmt: skip


def fully_sharded(rows: tuple[Row, ...] = FSDP) -> Iterator[str]:
    """The table of MosaicML, with this code's own habits, which FSDP2 shares, and the attention that they had."""
    yield line("model", "GPUs", "layout", "published MFU", "predicted", "points")
    yield line("---", "---:", "---", "---:", "---:", "---:")
    for row in rows:
        config, speeds = config_of(row, 2048, 50368), speeds_of("h100-sxm", "bf16", row.gpus)
        half = tuple(
            point._replace(
                forward_flops_per_second=point.forward_flops_per_second / 2,
                backward_flops_per_second=point.backward_flops_per_second / 2,
            )
            for point in speeds.attention
        )
        recompute = "full" if row.hidden >= 5120 else "none"
        layout = Layout(row.gpus, zero=2 if row.hidden < 4096 else 3, recompute=recompute, micro_batch=row.micro_batch)
        found = Predictor(config, row.gpus, speeds._replace(attention=half)).of(layout)
        share = found.mfu_full or 0.0
        yield line(row.name, row.gpus, short(found), percent(row.share), percent(share), points(share, row.share))


def strong_scaling(worlds: tuple[tuple[int, float | None], ...] = STRONG_SCALING) -> Iterator[str]:
    """GPT-3 175B on more and more H100s."""
    yield line("GPUs", "published MFU", "predicted", "points", "first choice")
    yield line("---:", "---:", "---:", "---:", "---")
    row = Row("175B", 96, 12288, 96, 1, 1, 0, 1152, 0.0)
    for world, published in worlds:
        config, speeds = config_of(row, 4096, 131072), speeds_of("h100-sxm", "bf16", world)
        best = search(config, world, speeds, speeds.memory_bytes, MEGATRON_CORE).best[0]
        share = best.mfu_full or 0.0
        difference = "" if published is None else points(share, published)
        yield line(f"{world:,}", percent(published, 0), percent(share), difference, short(best))


INTRODUCTION = """# Published runs, and what the planner predicts for them

`python benchmarks/megatron_table.py` writes this page. The layouts are those of the sources; speeds are those of
`disttrain.planner.devices`, none of which comes from a training run. The habits of other codes (element sizes, fused
operators, overlap, dropout's masks) are taken from their papers and stand in the script.

Nothing is fitted: there is no factor in the model that was chosen by these tables. They were looked at, though. A first
version was 2 to 20 points too high; what it had left out, that a product's result is written when nothing is
multiplied, that collectives take processors from what is computed beside them, and dropout, was then put in as it is
known from elsewhere. What is left is an optimist: it knows of no slow ranks, no falling clock, no time between operators.
"""

WEAK = """
The published figures of Narayanan et al. and Korthikanti et al. were written down from memory and not checked against the
papers: check them before quoting a difference.

## Megatron-LM 2021: A100, 3D parallelism, everything recomputed

Narayanan et al. 2021, table 1. The share of the peak counts what is recomputed, as theirs does. Micro-batch and
interleaving, which the paper does not give, are those that the planner finds fastest for them. The two columns on the
right are about this code, which also has ZeRO, sequence and context parallelism: where the sizes of their axes stand among
all that fit, how much slower than the first, and what is first.

"""
SEQUENCE = """
## Megatron-LM 2022: sequence parallelism, selective recomputation

Korthikanti et al. 2022, table 5.

"""
SHARDED = """
## FSDP on H100

MosaicML llm-foundry, BF16, at the smallest and the largest of its large scales. Attention there was FlashAttention's first
version, half as fast as the second (Dao 2023, abstract).

"""
STRONG = """
## Megatron-Core on H100

The README of Megatron-LM gives its table, layouts among it, as a picture that could not be read here. In words it says:
GPT-3 175B with 131,072 rows of vocabulary, 4,096 tokens, 1,152 sequences a step reaches 47 % on 96 GPUs and 42 % on
4,608; and 2B reaches 41 %, 462B 47 to 48 %, whose shapes it does not give. Predicted is the best layout with its habits.

"""


def page() -> Iterator[str]:
    """The page, part by part."""
    yield INTRODUCTION
    parts = ((WEAK, weak_scaling), (SEQUENCE, sequence_parallel), (SHARDED, fully_sharded), (STRONG, strong_scaling))
    for text, table in parts:
        yield text
        yield from table()


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=HERE / "megatron_table.md")
    with options.parse_args().out.open("w", encoding="utf-8") as file:
        for part in page():
            file.write(part)
            file.flush()
