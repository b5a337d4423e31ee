"""Conjugate collectives against the serial mathematics of all ranks' inputs, forward and backward, in float64."""

import warnings

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from disttrain.mesh import Mesh
from disttrain.parallel import conjugate
from disttrain.parallel.collectives import Traffic
from disttrain.parallel.groups import make_groups
from tests.ranks import run_ranks

B, S, H = 3, 8, 12

NAMES = ["reduce_from", "gather_from", "split_to", "all_to_all"]


def calls(name: str, how: str = "plain") -> list[tuple[int, ...]]:
    """The dims each collective is tried with: first, middle, last, negative; for all_to_all both orders."""
    if how == "compiled":  # one will do: compiling is slow
        return calls(name)[:1]
    if name == "reduce_from":
        return [()]
    if name == "all_to_all":
        return [(2, 1), (1, 2), (-1, 0), (1, 1)]
    return [(1,), (2,), (-2,), (0,)]


def serial(name: str, xs: list[Tensor], dims: tuple[int, ...]) -> list[Tensor]:
    """Every rank's output as a differentiable function of all ranks' inputs."""
    n = len(xs)
    if name == "reduce_from":
        return [sum(xs[1:], xs[0])] * n
    if name == "gather_from":
        return [torch.cat(xs, *dims)] * n
    if name == "split_to":
        return [x.chunk(n, *dims)[i] for i, x in enumerate(xs)]
    split, concat = dims
    return [torch.cat([x.chunk(n, split)[i] for x in xs], concat) for i in range(n)]


def inputs(n: int, same: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(4 * B, S, H, dtype=torch.float64, generator=generator) for _ in range(n)]
    return [(drawn[0] if same else x).clone().requires_grad_() for x in drawn]


def weights_like(out: Tensor, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(out.shape, dtype=out.dtype, generator=generator)


def expected(name: str, n: int, dims: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Output and input gradient of each rank.

    What is the same on every rank (split_to's input, reduce_from's and gather_from's output) is one
    tensor: its gradient is that of one serial tensor, which each rank holds a copy or a chunk of.
    """
    xs = inputs(n, same=name == "split_to")
    outs = serial(name, xs, dims)
    if name in ("reduce_from", "gather_from"):
        outs[0].mul(weights_like(outs[0], 0)).sum().backward()
        return [(out.detach(), x.grad) for out, x in zip(outs, xs, strict=True)]
    torch.stack([(out * weights_like(out, i)).sum() for i, out in enumerate(outs)]).sum().backward()
    grads = [x.grad for x in xs]
    if name == "split_to":
        grads = [sum(grads[1:], grads[0])] * n
    return [(out.detach(), grad) for out, grad in zip(outs, grads, strict=True)]


def run_case(rank: int, n: int, name: str, how: str) -> list[tuple[Tensor, Tensor, int]]:
    if how != "compiled":  # torch's compiler hides warnings of its own, which this would make errors
        warnings.simplefilter("error")
    traffic = Traffic()
    group = make_groups(Mesh(tensor=n), rank, "cpu", traffic).tensor
    collective = getattr(conjugate, name)
    found = []
    for dims in calls(name, how):
        x = inputs(n, same=name == "split_to")[rank]
        kept = x.detach().clone()

        def call(x: Tensor, dims: tuple[int, ...] = dims) -> Tensor:
            return collective(x * 1.0, *dims, group) * 1.0

        traffic.take()
        if how == "recomputed":
            out = checkpoint(call, x, use_reentrant=False)
        elif how == "compiled":
            out = torch.compile(call, backend="aot_eager")(x)
        elif how == "strided":  # a transposed input, and a transposed gradient on the way back
            out = collective(x.mT.contiguous().mT, *dims, group).mT.contiguous().mT
        else:
            out = call(x)
        assert isinstance(out, Tensor)
        common = name in ("reduce_from", "gather_from")
        (out * weights_like(out, 0 if common else rank)).sum().backward()
        assert x.grad is not None and torch.equal(x.detach(), kept)
        found.append((out.detach(), x.grad, traffic.take()[0]))
    return found


def bytes_handed_over(name: str, n: int) -> int:
    """Of forward and backward together, for an input of the size of `inputs`."""
    if n == 1:
        return 0
    x = 4 * B * S * H * 8
    return {"reduce_from": x, "gather_from": x, "split_to": x // n, "all_to_all": 2 * x}[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("n", "how"), [(1, "plain"), (2, "plain"), (4, "plain"), (2, "strided"), (2, "recomputed")])
def test_equals_serial(name: str, n: int, how: str) -> None:
    results = run_ranks(run_case, n, n, name, how)
    for i, dims in enumerate(calls(name)):
        for (out, grad), result in zip(expected(name, n, dims), results, strict=True):
            found, found_grad, sent = result[i]
            torch.testing.assert_close(found, out, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found_grad, grad, rtol=1e-12, atol=1e-12)
            if how == "plain":
                assert sent == bytes_handed_over(name, n)


@pytest.mark.parametrize("name", ["reduce_from", "split_to"])
def test_compiled(name: str) -> None:
    """torch.compile breaks its graph and computes the same."""
    results = run_ranks(run_case, 2, 2, name, "compiled")
    for i, dims in enumerate(calls(name, "compiled")):
        for (out, grad), result in zip(expected(name, 2, dims), results, strict=True):
            torch.testing.assert_close(result[i][0], out, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(result[i][1], grad, rtol=1e-12, atol=1e-12)


def uneven(rank: int) -> list[str]:
    group = make_groups(Mesh(tensor=2), rank, "cpu", Traffic()).tensor
    messages = []
    for call in (conjugate.split_to, conjugate.start_reduce_scatter):
        with pytest.raises(ValueError) as caught:
            call(torch.zeros(2, 5, 4), 1, group)
        messages.append(str(caught.value))
    return messages


def test_uneven_chunks_are_refused() -> None:
    for messages in run_ranks(uneven, 2):
        assert all("dim 1" in message and "2 ranks" in message for message in messages)


def ranges(rank: int, n: int, size: int) -> range:
    return conjugate.own_range(size, make_groups(Mesh(tensor=n), rank, "cpu", Traffic()).tensor)


@pytest.mark.parametrize(("n", "size"), [(1, 5), (2, 61), (4, 61), (4, 5), (4, 2)])
def test_own_range_is_torch_chunk(n: int, size: int) -> None:
    chunks = [list(chunk) for chunk in torch.arange(size).chunk(n)]
    chunks += [[]] * (n - len(chunks))
    assert [list(r) for r in run_ranks(ranges, n, n, size)] == chunks
