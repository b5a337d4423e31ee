"""Tensor and sequence parallelism equal one process: losses, scores and every gradient, in float64."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disttrain.config.schema import ModelConfig
from disttrain.mesh import Mesh
from disttrain.models import build_model, initial_value, tie_weights
from disttrain.models.cross_entropy import WholeVocabulary
from disttrain.parallel.collectives import Traffic
from disttrain.parallel.conjugate import own_range
from disttrain.parallel.groups import Group, make_groups
from disttrain.parallel.recompute import apply_recompute, compile_blocks
from disttrain.parallel.tensor import ColumnLinear, RowLinear, apply_tensor_parallel
from disttrain.parallel.vocabulary import ShardedVocabulary
from tests.ranks import run_ranks

B, S, V = 3, 8, 61
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def config_of(family: str, dropout: float = 0.0, vocab_size: int = V) -> ModelConfig:
    return ModelConfig(
        family=family, layers=2, hidden_size=32, heads=4, ffn_hidden_size=64, max_positions=S, vocab_size=vocab_size,
        dropout=dropout, layer_norm_epsilon=1e-5,
    )  # fmt: skip


def batch_of(family: str, vocab_size: int = V) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    tokens, targets = torch.randint(0, vocab_size, (2, B, S), generator=generator)
    targets = targets.masked_fill(torch.rand(B, S, generator=generator) < 0.4, -100)
    batch = {"tokens": tokens, "targets": targets, "dropout_seeds": torch.tensor([7, 8, 9])}
    if family == "bert":
        mask = torch.arange(S) < torch.tensor([[S], [5], [6]])
        batch |= {
            "attention_mask": mask,
            "targets": targets.where(mask, -100),
            "token_types": (torch.arange(S) > 3).long().expand(B, S).contiguous(),
            "next_sentence": torch.tensor([0, 1, -100]),
        }
    return batch


def randomised(config: ModelConfig, name: str, shape: torch.Size) -> Tensor:
    """Initial values, moved off the zeros and ones that would hide a bias or a norm gone missing."""
    generator = torch.Generator().manual_seed(len(name) * 1000 + sum(map(ord, name)))
    return initial_value(config, name, shape, 1) + 0.3 * torch.randn(shape, generator=generator)


def parallel_model(config: ModelConfig, group: Group, sequence: bool) -> tuple[Any, Any]:
    """Cut on the meta device, then filled by the table."""
    model = build_model(config, 1, torch.float64, "meta")
    table = apply_tensor_parallel(model, group, sequence)
    model.to_empty(device="cpu")
    tie_weights(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = randomised(config, name, table.shapes[name])
            parameter.copy_(own_part(whole, name, table.splits, group))
    return model, table


def own_part(whole: Tensor, name: str, splits: dict[str, int], group: Group) -> Tensor:
    if name not in splits:
        return whole
    rows = own_range(whole.shape[splits[name]], group)
    return whole.narrow(splits[name], rows.start, len(rows))


def whole_gradient(parameter: nn.Parameter, name: str, table: Any, group: Group) -> Tensor:
    """The gradient of the whole parameter, from every rank's."""
    assert parameter.grad is not None, name
    gradient = parameter.grad.contiguous()
    if group.size == 1:
        return gradient
    parts: list[Any] = [None] * group.size
    torch.distributed.all_gather_object(parts, gradient, group=group.process_group)
    if name in table.splits:
        return torch.cat(parts, table.splits[name])
    if name in table.partial:
        return torch.stack(parts).sum(0)
    for part in parts:  # whole on every rank, without a reduction
        torch.testing.assert_close(part, gradient, **EXACT)
    return gradient


def objective(losses: dict[str, Any]) -> Tensor:
    return torch.stack([loss.sum / loss.count for loss in losses.values()]).sum()


def serial(config: ModelConfig, smoothing: float) -> dict[str, Any]:
    model = build_model(config, 1, torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(randomised(config, name, parameter.shape))
    batch = batch_of(config.family, model.config.vocab_size)
    loss = objective(model.loss(batch, smoothing))
    loss.backward()
    scores = {name: (s.sum.item(), s.count.item()) for name, s in model.eval().scores(batch).items()}
    return {"loss": loss.item(), "scores": scores, "gradients": {n: p.grad for n, p in model.named_parameters()}}


def parallel(rank: int, n: int, config: ModelConfig, sequence: bool, smoothing: float, form: str) -> dict[str, Any]:
    if form != "compiled":  # torch's compiler hides warnings of its own, which this would make errors
        warnings.simplefilter("error")
    group = make_groups(Mesh(tensor=n), rank, "cpu", Traffic()).tensor
    model, table = parallel_model(config, group, sequence)
    if form in ("full", "selective"):
        apply_recompute(model, form)
    if form == "compiled":
        compile_blocks(model, "aot_eager")
    batch = batch_of(config.family, config.vocab_size or 0)
    group.traffic.take()
    loss = objective(model.loss(batch, smoothing))
    loss.backward()
    sent = group.traffic.take()[0]
    gradients = {name: whole_gradient(p, name, table, group) for name, p in model.named_parameters()}
    scores = {name: (s.sum.item(), s.count.item()) for name, s in model.eval().scores(batch).items()}
    return {"loss": loss.item(), "scores": scores, "gradients": gradients, "table": table, "sent": sent}


def check(config: ModelConfig, n: int, sequence: bool, smoothing: float = 0.0, form: str = "") -> list[dict[str, Any]]:
    reference = serial(config, smoothing)
    results = run_ranks(parallel, n, n, config, sequence, smoothing, form)
    for result in results:
        assert result["loss"] == pytest.approx(reference["loss"], rel=1e-12)
        for name, (total, count) in reference["scores"].items():
            assert result["scores"][name] == (pytest.approx(total, rel=1e-12), count)
        assert result["gradients"].keys() == reference["gradients"].keys()
        for name, gradient in reference["gradients"].items():
            torch.testing.assert_close(result["gradients"][name], gradient, **EXACT, msg=lambda m, n=name: f"{n}: {m}")
    return results


@pytest.mark.parametrize("family", ["gpt", "bert"])
@pytest.mark.parametrize(("n", "sequence"), [(1, True), (2, False), (2, True), (4, False), (4, True)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_equals_one_process(family: str, n: int, sequence: bool, dropout: float) -> None:
    check(config_of(family, dropout), n, sequence, smoothing=0.1 if dropout else 0.0)


@pytest.mark.parametrize(
    ("form", "sequence"),
    [("full", False), ("full", True), ("selective", False), ("selective", True), ("compiled", True)],
)
def test_recomputed_and_compiled(form: str, sequence: bool) -> None:
    check(config_of("gpt", 0.1), 2, sequence, form=form)


@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_empty_part_of_the_vocabulary(family: str) -> None:
    """Five entries on four ranks: 2, 2, 1 and 0."""
    check(config_of(family, vocab_size=5), 4, False, smoothing=0.1)


def test_table() -> None:
    (with_sequence, *_) = check(config_of("bert"), 2, True)
    table = with_sequence["table"]
    assert table.splits == {
        "embed.tokens.weight": 0, "head.decoder.weight": 0, "head.decoder.bias": 0,
        **{f"blocks.{i}.{name}": dim for i in range(2) for name, dim in {
            "attn.qkv.weight": 0, "attn.qkv.bias": 0, "attn.out.weight": 1,
            "mlp.up.weight": 0, "mlp.up.bias": 0, "mlp.down.weight": 1,
        }.items()},
    }  # fmt: skip
    whole = ("attn_norm.weight", "attn_norm.bias", "mlp_norm.weight", "mlp_norm.bias", "attn.out.bias", "mlp.down.bias")
    assert table.partial == {f"blocks.{i}.{name}" for i in range(2) for name in whole}
    model = build_model(config_of("bert"), 1)
    assert table.shapes == {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    (without, *_) = check(config_of("bert"), 2, False)
    assert without["table"].partial == set()


def test_bytes() -> None:
    """Four reductions a layer; sequence parallelism adds six gathers of a half, two of them again for the backward pass.

    Beside the layers: the embedding's and the head's reduction, the positions' split and join, two numbers a target.
    """
    hidden, loss = B * S * 32 * 8, 2 * B * S * 8
    assert {r["sent"] for r in check(config_of("gpt"), 2, False)} == {2 * 4 * hidden + 2 * hidden + loss}
    assert {r["sent"] for r in check(config_of("gpt"), 2, True)} == {2 * 7 * hidden + 3 * hidden + loss}


def structure(rank: int) -> dict[str, Any]:
    group = make_groups(Mesh(tensor=4), rank, "cpu", Traffic()).tensor
    model, _ = parallel_model(config_of("gpt"), group, True)
    assert isinstance(model.blocks["0"].attn.qkv, ColumnLinear) and isinstance(model.blocks["1"].mlp.down, RowLinear)
    with pytest.raises(ValueError, match=r"heads=6 .* parallel.tensor=4"):
        config = config_of("gpt").model_copy(update={"heads": 6, "hidden_size": 36})
        apply_tensor_parallel(build_model(config, 1, device="meta"), group, False)
    with pytest.raises(ValueError, match=r"ffn_hidden_size=66 .* parallel.tensor=4"):
        config = config_of("gpt").model_copy(update={"ffn_hidden_size": 66})
        apply_tensor_parallel(build_model(config, 1, device="meta"), group, False)
    unknown = build_model(config_of("gpt"), 1, device="meta")
    unknown.blocks["0"].extra = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"blocks\.0\.extra .* no role"):
        apply_tensor_parallel(unknown, group, False)
    return {
        "tied": model.head.decoder.weight is model.embed.tokens.weight,
        "heads": [block.attn.first_head for block in model.blocks.values()],
        "parts": [m.part for m in model.modules() if hasattr(m, "site") and hasattr(m, "part")],
        "elements": sum(p.numel() for p in model.parameters()),
        "plain": all(type(p) is nn.Parameter for p in model.parameters()),
    }


def test_structure() -> None:
    results = run_ranks(structure, 4)
    for rank, result in enumerate(results):
        assert result["tied"] and result["plain"] and result["heads"] == [rank, rank]
        assert result["parts"] == [(0, 1)] + 4 * [(rank, 4)]
    matrices = 2 * (32 * 96 + 96 + 32 * 32 + 2 * 32 * 64 + 64) + V * 32
    whole = 2 * (2 * 32 + 4 * 32) + 2 * 32 + S * 32
    assert sum(r["elements"] for r in results) == matrices + 4 * whole


def saved_bytes(rank: int, sequence: bool) -> int:
    """Of what one block keeps for its backward pass, without parameters."""
    group = make_groups(Mesh(tensor=4), rank, "cpu", Traffic()).tensor
    model, _ = parallel_model(config_of("gpt"), group, sequence)
    parameters = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.data_ptr() not in parameters:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    x = torch.randn(B, S // 4 if sequence else S, 32, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = model.blocks["0"](x)
    del out
    return sum(kept.values())


def test_sequence_parallelism_keeps_a_chunk() -> None:
    """Inputs of both pairs, of both norms and their outputs: all divided (Korthikanti et al. 2022, table 2)."""
    whole, chunk = (run_ranks(saved_bytes, 4, sequence)[0] for sequence in (False, True))
    full = B * S * 32 * 8
    assert whole - chunk > 3 * full * 3 / 4


def low_precision(rank: int, sequence: bool) -> tuple[float, int]:
    group = make_groups(Mesh(tensor=2), rank, "cpu", Traffic()).tensor
    config = config_of("gpt")
    model = build_model(config, 1)
    apply_tensor_parallel(model, group, sequence)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(model.loss(batch_of("gpt")))
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    return loss.item(), group.traffic.take()[0]


@pytest.mark.parametrize("sequence", [False, True])
def test_autocast(sequence: bool) -> None:
    """Products and what they hand over are in half precision."""
    reference = objective(build_model(config_of("gpt"), 1).loss(batch_of("gpt"))).item()
    for loss, sent in run_ranks(low_precision, 2, sequence):
        assert loss == pytest.approx(reference, rel=1e-2)
        layers = 2 * (4 if not sequence else 7) * B * S * 32 * 2
        assert sent < layers + 5 * B * S * 32 * 4


def vocabulary(rank: int, n: int, size: int, dtype: torch.dtype, smoothing: float) -> dict[str, Any]:
    warnings.simplefilter("error")
    group = make_groups(Mesh(tensor=n), rank, "cpu", Traffic()).tensor
    ours = ShardedVocabulary(group, size)
    logits, targets = rows(size, dtype)
    local = logits[:, ours.part.start : ours.part.stop].clone().requires_grad_()
    group.traffic.take()
    loss = ours.cross_entropy_sum(local, targets, smoothing)
    sent = group.traffic.take()[0]
    (2 * loss).backward()
    assert local.grad is not None
    empty = ours.cross_entropy_sum(local[:0], targets[:0], smoothing).item()
    ties = torch.zeros(2, 3, size, dtype=dtype)
    ties[1, :, size // 2 :] = 1
    ties[0, 1] = torch.nan
    return {
        "loss": loss.detach(),
        "grad": local.grad,
        "argmax": ours.argmax(local),
        "ties": ours.argmax(ties[..., ours.part.start : ours.part.stop]),
        "whole ties": ties.argmax(-1),
        "sent": sent,
        "empty": empty,
    }


def rows(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    logits = 30 * torch.randn(40, size, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, size, (40,), generator=generator)
    targets[::7] = -100
    return logits.to(dtype), targets


@pytest.mark.parametrize(("n", "size"), [(1, 61), (2, 61), (4, 61), (4, 5), (2, 20_001)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_vocabulary(n: int, size: int, smoothing: float) -> None:
    """Cross-entropy, its gradient and argmax against torch's; the last size takes several chunks of rows."""
    logits, targets = rows(size, torch.float64)
    logits.requires_grad_()
    expected = F.cross_entropy(logits, targets, ignore_index=-100, label_smoothing=smoothing, reduction="sum")
    (2 * expected).backward()
    results = run_ranks(vocabulary, n, n, size, torch.float64, smoothing)
    for result in results:
        torch.testing.assert_close(result["loss"], expected.detach(), rtol=1e-12, atol=0)
        assert torch.equal(result["loss"], results[0]["loss"])
        assert torch.equal(result["argmax"], logits.argmax(-1)) and result["empty"] == 0
        assert torch.equal(result["ties"], result["whole ties"])
        assert result["sent"] == (2 * 40 * 8 if n > 1 else 0)
    torch.testing.assert_close(torch.cat([r["grad"] for r in results], 1), logits.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_vocabulary_in_half_precision(smoothing: float) -> None:
    """Sums are float32: the loss is that of the whole vocabulary in one process, to float32 rounding."""
    logits, targets = rows(301, torch.bfloat16)
    logits.requires_grad_()
    expected = WholeVocabulary().cross_entropy_sum(logits, targets, smoothing)
    (2 * expected).backward()
    results = run_ranks(vocabulary, 2, 2, 301, torch.bfloat16, smoothing)
    assert logits.grad is not None
    for result in results:
        assert result["loss"].dtype == torch.float32
        assert result["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    grad = torch.cat([r["grad"] for r in results], 1)
    torch.testing.assert_close(grad.float(), logits.grad.float(), rtol=1e-2, atol=1e-6)


def infinite(rank: int) -> tuple[float, Tensor]:
    """A shard of impossible entries, and a target that is not in it."""
    ours = ShardedVocabulary(make_groups(Mesh(tensor=2), rank, "cpu", Traffic()).tensor, 8)
    logits = torch.arange(8, dtype=torch.float64).expand(3, 8).clone()
    logits[:, 4:] = -torch.inf
    local = logits[:, ours.part.start : ours.part.stop].clone().requires_grad_()
    loss = ours.cross_entropy_sum(local, torch.tensor([0, 1, -100]))
    loss.backward()
    assert local.grad is not None
    return loss.item(), local.grad


def test_impossible_entries() -> None:
    logits = torch.arange(4, dtype=torch.float64).expand(2, 4)
    expected = F.cross_entropy(logits, torch.tensor([0, 1]), reduction="sum").item()
    (loss, _), (other, grad) = run_ranks(infinite, 2)
    assert loss == other == pytest.approx(expected, rel=1e-12)
    assert torch.equal(grad, torch.zeros_like(grad))
