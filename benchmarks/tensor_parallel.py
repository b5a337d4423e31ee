"""Forward and backward time of one GPT under tensor parallelism: disttrain, hand-written Megatron layers, DTensor modules.

python benchmarks/tensor_parallel.py [--ranks 2 4] [--hidden-size N] [--layers N] [--repeats N] [--out FILE]

All three cut the same model class on the same CPU ranks (gloo); their losses and embedding gradients are first shown to
be equal in float64. Repeats are interleaved in one set of processes; ratios are taken within a repeat.
"""

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import report
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from disttrain.config.schema import ModelConfig
from disttrain.mesh import Mesh
from disttrain.models import GPT, build_model, tie_weights
from disttrain.parallel.collectives import Traffic
from disttrain.parallel.groups import make_groups
from disttrain.parallel.tensor import apply_tensor_parallel

HERE = Path(__file__).resolve().parent
NAMES = {"hand": "hand-written Megatron layers", "disttrain": "disttrain", "dtensor": "DTensor modules"}
Loss = Callable[[Tensor, Tensor], Tensor]


# Hand-written: what one needs for one job, and no more (Shoeybi et al. 2019; Korthikanti et al. 2022).


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _all_gather(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, 1)


def _reduce_scatter(x: Tensor) -> Tensor:
    parts = [part.contiguous() for part in x.chunk(dist.get_world_size(), 1)]
    out = torch.empty_like(parts[0])
    dist.reduce_scatter(out, parts)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, summed: bool) -> Tensor:
        ctx.summed = summed
        return _all_gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.summed:
            return _reduce_scatter(grad), None
        return grad.chunk(dist.get_world_size(), 1)[dist.get_rank()].contiguous(), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _reduce_scatter(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _all_gather(grad)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.chunk(dist.get_world_size(), 1)[dist.get_rank()].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _all_gather(grad)


class _CrossEntropy(torch.autograd.Function):
    """Three reductions: largest logit, sum of exponentials, logit of the target."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        largest = logits.max(-1).values
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        logits = logits - largest[:, None]
        targets = targets - dist.get_rank() * logits.shape[1]
        elsewhere = (targets < 0) | (targets >= logits.shape[1])
        targets = targets.masked_fill(elsewhere, 0)
        found = logits.gather(1, targets[:, None]).squeeze(1).masked_fill(elsewhere, 0.0)
        dist.all_reduce(found)
        exp = logits.exp_()
        total = exp.sum(-1)
        dist.all_reduce(total)
        ctx.save_for_backward(exp.div_(total[:, None]), targets, elsewhere)
        return (total.log() - found).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        softmax, targets, elsewhere = ctx.saved_tensors
        softmax.scatter_add_(1, targets[:, None], (elsewhere.to(softmax.dtype) - 1)[:, None])
        return softmax.mul_(grad), None


class _HandColumn(nn.Module):
    def __init__(self, linear: nn.Linear, sequence: bool):
        super().__init__()
        self.sequence = sequence
        self.weight = nn.Parameter(linear.weight.detach().chunk(dist.get_world_size())[dist.get_rank()].clone())
        bias = linear.bias
        self.bias = (
            None if bias is None else nn.Parameter(bias.detach().chunk(dist.get_world_size())[dist.get_rank()].clone())
        )

    def forward(self, x: Tensor) -> Tensor:
        x = _Gather.apply(x, True) if self.sequence else _Copy.apply(x)  # pyright: ignore
        return F.linear(x, self.weight, self.bias)


class _HandRow(nn.Module):
    def __init__(self, linear: nn.Linear, sequence: bool):
        super().__init__()
        self.sequence = sequence
        self.weight = nn.Parameter(linear.weight.detach().chunk(dist.get_world_size(), 1)[dist.get_rank()].clone())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        return (_ReduceScatter if self.sequence else _Reduce).apply(y) + self.bias  # pyright: ignore


class _HandEmbedding(nn.Module):
    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.weight = nn.Parameter(embedding.weight.detach().chunk(dist.get_world_size())[dist.get_rank()].clone())

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens - dist.get_rank() * len(self.weight)
        elsewhere = (tokens < 0) | (tokens >= len(self.weight))
        rows = F.embedding(tokens.masked_fill(elsewhere, 0), self.weight)
        return _Reduce.apply(rows.masked_fill(elsewhere[..., None], 0.0))  # pyright: ignore


def hand(model: GPT, sequence: bool) -> Loss:
    """Replace the model's matrices by the layers above."""
    assert model.embed is not None and model.head is not None
    model.embed.tokens = _HandEmbedding(model.embed.tokens)  # pyright: ignore
    model.head.decoder = _HandColumn(model.head.decoder, False)  # pyright: ignore
    tie_weights(model)
    for block in model.blocks.values():
        block.attn.qkv, block.mlp.up = _HandColumn(block.attn.qkv, sequence), _HandColumn(block.mlp.up, sequence)
        block.attn.out, block.mlp.down = _HandRow(block.attn.out, sequence), _HandRow(block.mlp.down, sequence)
    if sequence:
        model.embed.register_forward_hook(lambda _m, _a, x: _Split.apply(x))  # pyright: ignore
        model.head.register_forward_pre_hook(lambda _m, a: (_Gather.apply(a[0], False),))  # pyright: ignore
    return lambda tokens, targets: _CrossEntropy.apply(model(tokens).flatten(0, 1), targets.flatten())  # pyright: ignore


def disttrain(model: GPT, sequence: bool) -> Loss:
    """This project's."""
    group = make_groups(Mesh(tensor=dist.get_world_size()), dist.get_rank(), "cpu", Traffic()).tensor
    apply_tensor_parallel(model, group, sequence)
    return lambda tokens, targets: model.loss({"tokens": tokens, "targets": targets})["lm"].sum


def dtensor(model: GPT, sequence: bool) -> Loss:
    """torch's own plans for the same modules, with its parallel loss."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    inside = Shard(1) if sequence else Replicate()
    plan: dict[str, Any] = {
        "embed.tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
        "blocks.*.attn.qkv": ColwiseParallel(),
        "blocks.*.attn.out": RowwiseParallel(output_layouts=inside),
        "blocks.*.mlp.up": ColwiseParallel(),
        "blocks.*.mlp.down": RowwiseParallel(output_layouts=inside),
        "head.decoder": ColwiseParallel(input_layouts=inside, output_layouts=Shard(-1), use_local_output=False),
    }
    if sequence:
        plan |= {
            "embed": PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=Shard(1)),
            "blocks.*.attn_norm": SequenceParallel(),
            "blocks.*.mlp_norm": SequenceParallel(),
            "blocks.*.attn": PrepareModuleInput(
                input_layouts=(Shard(1), None, None), desired_input_layouts=(Replicate(), None, None)
            ),
            "blocks.*.mlp": PrepareModuleInput(
                input_layouts=(Shard(1), None), desired_input_layouts=(Replicate(), None)
            ),
            "head.norm": SequenceParallel(),
        }
    parallelize_module(model, mesh, plan)
    tie_weights(model)

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="sum")

    return loss


CONTESTANTS: dict[str, Callable[[GPT, bool], Loss]] = {"hand": hand, "disttrain": disttrain, "dtensor": dtensor}


def build(name: str, options: argparse.Namespace, sequence: bool, dtype: torch.dtype) -> tuple[GPT, Loss]:
    """One contestant's model, with the weights that all have."""
    config = ModelConfig(
        family="gpt", layers=options.layers, hidden_size=options.hidden_size, heads=options.heads,
        ffn_hidden_size=4 * options.hidden_size, max_positions=options.sequence_length, vocab_size=options.vocab_size,
        dropout=0.0, layer_norm_epsilon=1e-5,
    )  # fmt: skip
    model = build_model(config, 1, dtype)
    assert isinstance(model, GPT)
    return model, CONTESTANTS[name](model, sequence)


def once(name: str, loss: Loss, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Forward and backward; the loss per token."""
    with loss_parallel() if name == "dtensor" else nullcontext():
        value = loss(*batch) / batch[0].numel()
        value.backward()
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def check(options: argparse.Namespace, sequence: bool, batch: tuple[Tensor, Tensor]) -> float:
    """Loss per token in float64; raises where losses or norms of the embedding's gradient differ by more than 1e-10."""
    found = []
    for name in CONTESTANTS:
        model, loss = build(name, options, sequence, torch.float64)
        value = once(name, loss, batch).item()
        assert model.embed is not None
        grad = model.embed.tokens.weight.grad
        assert grad is not None
        squares = (grad.to_local() if isinstance(grad, DTensor) else grad).square().sum()
        dist.all_reduce(squares)
        found.append(torch.tensor([value, squares.item()], dtype=torch.float64))
        if not torch.allclose(found[-1], found[0], rtol=1e-10, atol=0):
            raise RuntimeError(f"{name} gives {found[-1].tolist()}, {list(CONTESTANTS)[0]} {found[0].tolist()}")
    return found[0][0].item()


def worker(options: argparse.Namespace) -> None:
    """One rank: check, then time; rank 0 writes what it measured."""
    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(0)
    shape = (2, options.batch, options.sequence_length)
    tokens, targets = torch.randint(0, options.vocab_size, shape, generator=generator)
    cells = []
    for sequence in (False, True):
        loss = check(options, sequence, (tokens, targets))
        built = {name: build(name, options, sequence, torch.float32) for name in CONTESTANTS}
        seconds: dict[str, list[float]] = {name: [] for name in built}
        for repeat in range(-1, options.repeats):  # the first warms up
            for name, (model, of) in built.items():
                dist.barrier()
                start = time.perf_counter()
                for _ in range(options.steps):
                    once(name, of, (tokens, targets))
                    model.zero_grad(set_to_none=True)
                dist.barrier()
                if repeat >= 0:
                    seconds[name].append((time.perf_counter() - start) / options.steps)
        cells.append({"ranks": dist.get_world_size(), "sequence": sequence, "loss": loss, "seconds": seconds})
    if dist.get_rank() == 0:
        options.worker.write_text(json.dumps(cells))
    dist.barrier()
    dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> None:
    """Start the ranks and write the results."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(typed)
    if options.worker:
        return worker(options)
    about = report.describe("cpu", options.threads, "python benchmarks/tensor_parallel.py " + shlex.join(typed))
    out = options.out or HERE / re.sub("^throughput", "tensor_parallel", report.file_name(about))
    cells: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in options.ranks:
            path = Path(folder) / f"ranks_{ranks}.json"
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
            command = [*launch, str(HERE / "tensor_parallel.py"), *typed, "--worker", str(path)]
            subprocess.run(command, check=True, env=environment)
            cells += json.loads(path.read_text())
    content = {"about": about, "workload": workload(options), "cells": cells}
    out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(about, workload(options), cells))
    print(out.with_suffix(".md").read_text())


def workload(options: argparse.Namespace) -> dict[str, int]:
    """What is written of the options."""
    names = ("layers", "hidden_size", "heads", "vocab_size", "sequence_length", "batch", "steps", "repeats")
    return {name: getattr(options, name) for name in names}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=(2, 4))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step")
    parser.add_argument("--steps", type=int, default=4, help="forward and backward passes of a repeat")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a rank")
    parser.add_argument("--out", type=Path, help="output files, without suffix")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def markdown(about: dict[str, Any], work: dict[str, int], cells: list[dict[str, Any]]) -> str:
    """The report: one table."""
    versions = f"Python {about['python']}, torch {about['versions']['torch']}, commit {about['commit']}"
    lines = [
        f"# Tensor parallelism on {about['cpu']}, {about['cores']} cores, {about['date'][:7]}",
        "",
        f"- Machine: {about['cpu']}, {about['cores']} cores; {about['threads_per_rank']} thread(s) a rank, gloo; load "
        f"before: {about['load_before']}.",
        f"- Software: {versions}. Date: {about['date']}.",
        f"- Command: `{about['command'].strip()}`",
        f"- Model: GPT of {work['layers']} layers, {work['hidden_size']} wide, {work['heads']} heads, vocabulary "
        f"{work['vocab_size']}; {work['batch']} sequences of {work['sequence_length']} tokens; float32.",
        f"- Milliseconds of one forward and backward pass: median (lowest to highest) of {work['repeats']} interleaved "
        f"repeats of {work['steps']}; ratios are medians of the ratios within a repeat.",
        "- All three gave the same loss and the same norm of the embedding's gradient in float64, to 1e-10.",
        "",
        "| ranks | sequence parallel | "
        + " | ".join(NAMES.values())
        + " | disttrain / hand-written | disttrain / DTensor |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cell in cells:
        seconds = cell["seconds"]
        times = [
            f"{1e3 * statistics.median(seconds[n]):.1f} ({1e3 * min(seconds[n]):.1f} to {1e3 * max(seconds[n]):.1f})"
            for n in NAMES
        ]
        ratios = [
            statistics.median(a / b for a, b in zip(seconds["disttrain"], seconds[other], strict=True))
            for other in ("hand", "dtensor")
        ]
        columns = [str(cell["ranks"]), "yes" if cell["sequence"] else "no", *times, *(f"{r:.2f}" for r in ratios)]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
