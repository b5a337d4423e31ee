"""Tensor and sequence parallelism: the layers of Megatron-LM (Shoeybi et al. 2019; Korthikanti et al. 2022).

A matrix is cut over the tensor axis by its columns (output features) or its rows (input features); a column layer is
followed by a row layer, so that a pair needs one reduction each way (Shoeybi et al., section 3). With sequence
parallelism whatever lies between such pairs, norms and dropout, works on a chunk of the positions, and the reduction
becomes a reduce-scatter and an all-gather (Korthikanti et al., section 4.2.2).

Shapes: B batch, S sequence, T ranks on the tensor axis, I and O input and output features of the whole layer.
"""

from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from disttrain.config.presets import shape_of
from disttrain.models import Model, tie_weights
from disttrain.models.dropout import Dropout
from disttrain.parallel import conjugate
from disttrain.parallel.conjugate import own_range, start_all_reduce, start_gather, start_reduce_scatter
from disttrain.parallel.groups import Group
from disttrain.parallel.vocabulary import ShardedVocabulary


class TensorShards(NamedTuple):
    """What apply_tensor_parallel did to the parameters, by name (tied names each have an entry)."""

    splits: dict[str, int]
    """Dim along which a parameter is cut into the group's parts, as by torch.chunk; names left whole are missing."""
    partial: set[str]
    """Whole parameters whose gradient on one rank is only that of its positions: sum it over the group, once."""
    shapes: dict[str, torch.Size]
    """Shape of every whole parameter."""


def apply_tensor_parallel(model: Model, group: Group, sequence: bool) -> TensorShards:
    """Cut the matrices of a model, or of a pipeline stage of it, in place, by the roles in its `tensor_plan`.

    The model may be on the meta device: fill the parts by the table that is returned. Parameters stay plain tensors
    under their names. With `sequence`, blocks take and give [B, S / T, H]. Changes nothing on a group of one.
    Raises ValueError where heads or feed-forward width do not divide by the group, or a matrix has no role.
    """
    shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    if group.size == 1:
        return TensorShards({}, set(), shapes)
    _check_divides(model, group)
    splits: dict[str, int] = {}
    inside = replace(group, axis="sequence") if sequence else group  # of what a profile counts
    for name, module in list(model.named_modules()):
        role = _role(model.tensor_plan, name, module)
        if role != "replicate":
            owner, _, leaf = name.rpartition(".")
            among = group if role == "vocab" else inside
            setattr(model.get_submodule(owner), leaf, _replacement(module, role, among, sequence))
            splits[f"{name}.weight"] = 1 if role == "row" else 0
            if role != "row" and getattr(module, "bias", None) is not None:
                splits[f"{name}.bias"] = 0
        if hasattr(module, "first_head"):
            first: Any = own_range(model.config.heads, group).start
            module.first_head = first
    tie_weights(model)
    model.vocabulary = ShardedVocabulary(group, shape_of(model.config).vocab_size)
    if not sequence:
        return TensorShards(splits, set(), shapes)
    _split_positions(model, inside)
    partial = {name for name in shapes if name.startswith("blocks.") and name not in splits}
    return TensorShards(splits, partial, shapes)


def _role(plan: dict[str, str], name: str, module: nn.Module) -> str:
    """Modules that the plan does not name stay whole, if they hold vectors only."""
    for pattern, role in plan.items():
        if fnmatchcase(name, pattern):
            return role
    if any(p.ndim > 1 for p in module.parameters(recurse=False)):
        raise ValueError(f"{name} holds a matrix and has no role in the tensor plan")
    return "replicate"


def _check_divides(model: Model, group: Group) -> None:
    """The vocabulary may be uneven; heads and features may not, since every rank's share of the work should be equal."""
    shape = shape_of(model.config)
    for what, size in (("heads", shape.heads), ("ffn_hidden_size", shape.ffn_hidden_size)):
        if size % group.size:
            raise ValueError(f"model.{what}={size} does not divide by parallel.tensor={group.size}")


def _replacement(module: nn.Module, role: str, group: Group, sequence: bool) -> nn.Module:
    match module, role:
        case nn.Linear(), "column":
            return ColumnLinear(module, group, sequence)
        case nn.Linear(), "row":
            return RowLinear(module, group, sequence)
        case nn.Linear(), "vocab":
            return ColumnLinear(module, group, sequence=False)
        case nn.Embedding(), "vocab":
            return VocabularyEmbedding(module, group)
    raise ValueError(f"no tensor-parallel form of {type(module).__name__} as {role!r}")


def _split_positions(model: Model, group: Group) -> None:
    """Blocks work on chunk `rank` of the positions: cut where the embedding ends, joined where the head begins.

    Embedding and head see all positions on every rank, so that their whole parameters have whole gradients.
    """

    def own(module: nn.Module, args: tuple, x: Tensor) -> Tensor:
        return conjugate.split_to(x, 1, group)

    def joined(module: nn.Module, args: tuple) -> tuple:
        return (conjugate.gather_from(args[0], 1, group), *args[1:])

    if model.embed is not None:
        model.embed.register_forward_hook(own)
    if model.head is not None:
        model.head.register_forward_pre_hook(joined)
    for module in model.blocks.modules():
        if isinstance(module, Dropout):
            module.part = (group.rank, group.size)


def _part(whole: Tensor, dim: int, group: Group) -> nn.Parameter:
    """This rank's part with memory of its own, which frees the rest."""
    rows = own_range(whole.shape[dim], group)
    part = whole.detach().narrow(dim, rows.start, len(rows)).clone(memory_format=torch.contiguous_format)
    return nn.Parameter(part, whole.requires_grad)


class ColumnLinear(nn.Module):
    """A linear layer that holds O / T of the output features: weight [O / T, I], bias [O / T] or None.

    As a head it may hold an uneven part of a vocabulary, or none of it.
    """

    def __init__(self, linear: nn.Linear, group: Group, sequence: bool):
        super().__init__()
        self.group, self.sequence = group, sequence
        self.weight = _part(linear.weight, 0, group)
        self.bias = None if linear.bias is None else _part(linear.bias, 0, group)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., I], the same on every rank, or its chunk [B, S / T, I] -> this rank's features [.., O / T]."""
        return _column(*_at_compute_dtype(x, self.weight, self.bias), self.group, self.sequence)


class RowLinear(nn.Module):
    """A linear layer that holds I / T of the input features: weight [O, I / T], and the whole bias [O] or None."""

    def __init__(self, linear: nn.Linear, group: Group, sequence: bool):
        super().__init__()
        self.group, self.sequence = group, sequence
        self.weight = _part(linear.weight, 1, group)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, I / T] -> [B, S, O], the same on every rank, or its chunk [B, S / T, O]. The bias is added once."""
        return _row(*_at_compute_dtype(x, self.weight, self.bias), self.group, self.sequence)


class VocabularyEmbedding(nn.Module):
    """An embedding that holds `own_range(V, group)` of the rows: weight [V / T, H] (Shoeybi et al., section 3)."""

    def __init__(self, embedding: nn.Embedding, group: Group):
        super().__init__()
        self.group = group
        self.part = own_range(embedding.num_embeddings, group)
        self.weight = _part(embedding.weight, 0, group)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [B, S] -> [B, S, H], the same on every rank: one holds a token's row, the others add zeros."""
        if not self.part:  # the empty sum keeps the weight in the graph
            rows = self.weight.new_zeros(*tokens.shape, self.weight.shape[1]) + self.weight.sum()
        else:
            tokens = tokens - self.part.start
            elsewhere = (tokens < 0) | (tokens >= len(self.part))
            rows = F.embedding(tokens.masked_fill(elsewhere, 0), self.weight)
            rows = rows.masked_fill(elsewhere[..., None], 0.0)
        return conjugate.reduce_from(rows, self.group)


def _at_compute_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast does for a linear layer, before the collective: half the bytes then travel."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


@torch.compiler.disable()
def _column(x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sequence: bool) -> Tensor:
    return _ColumnProduct.apply(x, weight, bias, group, sequence)  # pyright: ignore[reportReturnType]


@torch.compiler.disable()
def _row(x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sequence: bool) -> Tensor:
    return _RowProduct.apply(x, weight, bias, group, sequence)  # pyright: ignore[reportReturnType]


class _ColumnProduct(torch.autograd.Function):
    """Megatron's f, or the gathering of positions, with the product, so that the backward pass overlaps both.

    With sequence parallelism only the chunk is kept for the backward pass and gathered again, while the input's
    gradient is computed (Korthikanti et al., section 4.2.2); that one is reduced while the weight's is computed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sequence: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.sequence = group, sequence
        return F.linear(start_gather(x, 1, group)() if sequence else x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        whole = start_gather(x, 1, ctx.group) if ctx.sequence and needs_weight else lambda: x
        reduced = None
        if needs_x:
            grad_x = grad @ weight
            reduced = (
                start_reduce_scatter(grad_x, 1, ctx.group) if ctx.sequence else start_all_reduce(grad_x, ctx.group)
            )
        grad_weight = _weight_gradient(grad, whole()) if needs_weight else None
        grad_bias = grad.flatten(0, -2).sum(0) if needs_bias else None
        return reduced and reduced(), grad_weight, grad_bias, None, None


class _RowProduct(torch.autograd.Function):
    """The product with Megatron's g, or the scattering of positions, and the bias, without a copy to reduce in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sequence: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.sequence = group, sequence
        y = F.linear(x, weight)
        y = start_reduce_scatter(y, 1, group)() if sequence else start_all_reduce(y, group)()
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        pending = start_gather(grad, 1, ctx.group) if ctx.sequence else None
        grad_bias = grad.flatten(0, -2).sum(0) if needs_bias else None
        whole = pending() if pending else grad
        grad_x = whole @ weight if needs_x else None
        return grad_x, _weight_gradient(whole, x) if needs_weight else None, grad_bias, None, None


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """[.., O] and [.., I] -> [O, I]."""
    return grad.flatten(0, -2).mT @ x.flatten(0, -2)
