"""1-bit Adam and 1-bit LAMB: the papers' recursion, the freeze, bytes, skips, resume."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from disttrain import checkpoint, memory
from disttrain.config.load import with_values
from disttrain.config.schema import ONE_BIT, CompressionConfig, Config
from disttrain.engines.native import NativeEngine
from disttrain.grad_compression.carriage import joined
from disttrain.grad_compression.codecs import Sign
from disttrain.mesh import build_mesh
from disttrain.optim import OneBitLamb
from tests.chosen import chosen
from tests.parallel.test_data_parallel import config_for, global_batch, make_engine
from tests.parallel.test_grad_compression import advance, load_and_go_on, residuals, save_and_go_on
from tests.ranks import disagreeing, gathered, run_ranks

WARMUP, STEPS, RATE = 2, 6, 1e-3
LAYOUTS = {
    "dp2": (2, {}),
    "dp4.mb1": (4, {"train.micro_batch_size": 1}),
    "tp2.dp2": (4, {"parallel.tensor": 2}),
    "pp2.dp2": (4, {"parallel.pipeline": 2, "data.sequence_length": 16, "train.micro_batch_size": 2}),
    "cp2": (2, {"parallel.context": 2}),
}


def one_bit(codec: str, **values) -> Config:
    return config_for("gpt", **{
        "compression.codec": codec, "compression.min_elements": 100, "compression.warmup_steps": WARMUP,
        "optim.name": ONE_BIT[codec], "optim.weight_decay": 0.1, **values,  # pyright: ignore[reportArgumentType]
    })  # fmt: skip


def by_the_paper(rank: int, config: Config, workers: int, buckets: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    """1-bit Adam (Tang et al. 2021, algorithm 1) with so many workers on one process, in the terms of means.

    As here and not there: what the second coding loses is kept with the worker's own error; moments are corrected for
    their bias; weights decay; parameters that are not coded send gradients. A code of x is (1 - beta1) / workers times that
    of what the engine codes, which makes the same float32 scales.
    """
    engine = make_engine(config, rank, 1)  # for its gradients alone
    weights = {p.shard.name: p.master for p in engine.parameters}
    b1, b2, eps = config.optim.beta1, config.optim.beta2, config.optim.epsilon
    momentum = {name: torch.zeros_like(w) for name, w in weights.items()}
    variance = {name: torch.zeros_like(w) for name, w in weights.items()}
    errors = [{name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(workers)]
    for step in range(1, STEPS + 1):
        each = worker_gradients(engine, step, workers)
        mean = {name: torch.stack([g[name] for g in each]).mean(0) for name in weights}
        if step <= WARMUP:
            momentum = {name: b1 * m + (1 - b1) * mean[name] for name, m in momentum.items()}
            variance = {name: b2 * v + (1 - b2) * mean[name].square() for name, v in variance.items()}
        else:
            sent = [{name: b1 * momentum[name] + (1 - b1) * g[name] for name in weights} for g in each]
            momentum = {name: b1 * m + (1 - b1) * mean[name] for name, m in momentum.items()}
            for names in buckets:
                inputs = [[(s[n] + e[n]).flatten() for n in names] for s, e in zip(sent, errors, strict=True)]
                whole, lost = coded_mean(inputs, (1 - b1) * workers)
                momentum |= {n: x.view_as(weights[n]) for n, x in zip(names, whole, strict=True)}
                for e, left in zip(errors, lost, strict=True):
                    e |= {n: x.view_as(weights[n]) for n, x in zip(names, left, strict=True)}
        with torch.no_grad():
            for name, w in weights.items():
                m, v = momentum[name] / (1 - b1**step), variance[name] / (1 - b2 ** min(step, WARMUP))
                w *= 1 - RATE * (config.optim.weight_decay if w.ndim > 1 else 0)
                w -= RATE * m / (v.sqrt() + eps) * (v > 0)
    return {name: w.detach().clone() for name, w in weights.items()}


def worker_gradients(engine: NativeEngine, step: int, workers: int) -> list[dict[str, Tensor]]:
    """What each worker would put into the mean: its part of the batch's gradient times the number of workers."""
    batch = {k: torch.from_numpy(v) for k, v in global_batch("gpt", step).items()}
    share, count = len(batch["tokens"]) // workers, int((batch["targets"] != -100).sum())
    found = []
    for worker in range(workers):
        mine = {k: v[worker * share : (worker + 1) * share] for k, v in batch.items()}
        (engine.chunks[0].model.loss(mine, 0.0)["lm"].sum / count * workers).backward()
        found.append({p.shard.name: p.parameter.grad for p in engine.parameters})
        for p in engine.parameters:
            p.parameter.grad = None
    return found


def coded_mean(inputs: list[list[Tensor]], unit: float) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Each worker's code of all, their mean in chunks, each coded again by one worker; and what each has lost."""
    codec, workers = Sign(), len(inputs)

    def code(x: Tensor) -> Tensor:
        """What comes out."""
        generator = torch.Generator()
        return codec.decode(codec.encode(x / unit, generator, False), x.shape[1], x.dtype, generator) * unit

    rows = [joined(vectors, workers * codec.block).view(workers, -1) for vectors in inputs]
    codes = [code(x) for x in rows]
    left = [x - c for x, c in zip(rows, codes, strict=True)]
    mean = torch.stack(codes).mean(0)
    again = torch.cat([code(chunk) for chunk in mean.split(1)])
    for worker in range(workers):
        left[worker][worker] += (mean - again)[worker] * workers
    sizes = [x.numel() for x in inputs[0]]
    sizes.append(rows[0].numel() - sum(sizes))
    return list(again.view(-1).split(sizes)[:-1]), [list(x.view(-1).split(sizes)[:-1]) for x in left]


def trained(rank: int, config: Config, world: int) -> dict:
    """Weights, what the ranks disagree in, bytes of each step, and names in the buckets in which the last one coded them."""
    engine = make_engine(config, rank, world)
    buckets: list[list[str]] = []
    if engine._compressor is not None:
        carried = engine._compressor._carried

        def noted(names, inputs):
            buckets.append(list(names))
            return carried(names, inputs)

        engine._compressor._carried = noted
    traffic = []
    for step in range(1, STEPS + 1):
        buckets.clear()
        advance(engine, config, rank, range(step, step + 1), RATE)
        traffic.append(engine.traffic())
    return {"apart": disagreeing(engine, "weight"), "traffic": traffic, "buckets": buckets,
            "weights": gathered(engine, "weight")}  # fmt: skip


@pytest.mark.parametrize("workers", [2, 4])
def test_it_is_the_papers_recursion(workers: int) -> None:
    config = one_bit("onebit_adam", **{"train.clip_grad_norm": None})
    found = run_ranks(trained, workers, config, workers)[0]
    (expected,) = run_ranks(by_the_paper, 1, config, workers, found["buckets"])
    assert sum(map(len, found["buckets"])) >= 8
    for name, weight in expected.items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("codec", ONE_BIT)
def test_bytes_and_warm_up(codec: str) -> None:
    """Whole gradients and the plain optimizer's weights up to the freeze, a bit an element after it."""
    config = one_bit(codec)
    found = run_ranks(trained, 2, config, 2)[0]
    plain_config = with_values(config, {"compression": CompressionConfig()})
    plain = run_ranks(trained, 2, plain_config, 2)[0]
    for step in range(STEPS):
        sent, whole = found["traffic"][step], plain["traffic"][step]
        assert sent.uncompressed == whole.uncompressed == whole.handed
        if step < WARMUP:
            assert (sent.handed, sent.on_wire) == (whole.handed, whole.on_wire)
        else:
            assert sent.on_wire < 0.2 * whole.on_wire  # vectors are whole, and there are few matrices
    if codec == "onebit_adam":  # 1-bit LAMB bounds its coefficients
        started, expected = (run_ranks(warmed, 2, c, 2)[0] for c in (config, plain_config))
        assert all(torch.equal(started[name], weight) for name, weight in expected.items())


def warmed(rank: int, config: Config, world: int) -> dict[str, Tensor]:
    """Weights at the freeze."""
    engine = make_engine(config, rank, world)
    advance(engine, config, rank, range(1, WARMUP + 1), RATE)
    return gathered(engine, "weight")


@pytest.mark.parametrize("codec", ONE_BIT)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_agree_and_it_learns(codec: str, layout: str) -> None:
    """Beside what `test_nothing_is_lost_but_late` shows: over the freeze, with updates."""
    world, values = LAYOUTS[layout]
    found = run_ranks(trained, world, one_bit(codec, **values), world)[0]
    assert found["apart"] == []
    assert all(weight.isfinite().all() for weight in found["weights"].values())


@pytest.mark.parametrize(
    ("codec", "layout", "warmup"),
    chosen(
        [
            (codec, layout, warmup)
            for warmup in (2, 3, 4)
            for codec, layout in (("onebit_adam", "dp2"), ("onebit_lamb", "tp2.dp2"), ("onebit_adam", "pp2.dp2"))
        ],
        3,
    ),
)
def test_resume_is_bit_exact(tmp_path: Path, codec: str, layout: str, warmup: int) -> None:
    """Saved after step 3 and gone on to step 5: with the freeze before, between and after."""
    world, values = LAYOUTS[layout]
    config = one_bit(codec, **{**values, "compression.warmup_steps": warmup, "precision": "fp32"})
    undisturbed, late = run_ranks(save_and_go_on, world, config, world, tmp_path)[0]
    weights, loaded = run_ranks(load_and_go_on, world, config, world, tmp_path / "step_00000003")[0]
    assert any(float(residual.abs().max()) > 0 for residual in late.values()) == (warmup < 3)
    for name, residual in late.items():
        assert torch.equal(loaded[name], residual)
    for name, weight in undisturbed.items():
        assert torch.equal(weights[name], weight)


def loaded_and_saved(rank: int, config: Config, world: int, path: Path, folder: Path) -> dict[str, Tensor]:
    """Residuals' sums, whole, on rank 0, of what is loaded, saved again, and gone on with."""
    engine = make_engine(config, rank, world)
    state = engine.to_fill(lambda: checkpoint.shapes(path))
    trainer = checkpoint.load(path, state)
    engine.load_state_dict({**state, "engine": trainer["engine"]})
    late, state = residuals(engine), engine.state_dict()
    checkpoint.save(folder, 3, state, {"step": 3, "engine": state.pop("engine")}, keep=2)
    advance(engine, config, rank, range(4, 6))
    return late


@pytest.mark.parametrize("layout", chosen(["pp2.dp2", "dp2", "dp4.mb1", "tp2.dp2"], 2))
def test_what_is_frozen_reaches_another_layout(tmp_path: Path, layout: str) -> None:
    config, (world, values) = one_bit("onebit_lamb", **LAYOUTS["tp2.dp2"][1]), LAYOUTS[layout]
    _, late = run_ranks(save_and_go_on, 4, config, 4, tmp_path / "before")[0]
    path, config = tmp_path / "before" / "step_00000003", one_bit("onebit_lamb", **values)
    loaded = run_ranks(loaded_and_saved, world, config, world, path, tmp_path / "after")[0]
    before, after = (
        {name: tensor for name, tensor in checkpoint.read(folder).items() if name.startswith("optimizer.")}
        for folder in (path, tmp_path / "after" / "step_00000003")
    )
    assert {name.rsplit(".", 1)[1] for name in before} == {"step", "exp_avg", "exp_avg_sq", *OneBitLamb.MORE}
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    for name in late.keys() - {"embed.tokens.weight"}:
        torch.testing.assert_close(loaded[name], late[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("codec", ONE_BIT)
def test_weights_of_another_codec_go_on_frozen(tmp_path: Path, codec: str) -> None:
    """A checkpoint without what these optimizers keep, loaded after the freeze, and the other way round."""
    config = one_bit(codec)
    plain = with_values(config, {"compression": CompressionConfig()})
    for before, then in ((plain, config), (config, plain)):
        folder = tmp_path / before.compression.codec
        run_ranks(save_and_go_on, 2, before, 2, folder)
        weights, _ = run_ranks(load_and_go_on, 2, then, 2, folder / "step_00000003")[0]
        assert all(weight.isfinite().all() for weight in weights.values())


def skipping(rank: int, config: Config, world: int, spoiled: float) -> dict:
    """A step after the freeze in which one element on one rank is not finite."""
    engine = make_engine(config, rank, world)
    advance(engine, config, rank, range(1, WARMUP + 2), RATE)
    before = snapshot(engine)
    parameter = next(p for p in engine.parameters if p.shard.name == "blocks.1.mlp.up.weight").parameter

    def spoil(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[0, 0] = spoiled
        return gradient

    handle = parameter.register_hook(spoil) if rank == world - 1 else None
    share = config.train.global_batch_size // world
    batch = {k: v[rank * share : (rank + 1) * share] for k, v in global_batch("gpt", 4).items()}
    result = engine.step([batch], WARMUP + 2, RATE)
    if handle is not None:
        handle.remove()
    after = snapshot(engine)
    same = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    return {"skipped": result.skipped, "same": same, "then": engine.step([batch], WARMUP + 3, RATE).skipped}


def snapshot(engine: NativeEngine) -> dict[str, Tensor]:
    assert engine._compressor is not None
    found = {f"residual {name}": residual.clone() for name, residual in engine._compressor.residual.items()}
    for p in engine.parameters:
        found |= {f"{key} {p.shard.name}": value.clone() for key, value in engine.optimizer.state[p.master].items()}
        found[f"weight {p.shard.name}"] = p.master.detach().clone()
    return found


@pytest.mark.parametrize("spoiled", [float("inf"), float("nan")])
@pytest.mark.parametrize("codec", ONE_BIT)
def test_a_skipped_step_leaves_everything_as_it_was(codec: str, spoiled: float) -> None:
    config = one_bit(codec, **{"precision": "fp16", "loss_scale.initial": 1024.0})
    for found in run_ranks(skipping, 2, config, 2, spoiled):
        assert found == {"skipped": True, "same": True, "then": False}


def optimizer_bytes(rank: int, config: Config, world: int) -> int:
    engine = make_engine(config, rank, world)
    advance(engine, config, rank, range(1, WARMUP + 2), RATE)
    states = (engine.optimizer.state[p.master] for p in engine.parameters)
    return sum(value.nbytes for state in states for value in state.values() if value.ndim)


@pytest.mark.parametrize("codec", ONE_BIT)
def test_memory_is_predicted(codec: str) -> None:
    config = one_bit(codec)
    predicted = memory.predict(config, build_mesh(config.parallel, 2), "fp64", 1)[0].state.optimizer
    assert run_ranks(optimizer_bytes, 2, config, 2)[0] == predicted
