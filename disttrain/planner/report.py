"""What `disttrain plan` shows: the fastest layouts, where time and memory go, why others are none. No torch."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.console import Group
from rich.table import Table
from rich.text import Text

from disttrain import costs
from disttrain.config.schema import Config
from disttrain.loggers.readable import GIB, count, flops, percent, size, step_time
from disttrain.planner.prediction import Prediction
from disttrain.planner.search import Plan
from disttrain.planner.speeds import Speeds

TIMES = ("compute", "tensor", "context", "data", "pipeline", "bubble", "optimizer")
BYTES = ("weights", "copies", "gradients", "optimizer", "activations", "feedback", "buffers", "runtime")


class Counted(NamedTuple):
    """What a rank of the fastest layout held when its code was run on tensors without values."""

    rank: int
    live_bytes: int | None
    """Bytes of the tensors alive at the peak; None where it failed."""
    error: str | None


def shown(
    plan: Plan,
    config: Config,
    world: int,
    speeds: Speeds,
    memory_bytes: float,
    top: int,
    counted: Counted | None = None,
) -> Group:
    """The plan, as tables."""
    best = plan.best[:top]
    parts: list[Any] = [_head(plan, config, world, speeds), ""]
    if best:
        parts += [
            _steps(best),
            "",
            _times(best),
            "",
            _memory(best, memory_bytes),
            *_count(best[0], counted, memory_bytes),
            "",
        ]
    parts += [*_rejected(plan), "", *_conventions(config, speeds, best), *_notes(speeds, config)]
    return Group(*parts)


def _head(plan: Plan, config: Config, world: int, speeds: Speeds) -> Text:
    model, train, data = config.model, config.train, config.data
    name = model.preset or model.family
    parameters = count(costs.parameter_count(model).total)
    return Text(
        f"{name}, {parameters} parameters, on {world:,} x {speeds.device} in {speeds.precision}: "
        f"{train.global_batch_size:,} sequences of {data.sequence_length:,} tokens a step\n"
        f"{plan.legal:,} legal layouts, {plan.fitting:,} of them fit; "
        f"{plan.timed:,} timed, the others are slower by a bound"
    )


def _table(first: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("", justify="right")
    table.add_column(first, no_wrap=True)
    return table


def _steps(best: list[Prediction]) -> Group:
    table = _table("layout")
    for name in ("step", "tokens/s", "MFU full", "MFU causal", "HFU", "bubble", "waiting"):
        table.add_column(name, justify="right", no_wrap=True)
    for place, one in enumerate(best, start=1):
        table.add_row(
            str(place), one.layout.name, step_time(one.step_seconds), count(one.tokens_per_second),
            percent(one.mfu_full), percent(one.mfu_causal), percent(one.hfu), percent(one.bubble_fraction),
            percent(one.exposed_seconds / one.step_seconds),
        )  # fmt: skip
    return _titled("the fastest layout of every size of the axes; waiting: for messages that nothing hides", table)


def _times(best: list[Prediction]) -> Group:
    table = _table("")
    for name in TIMES:
        table.add_column(name, justify="right")
    for place, one in enumerate(best, start=1):
        table.add_row(str(place), "", *(f"{100 * part / one.step_seconds:.1f}" for part in one.parts))
    return _titled("where a step goes, per cent; tensor to pipeline: waiting for messages of that axis", table)


def _memory(best: list[Prediction], memory_bytes: float) -> Group:
    table = _table("stage")
    used = [name for name in BYTES if any(getattr(one.memory, name) for one in best)]
    for name in used:
        table.add_column(name, justify="right")
    table.add_column("together", justify="right", style="bold")
    for place, one in enumerate(best, start=1):
        cells = [f"{getattr(one.memory, name) / GIB:.2f}" for name in used]
        stage = str(one.memory.stage) if one.layout.pipeline > 1 else "-"
        table.add_row(str(place), stage, *cells, f"{one.memory.total / GIB:.2f}")
    return _titled(f"memory of the worst rank, GiB of {memory_bytes / GIB:.1f}; stage: its pipeline rank", table)


def _count(best: Prediction, counted: Counted | None, memory_bytes: float) -> Iterator[Text]:
    if counted is None:
        return
    if counted.live_bytes is None:
        yield Text(f"  1: its rank {counted.rank} could not be run: {counted.error}")
        return
    runtime = best.memory.runtime
    predicted, together = best.memory.total - runtime, counted.live_bytes + runtime
    yield Text(
        f"  1 counted, its rank {counted.rank} run on tensors without values: {counted.live_bytes / GIB:.2f} GiB of "
        f"tensors; predicted {predicted / GIB:.2f}, {_off(predicted / counted.live_bytes - 1)}"
    )
    if together > memory_bytes:
        yield Text(
            f"    with the runtime {together / GIB:.2f} GiB: it does not fit; plan with --headroom", style="bold red"
        )


def _off(share: float) -> str:
    return f"{100 * abs(share):.1f} % too {'much' if share > 0 else 'little'}"


def _titled(title: str, table: Table) -> Group:
    return Group(Text(title, style="italic"), table)


def _rejected(plan: Plan) -> Iterator[Text]:
    for rejection in plan.too_large:
        yield Text(f"{rejection.count:>9,} {rejection.reason}; the nearest, {rejection.nearest}")
    for rejection in plan.illegal:
        sizes = "size of the axes" if rejection.count == 1 else "sizes of the axes"
        yield Text(f"{rejection.count:>9,} {sizes} cannot be: {rejection.reason} ({rejection.nearest})")


def conventions(config: Config, speeds: Speeds) -> list[dict[str, Any]]:
    """Every way to count FLOPs that a share of the peak is made of: name, FLOPs of a token, and what is counted."""
    model, length = config.model, config.data.sequence_length
    full = costs.training_flops_per_sequence(model, length, False) / length
    causal = costs.training_flops_per_sequence(model, length, True) / length
    six = costs.six_n_flops_per_sequence(costs.parameter_count(model).total, length) / length
    return [
        {"name": "MFU full", "flops_per_token": full,
         "counts": "matrix products, attention over the whole square (Chowdhery et al. 2022, appendix B)"},
        {"name": "MFU causal", "flops_per_token": causal,
         "counts": "matrix products, attention over what a token may see"},
        {"name": "HFU", "flops_per_token": None,
         "counts": "as MFU full, and what is recomputed (Korthikanti et al. 2022, section 4)"},
        {"name": "6 N", "flops_per_token": six, "counts": "six for each parameter (Hoffmann et al. 2022), for comparison"},
    ]  # fmt: skip


def _conventions(config: Config, speeds: Speeds, best: list[Prediction]) -> Iterator[Text]:
    if speeds.peak_flops_per_second is None:
        yield Text(f"peak of {speeds.device}: unknown, so that there is no MFU")
    else:
        yield Text(f"peak: {flops(speeds.peak_flops_per_second)}, dense, {speeds.precision} ({speeds.peak_source})")
    for row in conventions(config, speeds):
        number = row["flops_per_token"]
        if number is None and best:
            hardware = costs.hardware_flops_per_sequence(
                config.model, config.data.sequence_length, best[0].layout.recompute,  # pyright: ignore[reportArgumentType]
            )  # fmt: skip
            number = hardware / config.data.sequence_length
        yield Text(f"  {row['name']:<10} {count(number):>6}FLOP a token: {row['counts']}")


def _notes(speeds: Speeds, config: Config) -> Iterator[Text]:
    yield Text(f"speeds: {speeds.source}")
    for note in [*speeds.notes, *config_notes(config)]:
        yield Text(f"  note: {note}")


def config_notes(config: Config) -> list[str]:
    """What of this config the prediction leaves out."""
    notes = []
    if config.compression.codec != "none":
        notes.append("gradients count whole: what coding takes and saves is not in the times (docs/compression.md)")
    if config.model.dropout and config.model.family in ("gpt", "bert"):
        notes.append("masks of dropout, and attention weights that it keeps, are in the times but not in the memory")
    return notes


def as_values(
    plan: Plan,
    config: Config,
    world: int,
    speeds: Speeds,
    memory_bytes: float,
    top: int,
    counted: Counted | None = None,
) -> dict[str, Any]:
    """The plan as JSON would have it: seconds, bytes, shares."""
    return {
        "ranks": world,
        "device": speeds.device,
        "precision": speeds.precision,
        "speeds": speeds.source,
        "memory_bytes": memory_bytes,
        "peak_flops_per_second": speeds.peak_flops_per_second,
        "peak_source": speeds.peak_source,
        "conventions": conventions(config, speeds),
        "legal": plan.legal,
        "fitting": plan.fitting,
        "layouts": [_values(one) for one in plan.best[:top]],
        "first_counted": None if counted is None else counted._asdict(),
        "too_large": [rejection._asdict() for rejection in plan.too_large],
        "illegal": [rejection._asdict() for rejection in plan.illegal],
        "notes": [*speeds.notes, *config_notes(config)],
    }


def _values(one: Prediction) -> dict[str, Any]:
    layout = one.layout
    return {
        "layout": layout.name,
        "step_seconds": one.step_seconds,
        "seconds": one.parts._asdict(),
        "exposed_communication_seconds": one.exposed_seconds,
        "tokens_per_second": one.tokens_per_second,
        "mfu_full": one.mfu_full,
        "mfu_causal": one.mfu_causal,
        "hfu": one.hfu,
        "pipeline_bubble_fraction": one.bubble_fraction,
        "micro_batches": one.micro_batches,
        "memory_bytes": {**{name: getattr(one.memory, name) for name in BYTES}, "together": one.memory.total},
        "worst_pipeline_rank": one.memory.stage,
        "settings": {
            **{f"parallel.{name}": getattr(layout, name) for name in
               ("tensor", "sequence", "pipeline", "schedule", "virtual_stages", "context", "context_method", "zero",
                "replicate", "recompute")},
            "train.micro_batch_size": layout.micro_batch,
        },
    }  # fmt: skip


def nothing_fits(plan: Plan, memory_bytes: float, enough: int | None, world: int) -> Iterator[str]:
    """What to say where no layout fits."""
    yield f"no layout fits: {plan.legal:,} are legal, and each needs more than {size(memory_bytes)} on some rank"
    for rejection in plan.too_large:
        yield f"  nearest of {rejection.count:,} {rejection.reason.removesuffix(' do not fit')}: {rejection.nearest}"
    helps = "parallel.offload=true keeps ZeRO's share in host memory, which is not planned for"
    if enough is not None:
        helps = f"{enough:,} ranks would do; {helps}"
    yield f"  what helps: more ranks, a device with more memory, shorter sequences, fewer sequences a step; {helps}"
