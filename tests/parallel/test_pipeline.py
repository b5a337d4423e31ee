"""Every pipeline schedule equals one process, for both families: losses, every gradient, evaluation."""

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from disttrain.config.schema import ModelConfig
from disttrain.mesh import Mesh
from disttrain.models import build_model
from disttrain.parallel.collectives import Traffic
from disttrain.parallel.data import shard
from disttrain.parallel.groups import make_groups
from disttrain.parallel.pipeline import Pipeline, keep_stage
from disttrain.stages import SCHEDULES, layers_of_stages, stage_numbers, virtual_stages
from tests.chosen import ALL, chosen
from tests.ranks import run_ranks

B, S, V, HIDDEN = 2, 8, 31, 16
STEPS = 2


def config_for(family: str, layers: int) -> ModelConfig:
    shape = {"layers": layers, "hidden_size": HIDDEN, "heads": 2, "ffn_hidden_size": 24, "max_positions": S}
    return ModelConfig.model_validate(
        {"family": family, "vocab_size": V, "layer_norm_epsilon": 1e-5, "dropout": 0.1, **shape}
    )


def batch_of(family: str, number: int, length: int = S, rows: int = B) -> dict[str, Tensor]:
    """One micro-batch; how many tokens it predicts differs widely from one to the next."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, V, (rows, length), generator=generator)
    keep = torch.rand(rows, length, generator=generator) < 0.1 + 0.8 * (number % 3) / 2
    keep[0, 1] = True
    batch = {"tokens": tokens, "targets": torch.where(keep, tokens.roll(2), -100)}
    batch["dropout_seeds"] = torch.arange(rows) + 100 * number
    if family == "bert":
        lengths = torch.randint(3, length + 1, (rows,), generator=generator)
        batch["attention_mask"] = torch.arange(length)[None] < lengths[:, None]
        batch["token_types"] = (torch.arange(length)[None] >= lengths[:, None] // 2).long()
        batch["next_sentence"] = torch.randint(0, 2, (rows,), generator=generator)
    return batch


def loss_function(batches: list[dict[str, Tensor]], model: Any, sums: list[Tensor]) -> Any:
    """What an engine does: the last chunk's loss sums over the step's counts, and the sums kept aside."""
    batches = [model.prepare_batch(batch) for batch in batches]
    counts = [model.count_targets(batch) for batch in batches]
    totals = {name: sum(count[name] for count in counts) for name in counts[0]}

    def run(chunk: Any, micro_batch: int, x: Tensor | None) -> Tensor:
        y = chunk.forward_batch(batches[micro_batch], x)
        if chunk.head is None:
            return y
        losses = chunk.loss_of(y, batches[micro_batch])
        sums.append(torch.stack([loss.sum.detach() for loss in losses.values()]))
        return torch.stack([loss.sum / totals[name] for name, loss in losses.items()]).sum()

    return run


def untied(model: Any) -> Any:
    """The model with its tied weights parted, as two pipeline stages have them."""
    model.head.decoder.weight = torch.nn.Parameter(model.head.decoder.weight.detach().clone())
    return model


@functools.cache
def serial(family: str, layers: int, micro_batches: int) -> dict[str, Any]:
    """One process: gradients of both steps added up, loss sums, and scores of three batches of other shapes."""
    model: Any = untied(build_model(config_for(family, layers), 1, torch.float64))
    sums: list[Tensor] = []
    for step in range(STEPS):
        batches = [batch_of(family, 1000 * step + i) for i in range(micro_batches)]
        run = loss_function(batches, model, sums)
        for i in range(micro_batches):
            run(model, i, None).backward()
    model.eval()
    with torch.no_grad():
        scores = [score(model, batch, None) for batch in evaluation_batches(family, model)]
    return {"gradients": {n: p.grad for n, p in model.named_parameters()}, "sums": sums, "scores": scores}


def evaluation_batches(family: str, model: Any) -> list[dict[str, Tensor]]:
    shapes = [(1, 8), (3, 5), (2, 7), (2, 8), (1, 4), (1, 3)]
    return [model.prepare_batch(batch_of(family, 50 + i, length, rows)) for i, (rows, length) in enumerate(shapes)]


def score(chunk: Any, batch: dict[str, Tensor], x: Tensor | None) -> Any:
    y = chunk.forward_batch(batch, x)
    if chunk.head is None:
        return y
    return torch.stack([score.sum for score in chunk.scores_of(y, batch).values()])


Case = tuple[str, str, int, int, int]
"""family, schedule, layers, virtual stages, micro-batches."""


def pipelined(rank: int, size: int, cases: list[Case]) -> list[dict[str, Any]]:
    traffic = Traffic()
    groups = make_groups(Mesh(pipeline=size), rank, "cpu", traffic)
    return [one_case(groups, traffic, *case) for case in cases]


def chunks_of(groups: Any, config: ModelConfig, schedule: str, virtual: int) -> list[tuple[int, Any]]:
    size = groups.pipeline.size
    layers = layers_of_stages(config, S, size * virtual)
    chunks = []
    for number in stage_numbers(schedule, groups.pipeline.rank, size, virtual):
        model = untied(build_model(config, 1, torch.float64))
        keep_stage(model, layers[number], number == 0, number == size * virtual - 1)
        chunks.append((number, model))
    return chunks


def one_case(
    groups: Any, traffic: Traffic, family: str, schedule: str, layers: int, virtual: int, micro_batches: int
) -> dict[str, Any]:
    """The same on this rank of a pipeline."""
    chunks = chunks_of(groups, config_for(family, layers), schedule, virtual)
    shape = (B, S, HIDDEN)
    pipeline = Pipeline(chunks, groups.pipeline, schedule, micro_batches, torch.device("cpu"), shape, torch.float64)
    sums: list[Tensor] = []
    traffic.take()
    for step in range(STEPS):
        batches = [batch_of(family, 1000 * step + i) for i in range(micro_batches)]
        pipeline.step(loss_function(batches, chunks[0][1], sums))
    sent, bubble = traffic.take()[0], pipeline.bubble()
    for _, model in chunks:
        model.eval()
    batches = evaluation_batches(family, chunks[0][1])
    scores = pipeline.evaluate(batches, score, lambda batch: (*batch["tokens"].shape, HIDDEN))
    gradients = {name: p.grad for _, model in chunks for name, p in model.named_parameters()}
    return {"gradients": gradients, "sums": sums, "scores": scores, "sent": sent, "bubble": bubble}


LEAST = {"1f1b": 1, "dualpipev": 2}
"""Least micro-batches for each pipeline rank; 1 in all where not said."""


def cases_for(size: int, family: str) -> list[Case]:
    """The fewest micro-batches a schedule takes, a middling and a larger number (BERT: the larger one); layers that do not
    divide evenly."""
    cases: list[Case] = []
    for schedule, facts in SCHEDULES.items():
        many = 2 * size + (facts.virtual_stages is not None)
        counts = {LEAST[schedule] * size if schedule in LEAST else 1, many} if family == "gpt" else {many}
        if size == 2 and family == "gpt":
            counts.add(max(counts) - 1 if facts.virtual_stages else size)
        for virtual in [facts.virtual_stages] if facts.virtual_stages else chosen([3, 2], 2) if size == 2 else [2]:
            layers = size * virtual + (3 if size == 2 else 1)
            cases += [(family, schedule, layers, virtual, m) for m in sorted(counts)]
    return cases


@pytest.mark.parametrize(("size", "family"), [(2, "gpt"), (4, "gpt"), *chosen([(2, "bert"), (4, "bert")], 2)])
def test_equals_one_process(size: int, family: str) -> None:
    cases = cases_for(size, family)
    ranks = run_ranks(pipelined, size, size, cases)
    for case, results in zip(cases, zip(*ranks, strict=True), strict=True):
        compare(serial(case[0], case[2], case[4]), list(results), case)


def compare(expected: dict[str, Any], results: list[dict[str, Any]], case: Case) -> None:
    gradients = {name: g for result in results for name, g in result["gradients"].items()}
    assert gradients.keys() == expected["gradients"].keys(), case
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-10, atol=1e-12, msg=f"{case} {name}")
    for key in ("sums", "scores"):
        (found,) = [result[key] for result in results if result[key]]
        torch.testing.assert_close(torch.stack(found), torch.stack(expected[key]), rtol=1e-10, atol=1e-10)


def test_bytes_and_bubble() -> None:
    """Each hidden state goes up and its gradient down, once a step."""
    cases: list[Case] = [("gpt", "1f1b", 2, 1, 4), ("gpt", "interleaved_1f1b", 4, 2, 4), ("gpt", "zbv", 4, 2, 4)]
    hidden = B * S * HIDDEN * 8
    for case, (first, second) in zip(cases, zip(*run_ranks(pipelined, 2, 2, cases), strict=True), strict=True):
        schedule, micro_batches = case[1], case[4]
        # up and down over every border between ranks; the V form turns round inside a rank
        borders = {"1f1b": (1, 1), "interleaved_1f1b": (3, 3), "zbv": (2, 2)}[schedule]
        assert (first["sent"], second["sent"]) == tuple(n * hidden * micro_batches * STEPS for n in borders), case
        for busy, whole in (first["bubble"], second["bubble"]):
            assert 0 < busy < whole


def sharded(rank: int, mesh: Mesh, cases: list[tuple[Case, int]]) -> list[dict[str, Any]]:
    groups = make_groups(mesh, rank, "cpu", Traffic())
    return [one_sharded_case(groups, case, zero) for case, zero in cases]


def one_sharded_case(groups: Any, case: Case, zero: int) -> dict[str, Any]:
    """Data rank r takes every micro-batch whose number is r modulo their number; chunks are under FSDP2."""
    family, schedule, layers, virtual, micro_batches = case
    chunks, data = chunks_of(groups, config_for(family, layers), schedule, virtual), groups.data
    for _, model in chunks:
        shard(model, groups, zero, "fp64", False, lambda module, name: None)
    device, shape = torch.device("cpu"), (B, S, HIDDEN)
    pipeline = Pipeline(chunks, groups.pipeline, schedule, micro_batches, device, shape, torch.float64, zero=zero)
    sums: list[Tensor] = []
    data.traffic.take()
    for step in range(STEPS):
        batches = [batch_of(family, 1000 * step + i) for i in range(micro_batches * data.size)]
        run = loss_function(batches, chunks[0][1], sums)
        pipeline.step(lambda chunk, i, x, run=run: run(chunk, i * data.size + data.rank, x))
    sent, gradients = data.traffic.take()[0], {}
    for _, model in chunks:
        for name, p in model.named_parameters():
            gradient: Any = p.grad
            if isinstance(gradient, DTensor):
                gradient = gradient.full_tensor()
            else:
                dist.all_reduce(gradient, group=data.process_group)
            gradients[name] = gradient
    scores = pipeline.evaluate(evaluation_batches(family, chunks[0][1]), score, lambda b: (*b["tokens"].shape, HIDDEN))
    return {"gradients": gradients, "scores": scores, "sent": sent}


@pytest.mark.parametrize("mesh", [Mesh(pipeline=2, shard=2), Mesh(pipeline=2, replicate=2, shard=2)])
def test_zero_in_a_pipeline(mesh: Mesh) -> None:
    """Stages 1 to 3 are exact under every schedule; 2 and 3 reduce gradients with every micro-batch."""
    replicated = mesh.replicate > 1
    held = {schedule: virtual_stages(schedule) for schedule in (["zbv"] if replicated else SCHEDULES)}
    cases: list[Case] = [("bert", s, 2 * v + 1, v, 4) for s, v in held.items()]
    all_three = {"1f1b", "zbv"} if not replicated or ALL else set()
    both = [(case, zero) for case in cases for zero in ((1, 2, 3) if case[1] in all_three else chosen((3, 1), 2))]
    ranks = run_ranks(sharded, mesh.world_size, mesh, both)
    sent: dict[tuple[str, int], int] = {}
    for (case, zero), results in zip(both, zip(*ranks, strict=True), strict=True):
        expected = serial(case[0], case[2], case[4] * mesh.data_ranks)
        gradients = {name: g for result in results for name, g in result["gradients"].items()}
        for name, gradient in expected["gradients"].items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-10, atol=1e-12, msg=f"{case} {zero} {name}")
        sent[case[1], zero] = results[0]["sent"]
    for schedule in all_three & set(held):
        assert sent[schedule, 1] < sent[schedule, 2] <= sent[schedule, 3], schedule


def most_held(rank: int, micro_batches: int) -> int:
    groups = make_groups(Mesh(pipeline=2), rank, "cpu", Traffic())
    chunks = chunks_of(groups, config_for("gpt", 2), "1f1b", 1)
    device, shape = torch.device("cpu"), (B, S, HIDDEN)
    pipeline = Pipeline(chunks, groups.pipeline, "1f1b", micro_batches, device, shape, torch.float64)
    run = loss_function([batch_of("gpt", i) for i in range(micro_batches)], chunks[0][1], [])
    (stage,) = pipeline._stages
    held = []

    def counted(chunk: Any, micro_batch: int, x: Tensor | None) -> Tensor:
        held.append(sum(info.buffer.numel() > 0 for i in range(micro_batches) for info in stage._received(i)))
        return run(chunk, micro_batch, x)

    for _ in range(STEPS):
        pipeline.step(counted)
    return max(held)


def test_received_hidden_states_do_not_pile_up() -> None:
    """1F1B holds as many as there are ranks after this one, however many micro-batches a step has."""
    assert run_ranks(most_held, 2, 8) == [0, 1]
