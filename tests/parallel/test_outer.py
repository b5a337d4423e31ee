"""Local SGD, DiLoCo and Adasum: as many engines of one process each, and the outer steps done by hand, give the same."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from disttrain import checkpoint
from disttrain.config.load import with_values
from disttrain.config.schema import Config
from disttrain.engines.native import NativeEngine
from disttrain.grad_compression.adasum import adasum
from disttrain.verify.gathering import Gathering
from tests.chosen import chosen
from tests.parallel.test_data_parallel import BATCH, config_for, global_batch, make_engine
from tests.ranks import run_ranks

STEPS = 7
LAYOUTS = {
    "dp2": (2, {}),
    "dp4": (4, {}),
    "dp2.mb2": (2, {"train.micro_batch_size": 2}),
    "tp2.dp2": (4, {"parallel.tensor": 2}),
    "tp2.sp.dp2": (4, {"parallel.tensor": 2, "parallel.sequence": True}),
    "pp2.dp2": (4, {"parallel.pipeline": 2, "data.sequence_length": 16, "train.micro_batch_size": 2}),
    "dp4.zero1.rep2": (4, {"parallel.zero": 1, "parallel.replicate": 2}),
    "dp4.zero2.rep2.mb1": (4, {"parallel.zero": 2, "parallel.replicate": 2, "train.micro_batch_size": 1}),
    "dp4.zero3.rep2": (4, {"parallel.zero": 3, "parallel.replicate": 2}),
    "cp2.zero1.rep2": (4, {"parallel.context": 2, "parallel.zero": 1, "parallel.replicate": 2}),
}
METHODS = {
    "average": {"outer.method": "average", "outer.every": 2},
    "nesterov": {"outer.method": "nesterov", "outer.every": 3},
    "streaming": {"outer.method": "nesterov", "outer.every": 3, "outer.fragments": 3, "outer.overlap": 1},
    "adasum": {"outer.method": "adasum", "outer.every": 1},
}


def outer_config(method: str, **values) -> Config:
    return config_for("gpt", **{"train.steps": STEPS, **METHODS[method], **values})


def share_of(batch: dict, config: Config, worker: int, workers: int, part: int = 0, parts: int = 1) -> list[dict]:
    """Micro-batches of one data rank: part `part` of a worker's share."""
    share = BATCH // workers // parts
    size, start = config.train.micro_batch_size or share, (worker * parts + part) * share
    return [{k: v[i : i + size] for k, v in batch.items()} for i in range(start, start + share, size)]


def advance(engine: NativeEngine, config: Config, rank: int, steps: range, rate: float = 1e-2) -> list:
    mesh, found = engine.groups.mesh, []
    for step in steps:
        mine = share_of(global_batch("gpt", step), config, mesh.data_rank(rank), mesh.data_ranks)
        result = engine.step(mine, step, rate)
        loss = result.losses["loss"] if "loss" in result.losses else next(iter(result.losses.values()))
        found.append((float(loss.sum / loss.count), float(result.grad_norm), int(result.tokens)))
    return found


def outer_weights(engine: NativeEngine) -> dict[str, torch.Tensor]:
    """Whole outer weights on rank 0, which all workers must have alike."""
    assert engine._outer is not None
    held = [(p.shard, engine._outer.weight[p.shard.name]) for p in engine.parameters]
    gathering = Gathering(held, engine.groups)
    flat = {"all": gathering.flat(held)}
    found = gathering.bring(None, flat, flat)
    assert not found.apart["all"]
    return found.whole.get("all", {})


def train(rank: int, config: Config, world: int) -> dict:
    engine = make_engine(config, rank, world)
    curve = advance(engine, config, rank, range(1, STEPS + 1))
    scores = engine.evaluate([global_batch("gpt", 99)])
    weights = outer_weights(engine)
    own = {p.shard.name: p.master for p in engine.parameters}
    assert engine._outer is not None
    alike = all(torch.equal(own[name], weight) for name, weight in engine._outer.weight.items())
    return {"curve": curve, "weights": weights, "alike": alike, "traffic": engine.traffic(),
            "scores": {name: float(score.sum / score.count) for name, score in scores.items()}}  # fmt: skip


class Simulation:
    """The same without any of `disttrain.parallel.outer`: one engine for each worker, in one process."""

    def __init__(self, config: Config, workers: int):
        plain = with_values(config_for("gpt"), {"train.micro_batch_size": config.train.micro_batch_size})
        self.config, self.outer = config, config.outer
        self.engines = [make_engine(plain, 0, 1) for _ in range(workers)]
        self.weights = {p.shard.name: p.master.detach().clone() for p in self.engines[0].parameters}
        self.momentum = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self.on_their_way: list[tuple[int, str, torch.Tensor]] = []

    def offset(self, name: str) -> int:
        number = (int(name.split(".")[1]) + 1) % self.outer.fragments if name.startswith("blocks.") else 0
        return number * self.outer.every // self.outer.fragments

    def meet(self, name: str) -> torch.Tensor:
        changes = [self.weights[name] - _own(engine, name) for engine in self.engines]
        return _adasum(changes) if self.outer.method == "adasum" else torch.stack(changes).mean(0)

    def arrive(self, name: str, change: torch.Tensor, kept: float) -> None:
        lr = 1.0
        if self.outer.method == "nesterov":
            self.momentum[name] = self.outer.momentum * self.momentum[name] + change
            change, lr = change + self.outer.momentum * self.momentum[name], self.outer.lr
        self.weights[name] = self.weights[name] - lr * change
        for engine in self.engines:
            own = _own(engine, name)
            own.copy_(kept * own + (1 - kept) * self.weights[name])

    def work(self, step: int) -> tuple[float, float, int]:
        batch, workers = global_batch("gpt", step), len(self.engines)
        results = [engine.step(share_of(batch, self.config, worker, workers), step, 1e-2)
                   for worker, engine in enumerate(self.engines)]  # fmt: skip
        losses = [next(iter(result.losses.values())) for result in results]
        loss = sum(float(x.sum) for x in losses) / sum(float(x.count) for x in losses)
        norm = torch.stack([result.grad_norm for result in results]).square().mean().sqrt()
        return loss, float(norm), sum(int(result.tokens) for result in results)

    @torch.no_grad()
    def after(self, step: int) -> None:
        last = step == STEPS
        for _, name, change in [each for each in self.on_their_way if last or each[0] == step]:
            self.arrive(name, change, 0.0 if last else self.outer.mixing)
        self.on_their_way = [each for each in self.on_their_way if each[0] > step and not last]
        for name in self.weights:
            due = last or step % self.outer.every == self.offset(name)
            if due and (last or not self.outer.overlap):
                self.arrive(name, self.meet(name), 0.0)
            elif due:
                self.on_their_way.append((step + self.outer.overlap, name, self.meet(name)))


def simulate(rank: int, config: Config, workers: int) -> dict:
    simulation, curve = Simulation(config, workers), []
    for step in range(1, STEPS + 1):
        curve.append(simulation.work(step))
        simulation.after(step)
    scores = simulation.engines[0].evaluate([global_batch("gpt", 99)])  # all have the outer weights after the last step
    return {"curve": curve, "weights": simulation.weights,
            "scores": {name: float(score.sum / score.count) for name, score in scores.items()}}  # fmt: skip


def _own(engine: NativeEngine, name: str) -> torch.Tensor:
    return next(p.master.detach() for p in engine.parameters if p.shard.name == name)


def _adasum(vectors: list[torch.Tensor]) -> torch.Tensor:
    """Maleki et al. 2021, section 3.2."""
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=False)
        rest = vectors[len(vectors) - len(vectors) % 2 :]
        vectors = [_adasum_of_two(a, b) for a, b in pairs] + rest
    return vectors[0]


def _adasum_of_two(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    both, aa, bb = float((a * b).sum()), float((a * a).sum()), float((b * b).sum())
    return a * (1 - both / (2 * aa) if aa else 1.0) + b * (1 - both / (2 * bb) if bb else 1.0)


@pytest.mark.parametrize(("method", "layout"), chosen([
    *(("streaming", layout) for layout in LAYOUTS), ("nesterov", "dp4"), ("nesterov", "tp2.dp2"), ("average", "dp4"),
    ("average", "pp2.dp2"), ("adasum", "dp4"), ("adasum", "dp2.mb2"), ("adasum", "tp2.sp.dp2"), ("adasum", "pp2.dp2"),
], 3))  # fmt: skip
def test_workers_and_outer_steps_are_those_done_by_hand(method: str, layout: str) -> None:
    world, values = LAYOUTS[layout]
    config = outer_config(method, **values)
    found = run_ranks(train, world, config, world)
    workers = 4 if layout == "dp4" else 2
    by_hand = run_ranks(simulate, 1, config, workers)[0]
    for rank in found:
        assert rank["alike"]
        torch.testing.assert_close(rank["curve"], by_hand["curve"], rtol=1e-10, atol=1e-10)
        assert rank["scores"] == pytest.approx(by_hand["scores"], rel=1e-10)
    for name, weight in by_hand["weights"].items():
        torch.testing.assert_close(found[0]["weights"][name], weight, rtol=1e-10, atol=1e-10)


def combine(rank: int, world: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    from disttrain.mesh import build_mesh
    from disttrain.parallel.collectives import GroupLink, Traffic
    from disttrain.parallel.groups import make_groups

    groups = make_groups(build_mesh(config_for("gpt").parallel, world), rank, "cpu", Traffic())
    generator = torch.Generator().manual_seed(rank)
    vectors = [torch.randn(n, generator=generator, dtype=torch.float64) for n in (1, 7, 64, 3)]
    vectors[3].zero_()

    def total(products: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(products)
        return products

    return vectors, adasum(vectors, GroupLink(groups.data), total)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_adasum_of_any_number_of_ranks(world: int) -> None:
    found = run_ranks(combine, world, world)
    for i in range(4):
        expected = _adasum([vectors[i] for vectors, _ in found])
        for _, combined in found:
            torch.testing.assert_close(combined[i], expected, rtol=1e-12, atol=1e-12)
            assert torch.equal(combined[i], found[0][1][i])


def test_adasum_counts_once_what_is_the_same_and_adds_what_is_not() -> None:
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 2.0])
    torch.testing.assert_close(_adasum_of_two(a, a), a)
    torch.testing.assert_close(_adasum_of_two(a, b), a + b)


def plain_run(rank: int, config: Config, world: int) -> dict:
    engine = make_engine(config, rank, world)
    advance(engine, config, rank, range(1, STEPS + 1))
    return {p.shard.name: p.master.detach().clone() for p in engine.parameters}


def test_one_worker_that_averages_is_plain_training() -> None:
    alone = run_ranks(plain_run, 1, outer_config("average"), 1)[0]
    plain = run_ranks(plain_run, 1, config_for("gpt"), 1)[0]
    for name, weight in plain.items():
        torch.testing.assert_close(alone[name], weight, rtol=1e-9, atol=1e-11)


def save_and_go_on(rank: int, config: Config, world: int, folder: Path, at: int) -> dict:
    engine = make_engine(config, rank, world)
    advance(engine, config, rank, range(1, at + 1))
    state = engine.state_dict()
    checkpoint.save(folder, at, state, {"step": at, "engine": state.pop("engine")}, keep=2)
    curve = advance(engine, config, rank, range(at + 1, STEPS + 1))
    return {"weights": outer_weights(engine), "curve": curve}


def load_and_go_on(rank: int, config: Config, world: int, path: Path, at: int) -> dict:
    engine = make_engine(with_values(config, {"run.seed": 999}), rank, world)
    engine.config = config
    if engine._compressor is not None:
        engine._compressor._seed = config.run.seed
    state = engine.to_fill(lambda: checkpoint.shapes(path))
    trainer = checkpoint.load(path, state)
    engine.load_state_dict({**state, "engine": trainer["engine"]})
    curve = advance(engine, config, rank, range(at + 1, STEPS + 1))
    return {"weights": outer_weights(engine), "curve": curve}


@pytest.mark.parametrize(("method", "layout", "values"), [
    ("nesterov", "dp2", {}),
    ("streaming", "dp2", {}),
    ("streaming", "pp2.dp2", {}),
    ("streaming", "dp2", {"compression.codec": "int4", "compression.min_elements": 100}),
    ("streaming", "dp4.zero3.rep2", {"compression.codec": "topk", "compression.min_elements": 100}),
])  # fmt: skip
def test_resume_within_a_round_is_bit_exact(tmp_path: Path, method: str, layout: str, values: dict) -> None:
    at = 4
    world, where = LAYOUTS[layout]
    config = outer_config(method, **{**where, **values, "precision": "fp32"})
    undisturbed = run_ranks(save_and_go_on, world, config, world, tmp_path, at)
    resumed = run_ranks(load_and_go_on, world, config, world, tmp_path / f"step_{at:08d}", at)
    for before, after in zip(undisturbed, resumed, strict=True):
        assert before["curve"] == after["curve"]
    for name, weight in undisturbed[0]["weights"].items():
        assert torch.equal(resumed[0]["weights"][name], weight)


@pytest.mark.parametrize(("before", "after"), chosen([
    ("dp2", "tp2.dp2"), ("tp2.dp2", "dp2"), ("dp2", "dp4.zero3.rep2"), ("dp4.zero2.rep2.mb1", "dp2"), ("pp2.dp2", "dp2"),
    ("dp2", "pp2.dp2"),
], 3))  # fmt: skip
def test_as_many_workers_of_another_layout_go_on_alike(tmp_path: Path, before: str, after: str) -> None:
    (world, values), (later_world, later) = LAYOUTS[before], LAYOUTS[after]
    config = outer_config("streaming", **values)
    undisturbed = run_ranks(save_and_go_on, world, config, world, tmp_path, 5)[0]
    config = outer_config("streaming", **later)
    resumed = run_ranks(load_and_go_on, later_world, config, later_world, tmp_path / "step_00000005", 5)[0]
    for name, weight in undisturbed["weights"].items():
        torch.testing.assert_close(resumed["weights"][name], weight, rtol=1e-10, atol=1e-10)


def look(rank: int, config: Config, world: int, path: Path) -> tuple[int, torch.Tensor]:
    engine = make_engine(config, rank, world)
    state = engine.to_fill(lambda: checkpoint.shapes(path))
    trainer = checkpoint.load(path, state)
    engine.load_state_dict({**state, "engine": trainer["engine"]})
    return rank, _own(engine, "blocks.1.mlp.up.weight").clone()


def test_other_numbers_of_workers_take_means_or_copies(tmp_path: Path) -> None:
    config = outer_config("nesterov")
    run_ranks(save_and_go_on, 4, config, 4, tmp_path, 5)
    saved = dict(run_ranks(look, 4, config, 4, tmp_path / "step_00000005"))
    fewer = dict(run_ranks(look, 2, config, 2, tmp_path / "step_00000005"))
    more = dict(run_ranks(look, 8, config, 8, tmp_path / "step_00000005"))
    for rank, weight in fewer.items():
        torch.testing.assert_close(weight, (saved[rank] + saved[rank + 2]) / 2)
    for rank, weight in more.items():
        assert torch.equal(weight, saved[rank % 4])


@pytest.mark.parametrize(("codec", "layout"), [
    ("bf16", "dp4"), ("int4", "tp2.dp2"), ("sign", "pp2.dp2"), ("topk", "dp4"), ("powersgd", "tp2.dp2"),
    ("powersgd", "pp2.dp2"),
])  # fmt: skip
def test_coded_changes_are_the_same_on_all_workers(codec: str, layout: str) -> None:
    world, values = LAYOUTS[layout]
    coded = {"compression.codec": codec, "compression.min_elements": 100, "compression.rank": 2}
    found = run_ranks(train, world, outer_config("nesterov", **values, **coded), world)
    assert all(rank["alike"] for rank in found)
    handed, uncompressed, _ = found[0]["traffic"]
    assert handed < uncompressed


def overflowing(rank: int, config: Config, world: int) -> list[tuple[bool, float]]:
    engine = make_engine(config, rank, world)
    found = []
    for step in range(1, 4):
        mine = share_of(global_batch("gpt", step), config, rank, world)
        handle = None
        if step == 2 and rank == 1:
            parameter = next(p for p in engine.parameters if p.shard.name == "blocks.1.mlp.up.weight").parameter
            handle = parameter.register_hook(lambda gradient: gradient * float("inf"))
        result = engine.step(mine, step, 1e-2)
        if handle is not None:
            handle.remove()
        found.append((result.skipped, engine.scale.value))
    return found


def test_an_overflow_of_one_worker_skips_the_step_of_all() -> None:
    config = outer_config("nesterov", **{"precision": "fp16", "loss_scale.initial": 1024.0})
    first, second = run_ranks(overflowing, 2, config, 2)
    assert first == second == [(False, 1024.0), (True, 512.0), (False, 512.0)]


def test_between_meetings_nothing_large_travels() -> None:
    config = outer_config("average", **{"outer.every": 100})
    found = run_ranks(train, 2, config, 2)[0]
    parameters = sum(weight.nbytes for weight in found["weights"].values())
    handed, _, _ = found["traffic"]
    assert parameters <= handed < 1.05 * parameters + 2000  # once, at the end
