"""Bytes of live tensors: a rehearsal on fake tensors counts exactly what a real rank holds, and the formulas are near it."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from disttrain import memory
from disttrain.config.load import with_values
from disttrain.config.schema import Config
from disttrain.mesh import build_mesh
from disttrain.rehearsal.everyone import ranks_that_hold_most
from disttrain.rehearsal.live import counting
from disttrain.rehearsal.records import PARTS, LiveBytes
from disttrain.rehearsal.report import held
from disttrain.rehearsal.trace import count_here, rehearsed, steps, trace
from disttrain.verify.layouts import parse
from disttrain.verify.ranks import Ranks
from tests.verify.small import config_for

SMALL = {"model.layers": 2, "train.global_batch_size": 4, "train.steps": 3, "precision": "bf16"}
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
    [
        ("dp2.mb1 on 2", {}),
        ("dp2.zero1.mb1 on 2", {"precision": "fp32"}),
        ("dp2.zero2 on 2", {"precision": "fp16"}),
        ("dp2.zero3.full.mb1 on 2", {}),
        ("dp4.zero2.rep2 on 4", {"compression.codec": "int4", "compression.min_elements": 1}),
        ("tp2.sp on 2", {}),
        ("tp2.selective.mb2 on 2", {"precision": "fp32"}),
        ("pp2-1f1b.mb2 on 2", {}),
        ("pp2-zbv.mb2 on 2", {"model.layers": 4, "model.dropout": 0.0}),
        ("cp2-ring.zero3 on 2", {}),
        ("cp2-ulysses on 2", {"family": "bert"}),
        ("dp2 on 2", {"outer.method": "nesterov", "outer.every": 2}),
        ("dp2.zero2.mb1 on 2", {"compression.codec": "topk", "precision": "fp16", "compression.min_elements": 1}),
        ("tp2.sp.pp2-1f1b.mb1 on 4", {"precision": "fp32", "optim.name": "lamb"}),
    ],
)
def test_fake_tensors_are_counted_as_real_ones_are(ranks: Ranks, name: str, values: dict[str, Any]) -> None:
    """To the byte, by part, with step, phase and operator, on the first and the last rank."""
    if values.get("compression.codec") == "topk":  # what it sends depends on values: not rehearsed by `check`
        values = {**values, "compression.codec": "sign"}
    config, world = laid_out(name, **values)
    real = ranks.run(world, config, timeout_s=250)
    for rank in {0, world - 1}:
        assert trace(config, world, rank, count=True).live == real[rank], (name, rank)
    coded = config.compression.codec != "none" and config.precision == "fp16"
    assert (real[0].feedback > 0) == (config.compression.codec in ("int4", "sign")) or not coded
    assert (real[0].outer > 0) == (config.outer.method != "none")
