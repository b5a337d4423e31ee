"""Attention over a sequence split over ranks equals attention over the whole one, and so does a whole model."""

import pytest
import torch
from torch import Tensor

from disttrain.mesh import Mesh
from disttrain.models.dropout import WeightDropout
from disttrain.models.layers import Attention, attend
from disttrain.parallel.collectives import Traffic
from disttrain.parallel.context import apply_context_parallel, split_batch, ulysses_attend
from disttrain.parallel.groups import make_groups
from disttrain.parallel.ring import positions_of, ring_attend
from tests.ranks import run_ranks

BATCH, HEADS, SEQUENCE, SIZE = 2, 4, 16, 6
METHODS = {"ring": ring_attend, "ulysses": ulysses_attend}
CASES = [(causal, masked, p) for causal, masked in ((True, False), (False, True), (False, False)) for p in (0.0, 0.2)]


def whole_inputs(masked: bool, p: float, dtype: torch.dtype = torch.float64) -> tuple:
    generator = torch.Generator().manual_seed(3)
    tensors = torch.randn(4, BATCH, HEADS, SEQUENCE, SIZE, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.arange(SEQUENCE)[None] < torch.tensor([[SEQUENCE], [3]]) if masked else None
    positions = torch.arange(SEQUENCE)
    dropout = WeightDropout(p, torch.tensor([11, -5]), torch.arange(4, 4 + HEADS), positions, positions) if p else None
    return *tensors, mask, dropout


def attend_whole(causal: bool, masked: bool, p: float, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    query, key, value, grad, mask, dropout = whole_inputs(masked, p, dtype)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    output = attend(inputs[0], inputs[1], inputs[2], mask, causal, dropout)
    output.backward(grad)
    return [output.detach(), *(x.grad for x in inputs)]


def attend_part(rank: int, size: int, method: str, cases: list, dtype: torch.dtype = torch.float64) -> list:
    """Output and gradients of this rank's positions, and the bytes it handed over, of every case."""
    group = make_groups(Mesh(context=size), rank, "cpu", Traffic()).context
    results = []
    for causal, masked, p in cases:
        query, key, value, grad, mask, dropout = whole_inputs(masked, p, dtype)
        positions = positions_of(rank, size, SEQUENCE // size, zigzag=causal)
        if dropout is not None:
            dropout = dropout._replace(queries=positions, keys=positions)
        mask = None if mask is None else mask[:, positions]
        inputs = [x[:, :, positions].requires_grad_() for x in (query, key, value)]
        output = METHODS[method](inputs[0], inputs[1], inputs[2], mask, causal, dropout, group)
        output.backward(grad[:, :, positions])
        results.append((positions, [output.detach(), *(x.grad for x in inputs)], group.traffic.take()[0]))
    return results


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_attention_equals_the_whole(method: str, size: int) -> None:
    ranks = run_ranks(attend_part, size, size, method, CASES)
    for i, case in enumerate(CASES):
        expected = attend_whole(*case)
        for positions, ours, _ in (rank[i] for rank in ranks):
            for got, whole in zip(ours, expected, strict=True):
                torch.testing.assert_close(got, whole[:, :, positions], rtol=1e-10, atol=1e-12, msg=str(case))
