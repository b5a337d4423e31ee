"""Attention over a sequence split over ranks equals attention over the whole one, and so does a whole model."""

from typing import Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from disttrain.config.schema import ModelConfig
from disttrain.mesh import Mesh
from disttrain.models import BERT, GPT, IGNORED, build_model
from disttrain.models.dropout import WeightDropout
from disttrain.models.layers import attend
from disttrain.parallel import ring
from disttrain.parallel.collectives import Traffic
from disttrain.parallel.context import apply_context_parallel, split_batch, ulysses_attend
from disttrain.parallel.groups import Group, make_groups
from disttrain.parallel.recompute import apply_recompute
from disttrain.parallel.ring import _Tile, _tiles, positions_of, ring_attend
from tests.ranks import run_ranks

Family = Literal["gpt", "bert"]
Method = Literal["ring", "ulysses"]
Mode = Literal["none", "selective", "full"]
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
    """In float64, of inputs that were rounded to `dtype`."""
    query, key, value, grad, mask, dropout = whole_inputs(masked, p, dtype)
    query, key, value, grad = (x.double() for x in (query, key, value, grad))
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


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_follows_float64(method: str) -> None:
    (case,) = cases = [(True, False, 0.2)]
    expected = attend_whole(*case, torch.bfloat16)
    for ((positions, ours, _),) in run_ranks(attend_part, 2, 2, method, cases, torch.bfloat16):
        for got, whole in zip(ours, expected, strict=True):
            assert got.dtype == torch.bfloat16
            torch.testing.assert_close(got.double(), whole[:, :, positions], rtol=0.02, atol=0.04)


def test_ring_accumulates_in_float32() -> None:
    """Many equal keys: bfloat16 sums of the weights would stop growing at 256."""
    (outputs,) = zip(*run_ranks(attend_to_equals, 2, 2), strict=True)
    for output in outputs:
        torch.testing.assert_close(output, torch.ones_like(output))


def attend_to_equals(rank: int, size: int) -> tuple[Tensor]:
    group = make_groups(Mesh(context=size), rank, "cpu", Traffic()).context
    ones = torch.ones(1, 1, 1024, 8, dtype=torch.bfloat16)
    return (ring_attend(ones, ones, ones, None, False, None, group),)


def test_rows_without_keys_are_zero() -> None:
    for output, grad in run_ranks(attend_to_nothing, 2, 2):
        assert not output[1].any()
        assert output[0].all()
        assert grad.isfinite().all()


def attend_to_nothing(rank: int, size: int) -> tuple[Tensor, Tensor | None]:
    group = make_groups(Mesh(context=size), rank, "cpu", Traffic()).context
    x = torch.ones(2, 1, 4, 2, requires_grad=True)
    output = ring_attend(x, x, x, torch.tensor([[True], [False]]).expand(2, 4), False, None, group)
    output.sum().backward()
    return output.detach(), x.grad


def test_bytes_on_the_wire() -> None:
    """A ring sends keys and values (size - 1) times, twice, and float32 or wider gradients size times."""
    part = BATCH * HEADS * SEQUENCE * SIZE // 4 * 8
    mask = BATCH * SEQUENCE // 4
    cases = [(True, False, 0.2), (False, True, 0.0)]
    for results in run_ranks(attend_part, 4, 4, "ring", cases):
        assert [sent for *_, sent in results] == [2 * (2 * 3 + 4) * part, 2 * (2 * 3 + 4) * part + 2 * 3 * mask]
    for results in run_ranks(attend_part, 4, 4, "ulysses", cases):
        assert [sent for *_, sent in results] == [8 * part, 8 * part + mask]
    ((_, _, alone),) = run_ranks(attend_part, 1, 1, "ring", cases[:1])[0]
    assert alone == 0


@pytest.mark.parametrize("size", [2, 3, 4])
def test_zigzag_shares_the_work_evenly(size: int) -> None:
    """Every rank computes as many scores, and in all barely more than the visible half."""
    query = torch.empty(1, 1, 24, 4)
    groups = [Group(size, rank, tuple(range(size)), None, Traffic()) for rank in range(size)]
    work = [
        [sum(scores_of(tile) for tile in _tiles(query, source, True, group)) for source in range(size)]
        for group in groups
    ]
    own = {row.pop(rank) for rank, row in enumerate(work)}
    assert own == {24 * 24}  # in one tile; large ones are cut below the diagonal
    assert {count for row in work for count in row} == {24 * 24 // 2}
    for rank, group in enumerate(groups):
        ours = positions_of(rank, size, 24, zigzag=True)
        for source in range(size):
            seen = torch.zeros(24, 24, dtype=torch.int64)
            for tile in _tiles(query, source, True, group):
                seen[tile.queries, tile.keys] += 1
            visible = positions_of(source, size, 24, zigzag=True) <= ours[:, None]
            assert torch.equal(seen.bool() & visible, visible)
            assert source == rank or torch.equal(seen.bool(), visible)


def scores_of(tile: _Tile) -> int:
    return (tile.queries.stop - tile.queries.start) * (tile.keys.stop - tile.keys.start)


def test_small_tiles_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ring.TILE_ELEMENTS, "cpu", BATCH * HEADS * 24)
    test_attention_equals_the_whole("ring", 2)


def whole_batch(family: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 61, (3, SEQUENCE), generator=generator)
    targets = torch.randint(0, 61, (3, SEQUENCE), generator=generator)
    targets[torch.rand(3, SEQUENCE, generator=generator) < 0.4] = IGNORED
    batch = {"tokens": tokens, "targets": targets, "dropout_seeds": torch.tensor([7, 8, 9])}
    if family == "bert":
        mask = torch.arange(SEQUENCE)[None] < torch.tensor([[SEQUENCE], [9], [2]])
        batch |= {"attention_mask": mask, "targets": targets.where(mask, IGNORED)}
        batch |= {"token_types": (tokens > 30).long(), "next_sentence": torch.tensor([0, 1, IGNORED])}
    return batch


def model_of(family: Family) -> GPT | BERT:
    config = ModelConfig(
        family=family, layers=2, hidden_size=32, heads=4, ffn_hidden_size=64, max_positions=SEQUENCE, vocab_size=61,
        layer_norm_epsilon=1e-5, dropout=0.2,
    )  # fmt: skip
    return build_model(config, 1, torch.float64)


def losses_and_gradients(
    rank: int, size: int, family: Family, method: Method, mode: Mode = "none"
) -> tuple[dict, dict]:
    """Sums over all ranks."""
    group = make_groups(Mesh(context=size), rank, "cpu", Traffic()).context
    model = model_of(family)
    apply_context_parallel(model, group, method)
    apply_recompute(model, mode)
    losses = model.loss(split_batch(whole_batch(family), group, zigzag=family == "gpt"), 0.1)
    torch.stack([loss.sum for loss in losses.values()]).sum().backward()
    sums = {name: torch.stack([loss.sum.detach(), loss.count.double()]) for name, loss in losses.items()}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for tensor in (*sums.values(), *gradients.values()):
        dist.all_reduce(tensor)
    return sums, gradients


@pytest.mark.parametrize("family", ["gpt", "bert"])
@pytest.mark.parametrize(("method", "size", "mode"), [
    ("ring", 2, "none"), ("ring", 4, "none"), ("ring", 2, "selective"), ("ring", 2, "full"),
    ("ulysses", 4, "none"), ("ulysses", 2, "full"),
])  # fmt: skip
def test_model_equals_one_process(family: str, method: str, size: int, mode: str) -> None:
    (expected,) = run_ranks(losses_and_gradients, 1, 1, family, method)
    for ours in run_ranks(losses_and_gradients, size, size, family, method, mode):
        for got, whole in zip(ours, expected, strict=True):
            assert got.keys() == whole.keys()
            for name in whole:
                torch.testing.assert_close(got[name], whole[name], rtol=1e-10, atol=1e-11, msg=name)


def test_split_batch() -> None:
    batch = whole_batch("bert")
    groups = [Group(2, rank, (0, 1), None, Traffic()) for rank in range(2)]
    first, second = (split_batch(batch, group, zigzag=False) for group in groups)
    for name in ("tokens", "targets", "attention_mask", "token_types"):
        assert torch.equal(torch.cat((first[name], second[name]), 1), batch[name])
    assert torch.equal(first["next_sentence"], batch["next_sentence"])
    assert (second["next_sentence"] == IGNORED).all()
    assert torch.equal(second["dropout_seeds"], batch["dropout_seeds"])
    assert [b["positions"].tolist() for b in (first, second)] == [list(range(8)), list(range(8, 16))]
    zigzag = [split_batch(batch, group, zigzag=True)["positions"].tolist() for group in groups]
    assert zigzag == [[0, 1, 2, 3, 12, 13, 14, 15], [4, 5, 6, 7, 8, 9, 10, 11]]
    with pytest.raises(ValueError, match="before prepare_batch"):
        split_batch({**batch, "mlm_positions": torch.tensor([1])}, groups[0], zigzag=False)
    with pytest.raises(ValueError, match="14 tokens do not divide into 4 chunks"):
        split_batch({"tokens": batch["tokens"][:, :14]}, groups[0], zigzag=True)


def test_refusals() -> None:
    group = Group(2, 0, (0, 1), None, Traffic())
    x = torch.ones(1, 3, 5, 2)
    with pytest.raises(ValueError, match="3 heads a rank do not divide by 2"):
        ulysses_attend(x, x, x, None, True, None, group)
    with pytest.raises(ValueError, match="5 positions a rank"):
        ring_attend(x, x, x, None, True, None, group)
    with pytest.raises(ValueError, match="either a mask or causal"):
        ring_attend(x, x, x, torch.ones(1, 5, dtype=torch.bool), True, None, group)
