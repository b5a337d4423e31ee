"""Recomputed and compiled blocks train as plain ones do, and keep less."""

import shutil
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from disttrain.config.schema import ModelConfig
from disttrain.mesh import Mesh
from disttrain.models import BERT, GPT, build_model
from disttrain.models.dropout import Dropout, Keys, WeightDropout, at_site
from disttrain.models.layers import Block
from disttrain.parallel.collectives import Traffic
from disttrain.parallel.conjugate import gather_from
from disttrain.parallel.context import apply_context_parallel, split_batch
from disttrain.parallel.groups import make_groups
from disttrain.parallel.recompute import apply_recompute, compile_blocks
from disttrain.parallel.tensor import apply_tensor_parallel
from tests.ranks import run_ranks

Family = Literal["gpt", "bert"]
Mode = Literal["none", "selective", "full"]
SEQUENCE = 32


def model_of(family: Family, layers: int = 2, dropout: float = 0.1) -> GPT | BERT:
    config = ModelConfig(
        family=family, layers=layers, hidden_size=16, heads=4, ffn_hidden_size=32, max_positions=SEQUENCE,
        vocab_size=30, layer_norm_epsilon=1e-5, dropout=dropout,
    )  # fmt: skip
    return build_model(config, 1, torch.float64)


def batch_of(family: Family) -> dict[str, Tensor]:
    tokens = torch.randint(0, 30, (2, SEQUENCE), generator=torch.Generator().manual_seed(2))
    batch = {"tokens": tokens, "targets": tokens.roll(1, 1), "dropout_seeds": torch.tensor([3, 4])}
    if family == "bert":
        batch["attention_mask"] = torch.arange(SEQUENCE)[None] < torch.tensor([[SEQUENCE], [9]])
        batch |= {"token_types": tokens % 2, "next_sentence": torch.tensor([0, 1])}
    return batch


def train(model: GPT | BERT, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Losses and gradients by name."""
    losses = {name: loss.sum for name, loss in model.loss(batch).items()}
    torch.stack(list(losses.values())).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()} | gradients


def saved_bytes(model: GPT | BERT, batch: dict[str, Tensor]) -> int:
    """Bytes of all distinct tensors that the forward pass keeps, save for parameters."""
    storages: dict[int, Tensor] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model.loss(batch)
    assert losses
    return sum(t.untyped_storage().nbytes() for at, t in storages.items() if at not in parameters)


@pytest.mark.parametrize("family", ["gpt", "bert"])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recompute_changes_nothing(family: Family, mode: Mode) -> None:
    expected = train(model_of(family), batch_of(family))
    model = model_of(family)
    names = list(model.state_dict())
    apply_recompute(model, mode)
    assert list(model.state_dict()) == names
    ours = train(model, batch_of(family))
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_recompute_keeps_less(family: Family) -> None:
    kept: dict[str, int] = {}
    modes: tuple[Mode, ...] = ("none", "selective", "full")
    for mode in modes:
        sizes = []
        for layers in (2, 4):
            model = model_of(family, layers)
            apply_recompute(model, mode)
            sizes.append(saved_bytes(model, batch_of(family)))
        kept[mode] = (sizes[1] - sizes[0]) // 2  # of one block
    states = 2 * SEQUENCE * 16 * 8
    weights = 2 * 4 * SEQUENCE * SEQUENCE * 8
    assert kept["selective"] <= kept["none"] - weights
    assert states <= kept["full"] < 1.2 * states


def test_none_leaves_the_model_alone() -> None:
    model = model_of("gpt")
    apply_recompute(model, "none")
    assert all("forward" not in vars(m) for m in model.modules())


Backend = Callable[[torch.fx.GraphModule, list[Tensor]], Any]


def counting() -> tuple[list[int], Backend]:
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(len(inputs))
        return graph.forward

    return graphs, backend


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_one_graph_serves_all_blocks(mode: Mode) -> None:
    """More blocks than torch.compile is ready to compile one by one: it would run the others as they are."""
    torch.compiler.reset()
    expected = train(model_of("gpt", layers=10), batch_of("gpt"))
    model = model_of("gpt", layers=10)
    names = list(model.state_dict())
    graphs, backend = counting()
    apply_recompute(model, mode)
    compile_blocks(model, backend)
    assert list(model.state_dict()) == names
    ours = train(model, batch_of("gpt"))
    assert len(graphs) == 1
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["none", "full"])
def test_compiled_with_autograd_traced(mode: Mode) -> None:
    torch.compiler.reset()
    expected = train(model_of("bert"), batch_of("bert"))
    model = model_of("bert")
    apply_recompute(model, mode)
    compile_blocks(model, "aot_eager")
    for name, value in train(model, batch_of("bert")).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


class Masks(Block):
    """A block that only drops: what inductor makes of the hash, without the time it takes over the rest."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.drop = Dropout(0.3, 5)

    def forward(self, x: Tensor, mask: Tensor | None = None, keys: Keys | None = None) -> Any:
        """x [B, S, H] -> hidden states and weights dropped."""
        assert keys is not None
        assert keys.seeds is not None
        heads = torch.arange(2, 6)
        weights = WeightDropout(0.3, at_site(keys.seeds, 2), heads, keys.positions, torch.arange(40))
        return self.drop(x, keys), weights.factors(x.dtype)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++")
def test_inductor_draws_the_same_masks() -> None:
    """Signed overflow in generated C++ once gave other masks."""
    torch.compiler.reset()
    keys = Keys(torch.tensor([3, 4]), torch.arange(20))
    model, block, x = model_of("gpt"), Masks(), torch.randn(2, 20, 70)
    model.blocks = nn.ModuleDict({"0": block})
    expected = block(x, None, keys)
    compile_blocks(model)
    for ours, plain in zip(block(x, None, keys), expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)


def combined(rank: int, mesh: Mesh, sequence: bool, mode: Mode, backend: str | Backend | None) -> dict[str, Tensor]:
    """Losses and gradients under tensor and ring context parallelism, made whole again."""
    torch.compiler.reset()
    groups = make_groups(mesh, rank, "cpu", Traffic())
    model = model_of("gpt")
    shards = apply_tensor_parallel(model, groups.tensor, sequence)
    apply_context_parallel(model, groups.context, "ring")
    apply_recompute(model, mode)
    if backend is not None:
        compile_blocks(model, backend)
    sums = train(model, split_batch(batch_of("gpt"), groups.context, zigzag=True))
    for name, value in sums.items():
        dist.all_reduce(value, group=groups.context.process_group)
        if name in shards.partial:
            dist.all_reduce(value, group=groups.tensor.process_group)
        if name in shards.splits:
            sums[name] = gather_from(value, shards.splits[name], groups.tensor)
    return sums


@pytest.mark.parametrize(
    ("sequence", "mode", "backend"),
    [(False, "selective", None), (False, "full", None), (True, "none", None), (True, "selective", None),
     (True, "full", None), (True, "full", "eager")],
)  # fmt: skip
def test_with_tensor_and_context_parallelism(sequence: bool, mode: Mode, backend: str | None) -> None:
    expected = train(model_of("gpt"), batch_of("gpt"))
    for ours in run_ranks(combined, 4, Mesh(context=2, tensor=2), sequence, mode, backend):
        assert ours.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-11, msg=name)
