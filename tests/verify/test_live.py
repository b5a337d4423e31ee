"""Bytes of live tensors: a rehearsal on fake tensors counts exactly what a real rank holds, and the formulas are near it."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from disttrain import memory
from disttrain.config.load import with_values
from disttrain.config.schema import Config
from disttrain.mesh import build_mesh
from disttrain.rehearsal.everyone import count_most, micro_batches_that_fill, ranks_that_hold_most
from disttrain.rehearsal.live import counting
from disttrain.rehearsal.records import PARTS, LiveBytes
from disttrain.rehearsal.report import held
from disttrain.rehearsal.trace import count_here, rehearsed, steps, trace
from disttrain.verify.layouts import parse
from disttrain.verify.ranks import Ranks
from tests.chosen import chosen
from tests.verify.small import config_for

SMALL = {"model.layers": 2, "train.global_batch_size": 2, "train.steps": 3, "precision": "bf16"}
"""With dropout and label smoothing."""


def laid_out(name: str, family: str = "gpt", **values: Any) -> tuple[Config, int]:
    layout = parse(name)
    config = layout.applied(with_values(config_for(family), {**SMALL, **values}))
    return rehearsed(config, build_mesh(config.parallel, layout.world)), layout.world


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(count_here) as workers:
        yield workers


@pytest.mark.parametrize(
    ("name", "values"),
    chosen(
        [
            ("dp2.zero2 on 2", {"precision": "fp16"}),
            ("dp2.zero3.full.mb1 on 2", {"train.global_batch_size": 4}),
            ("dp2.zero2.mb1 on 2", {"compression.codec": "sign", "precision": "fp16", "compression.min_elements": 1}),
            ("dp2 on 2", {"outer.method": "nesterov", "outer.every": 2}),
            ("tp2.sp.pp2-1f1b.mb1 on 4", {"precision": "fp32", "optim.name": "lamb", "train.global_batch_size": 4}),
            ("cp2-ring.zero1 on 2", {"precision": "fp32"}),
            ("cp2-ulysses on 2", {"family": "bert", "train.global_batch_size": 4}),
        ],
        2,
    ),
)
def test_fake_tensors_are_counted_as_real_ones_are(ranks: Ranks, name: str, values: dict[str, Any]) -> None:
    """To the byte, by part, with step, phase and operator, on the first and the last rank."""
    config, world = laid_out(name, **values)
    real = ranks.run(world, config, timeout_s=250)
    for rank in {0, world - 1}:
        assert trace(config, world, rank, count=True).live == real[rank], (name, rank)
    assert (real[0].feedback > 0) == (config.compression.codec != "none")
    assert (real[0].outer > 0) == (config.outer.method != "none")


MIB = 1 << 20


def test_storages_count_once_from_their_first_operator_to_their_end() -> None:
    """A view adds nothing, a result does, and what is dropped is gone."""
    gc.collect()
    with counting() as ledger:
        ledger.begin("step 1", "forward")
        x = torch.zeros(MIB)  # 4 MiB
        view = x.view(2, -1)[1]
        view.add_(1)
        y = x + 1
        del x, view
        z = y * 2
        peak = ledger.peak(("step 1",))
    assert z.sum() and peak.total == 8 * MIB and peak.activations == 8 * MIB
    assert (peak.step, peak.phase, peak.operator) == ("step 1", "forward", "add.Tensor")


def test_blocks_of_an_allocator_are_counted_whole() -> None:
    with counting(block_bytes=512) as ledger:
        ledger.begin("step 1", "forward")
        kept = torch.zeros(3), torch.zeros(200)
        assert ledger.peak(("step 1",)).total == 512 + 1024
    del kept


def test_a_backward_pass_knows_itself() -> None:
    """Gradients that nobody has named are buffers of the backward pass."""
    with counting() as ledger:
        ledger.begin("step 1", "forward")
        x = torch.ones(MIB, requires_grad=True)
        F.gelu(x).sum().backward()
        peak = ledger.peak(("step 1",))
    assert peak.phase == "backward" and peak.buffers >= 4 * MIB


def test_the_allocator_has_handed_out_as_much(tmp_path: Path) -> None:
    """torch's own report of its CPU allocator, in which kernels' workspaces are too."""
    model = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 256))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, counting() as ledger:
        ledger.begin("step 1", "forward")
        model(torch.randn(512, 256)).square().sum().backward()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    most = max(e["args"]["Total Allocated"] for e in events if e["name"] == "[memory]")
    there = sum(p.nbytes for p in model.parameters())  # before torch has looked
    assert ledger.peak(("step 1",)).total - there == pytest.approx(most, rel=0.01)


@pytest.mark.parametrize(
    ("name", "batch", "values"),
    chosen(
        [
            ("mb1 on 1", 2, {}),
            ("dp4.zero3.full.mb1 on 4", 8, {}),
            ("tp2.sp.mb2 on 2", 4, {"precision": "fp32"}),
            ("pp4-interleaved_1f1b-v2.mb1 on 4", 12, {"model.layers": 8}),
            ("tp2.sp.pp2-1f1b.dp2.zero1.mb1 on 8", 8, {}),
            ("pp2-1f1b.mb1 on 2", 4, {"family": "bert"}),
            ("tp2.sp.pp2-looped_bfs-v2.mb1 on 4", 4, {}),
            ("tp2.sp.pp4-interleaved_zero_bubble-v2.mb1 on 8", 8, {"model.layers": 8}),
            ("pp4-zbv.mb1 on 4", 12, {"model.layers": 8}),
        ],
        3,
    ),
)
def test_the_formulas_are_near_what_is_counted(name: str, batch: int, values: dict[str, Any]) -> None:
    """Within 5 % of the fake ranks' peak, on a model whose matrices are larger than its odds and ends."""
    wide = {"model.layers": 4, "model.hidden_size": 256, "model.heads": 4, "model.ffn_hidden_size": 1024,
            "model.vocab_size": 2048, "model.max_positions": 128, "data.sequence_length": 128,
            "model.dropout": 0.0, "train.global_batch_size": batch}  # fmt: skip
    config, world = laid_out(name, **{**wide, **values})
    mesh = build_mesh(config.parallel, world)
    count = config.train.global_batch_size // mesh.data_ranks // (config.train.micro_batch_size or 1)
    predicted = memory.predict(config, mesh, config.precision, count, "cpu")  # pyright: ignore[reportArgumentType]
    for stage, rank in enumerate(ranks_that_hold_most(mesh)):
        live = trace(config, world, rank, count=True).live
        assert live is not None
        assert predicted[stage].total == pytest.approx(live.total, rel=0.05), (rank, live, predicted[stage])


def test_a_short_step_holds_as_much_as_a_long_one() -> None:
    """But for the tokens, of which a long one has more."""
    config, world = laid_out("pp2-1f1b.mb1 on 2", **{"train.global_batch_size": 8})
    assert micro_batches_that_fill(config.parallel, 8) == 3
    short, long = count_most(config, world, 0, "cpu").live, trace(config, world, 0, count=True).live
    assert short is not None and long is not None
    assert short.total == pytest.approx(long.total, rel=0.02)


def test_the_table_has_a_row_for_each_pipeline_rank() -> None:
    config, world = laid_out("pp2-1f1b.dp2.zero1.mb1 on 4", **{"train.global_batch_size": 4})
    mesh = build_mesh(config.parallel, world)
    traces = [trace(config, world, rank, count=True) for rank in ranks_that_hold_most(mesh)]
    console = Console(width=160)
    with console.capture() as shown:
        console.print(held(traces, config))
    lines = shown.get().splitlines()
    assert "counted memory of a rank at its peak, bf16" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == ["0", "2"]
    assert all(part in lines[1] for part in PARTS if part not in ("feedback", "outer"))
    assert steps(config) and isinstance(traces[0].live, LiveBytes)
