"""Every optimizer by the formulas of its paper, in float64; what it keeps; and that it finds a minimum."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from disttrain import memory, preflight
from disttrain.capabilities import missing
from disttrain.config.checks import validate
from disttrain.config.load import dump, with_values
from disttrain.config.optimizer import OptimConfig, OptimizerName
from disttrain.config.optimizer_checks import READ_BY
from disttrain.config.schema import Config, ModelConfig
from disttrain.models import build_model
from disttrain.optim import Adafactor, begin, build_optimizer, in_parts, learning_rate
from disttrain.optim.muon import COEFFICIENTS, Muon, orthogonal

SHAPES = {
    "blocks.0.attn.qkv.weight": (12, 4), "blocks.0.mlp.up.weight": (6, 4), "blocks.0.mlp.down.weight": (4, 6),
    "embed.tokens.weight": (7, 4), "blocks.0.mlp.up.bias": (6,),
}  # fmt: skip
HEADS, STEPS, RATE = 2, 8, 0.05
DECAY = 0.3


def parameters_of(dtype: torch.dtype = torch.float64) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return {name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
            for name, shape in SHAPES.items()}  # fmt: skip


def gradients_of(step: int) -> dict[str, Tensor]:
    """Of very different sizes; rows that never have a gradient, as tokens that never come, among them."""
    generator = torch.Generator().manual_seed(step)
    found = {name: torch.randn(shape, generator=generator, dtype=torch.float64) * 0.2**number
             for number, (name, shape) in enumerate(SHAPES.items())}  # fmt: skip
    found["embed.tokens.weight"][5:] = 0
    return found


def trained(config: OptimConfig, steps: int = STEPS, dtype: torch.dtype = torch.float64) -> dict[str, nn.Parameter]:
    parameters = parameters_of(dtype)
    optimizer = build_optimizer(config, parameters.items(), heads=HEADS)
    advance(optimizer, parameters, range(1, steps + 1))
    return parameters


def advance(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        for name, gradient in gradients_of(step).items():
            parameters[name].grad = gradient.to(parameters[name].dtype)
        optimizer.step()


Kept = dict[str, Any]


def sgd(w: Tensor, g: Tensor, t: int, c: OptimConfig, s: Kept) -> Tensor:
    s["m"] = c.running * s.get("m", 0) + g
    return w - c.lr * (g + c.running * s["m"] if c.looks_ahead else s["m"])


def adagrad(w: Tensor, g: Tensor, t: int, c: OptimConfig, s: Kept) -> Tensor:
    s["v"] = s.get("v", 0) + g**2
    return w - c.lr * g / (s["v"].sqrt() + c.epsilon)


def rmsprop(w: Tensor, g: Tensor, t: int, c: OptimConfig, s: Kept) -> Tensor:
    s["v"] = c.alpha * s.get("v", 0) + (1 - c.alpha) * g**2
    s["a"] = c.alpha * s.get("a", 0) + (1 - c.alpha) * g
    below = (s["v"] - s["a"] ** 2 if c.centered else s["v"]).sqrt() + c.epsilon
    s["m"] = c.running * s.get("m", 0) + g / below
    return w - c.lr * s["m"]


def moments(g: Tensor, t: int, c: OptimConfig, s: Kept) -> tuple[Tensor, Tensor]:
    s["m"] = c.beta1 * s.get("m", 0) + (1 - c.beta1) * g
    s["v"] = c.beta2 * s.get("v", 0) + (1 - c.beta2) * g**2
    return s["m"] / (1 - c.beta1**t), s["v"] / (1 - c.beta2**t)


def adam(w: Tensor, g: Tensor, t: int, c: OptimConfig, s: Kept) -> Tensor:
    m, v = moments(g, t, c, s)
    return w - c.lr * m / (v.sqrt() + c.epsilon)


def radam(w: Tensor, g: Tensor, t: int, c: OptimConfig, s: Kept) -> Tensor:
    """Algorithm 2; epsilon is added where torch adds it, to the root before it is corrected."""
    m, _ = moments(g, t, c, s)
    most = 2 / (1 - c.beta2) - 1
    now = most - 2 * t * c.beta2**t / (1 - c.beta2**t)
    if now <= 5:
        return w - c.lr * m
    r = math.sqrt((now - 4) * (now - 2) * most / ((most - 4) * (most - 2) * now))
    return w - c.lr * r * m * math.sqrt(1 - c.beta2**t) / (s["v"].sqrt() + c.epsilon)


def adafactor(w: Tensor, g: Tensor, t: int, c: OptimConfig, s: Kept) -> Tensor:
    """Algorithm 4 (5 for vectors), decayed and bounded as in torch. `w` is decayed already, so the size is of before."""
    beta, square = 1 - t**-0.8, g**2 + 1e-30
    if w.ndim > 1:
        s["r"] = beta * s.get("r", 0) + (1 - beta) * square.sum(1, keepdim=True)
        s["c"] = beta * s.get("c", 0) + (1 - beta) * square.sum(0, keepdim=True)
        v = s["r"] @ s["c"] / s["r"].sum()
    else:
        v = s["v"] = beta * s.get("v", 0) + (1 - beta) * square
    update = g / v.sqrt().clamp(min=c.epsilon)
    before = w / (1 - c.lr * (c.weight_decay if w.ndim > 1 else 0))
    size, clipped = max(1e-3, rms(before)), update / max(1.0, rms(update))
    return w - size * min(c.lr, t**-0.5) * clipped


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def by_singular_values(matrix: Tensor, steps: int) -> Tensor:
    """The polynomial on each singular value."""
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    values = values / matrix.norm()
    for _ in range(steps):
        values = sum(k * values ** (2 * i + 1) for i, k in enumerate(COEFFICIENTS))
    return u @ torch.diag(values) @ v


FORMULAS: dict[str, tuple[Callable[..., Tensor], bool, list[dict[str, Any]]]] = {
    "sgd": (sgd, False, [{}, {"momentum": 0.0}, {"nesterov": True, "momentum": 0.8}]),
    "adagrad": (adagrad, False, [{}]),
    "rmsprop": (rmsprop, False, [{}, {"momentum": 0.9, "centered": True, "alpha": 0.9}, {"centered": True}]),
    "adam": (adam, False, [{}, {"implementation": "foreach"}]),
    "adamw": (adam, True, [{}]),
    "radam": (radam, True, [{}, {"beta2": 0.6}]),
    "adafactor": (adafactor, True, [{}, {"lr": 0.9}]),
}
"""Formula, whether decay is decoupled, and settings to try."""


@pytest.mark.parametrize("name", FORMULAS)
def test_updates_are_the_papers(name: Any) -> None:
    formula, decoupled, tried = FORMULAS[name]
    for settings in tried:
        config = OptimConfig(**{"name": name, "lr": RATE, "weight_decay": DECAY, **settings})
        found = trained(config)
        for parameter, weight in parameters_of().items():
            w, kept, decay = weight.detach(), {}, DECAY * (weight.ndim > 1)
            for t in range(1, STEPS + 1):
                g = gradients_of(t)[parameter]
                w = w * (1 - config.lr * decay) if decoupled else w
                w = formula(w, g if decoupled else g + decay * w, t, config, kept)
            torch.testing.assert_close(
                found[parameter].detach(), w, rtol=1e-10, atol=1e-12, msg=f"{settings} {parameter}"
            )


def test_muon_steps_on_hidden_weights_and_adamw_on_the_rest() -> None:
    config = OptimConfig(name="muon", lr=RATE, weight_decay=DECAY)
    found, adamw = trained(config), trained(OptimConfig(lr=RATE, weight_decay=DECAY))
    for parameter, weight in parameters_of().items():
        if not parameter.startswith("blocks.") or weight.ndim < 2:
            torch.testing.assert_close(found[parameter].detach(), adamw[parameter].detach(), rtol=1e-12, atol=1e-12)
            continue
        w, m = weight.detach(), torch.zeros_like(weight)
        for t in range(1, STEPS + 1):
            g = gradients_of(t)[parameter]
            m = 0.95 * m + 0.05 * g
            update = 0.95 * m + 0.05 * g
            if "qkv" in parameter:  # rows are head 0's query, key, value (two each), then head 1's
                rows = torch.arange(12).view(2, 3, 2)
                o, size = torch.zeros_like(update), 4
                for each in range(3):
                    mine = rows[:, each].flatten()
                    o[mine] = by_singular_values(update[mine], 5)
            else:
                o, size = by_singular_values(update, 5), 6
            w = w * (1 - RATE * DECAY) - RATE * 0.2 * math.sqrt(size) * o
        torch.testing.assert_close(found[parameter].detach(), w, rtol=1e-9, atol=1e-11, msg=parameter)


def test_muon_is_torchs_but_for_bfloat16() -> None:
    """torch orthogonalises in bfloat16: the same to a few hundredths of an update."""
    ours, theirs = (
        {"blocks.0.mlp.up.weight": parameters_of(torch.float32)["blocks.0.mlp.up.weight"]} for _ in range(2)
    )
    mine = build_optimizer(OptimConfig(name="muon", lr=RATE, weight_decay=DECAY), ours.items())
    other = torch.optim.Muon(theirs.values(), RATE, DECAY, adjust_lr_fn="match_rms_adamw")
    for optimizer, parameters in ((mine, ours), (other, theirs)):
        parameters["blocks.0.mlp.up.weight"].grad = gradients_of(1)["blocks.0.mlp.up.weight"].float()
        optimizer.step()
    apart = (next(iter(ours.values())) - next(iter(theirs.values()))).detach().abs().max()
    assert 0 < float(apart) < 0.05 * RATE * 0.2 * math.sqrt(6)


def test_nearly_orthogonal() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((8, 5), (5, 8), (6, 6)):
        matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
        values = torch.linalg.svdvals(orthogonal(matrix, 10))
        assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    assert torch.equal(orthogonal(torch.zeros(3, 2), 5), torch.zeros(3, 2))


def test_adafactor_is_torchs() -> None:
    ours, theirs = parameters_of(), parameters_of()
    groups = [{"params": [p for p in theirs.values() if p.ndim > 1], "weight_decay": DECAY},
              {"params": [p for p in theirs.values() if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
    advance(
        build_optimizer(OptimConfig(name="adafactor", lr=RATE, weight_decay=DECAY), ours.items()), ours, range(1, 9)
    )
    advance(torch.optim.Adafactor(groups, RATE, eps=(1e-8, 1e-3)), theirs, range(1, 9))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name].detach(), weight.detach(), rtol=1e-12, atol=1e-12)


def test_adafactor_takes_small_gradients_in_float32() -> None:
    """A row without a gradient beside one of 1e-12: neither NaN nor zero."""
    weight = nn.Parameter(torch.ones(3, 2))
    optimizer = Adafactor([{"params": [weight]}], 0.1, 1e-30)
    weight.grad = torch.tensor([[0.0, 0.0], [1e-12, -1e-12], [1.0, 2.0]])
    optimizer.step()
    assert bool(weight.isfinite().all()) and torch.equal(weight[0], torch.ones(2))
    assert bool(weight[1, 0] < 1 < weight[1, 1])


@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_finds_the_minimum_of_a_quadratic(name: Any) -> None:
    """Curvatures from 1 to 9, the minimum known; the learning rate falls to nothing."""
    rate = {"adagrad": 0.8, "muon": 0.2}.get(name, 0.05)
    config = OptimConfig(name=name, lr=rate, weight_decay=0.0, schedule="linear", min_lr_ratio=0.0)
    parameters = {n: nn.Parameter(torch.full(shape, 0.5, dtype=torch.float64)) for n, shape in SHAPES.items()}
    minimum = {
        n: torch.linspace(0.2, 1.1, p.numel(), dtype=torch.float64).view_as(p).flip(0) for n, p in parameters.items()
    }
    optimizer = build_optimizer(config, parameters.items(), heads=HEADS)
    for step in range(1, 151):
        for n, p in parameters.items():
            curvature = torch.linspace(1, 9, p.numel(), dtype=torch.float64).view_as(p)
            p.grad = curvature * (p.detach() - minimum[n])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, 150)
        optimizer.step()
    for n, p in parameters.items():
        torch.testing.assert_close(p.detach(), minimum[n], rtol=0, atol=1e-2, msg=f"{name} {n}")


VARIANTS = [
    *({"name": name} for name in get_args(OptimizerName)), {"name": "sgd", "momentum": 0.0},
    {"name": "rmsprop", "momentum": 0.5, "centered": True},
]  # fmt: skip


@pytest.mark.parametrize("values", VARIANTS, ids=str)
def test_state_is_what_is_predicted(values: dict[str, Any]) -> None:
    """What a first step keeps of a model: the names of the config, the bytes of `memory`; and `begin` makes just that."""
    shape = ModelConfig(layers=2, hidden_size=16, heads=4, ffn_hidden_size=24, max_positions=8, vocab_size=19,
                        layer_norm_epsilon=1e-5)  # fmt: skip
    config = Config(model=shape, optim=OptimConfig(**values))
    made = []
    for stepped in (True, False):
        model = build_model(shape, 1)
        optimizer = build_optimizer(config.optim, model.named_parameters(), heads=4)
        if stepped:
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
        else:
            begin(optimizer)
        made.append({n: {k: v.shape for k, v in optimizer.state[p].items()} for n, p in model.named_parameters()})
        sizes = [v for state in optimizer.state.values() for v in state.values() if v.ndim]
        assert sum(v.nbytes for v in sizes) == memory.optimizer_bytes(config, "fp32", 2, True, True, 1)
        names = {k for state in optimizer.state.values() for k, v in state.items() if v.ndim}
        assert names == set(config.optim.state)
        for p in model.parameters():
            assert all(v.shape == p.shape for k, v in optimizer.state[p].items() if in_parts(k, v))
    assert made[0] == made[1]
    weights = sum(p.nbytes for p in build_model(shape, 1).parameters())
    assert memory.checkpoint_bytes(config, "fp32") == weights + sum(v.nbytes for v in sizes)


def test_muon_knows_its_matrices() -> None:
    model = build_model(ModelConfig(family="bert", layers=1, hidden_size=8, heads=2, ffn_hidden_size=16, max_positions=8,
                                    vocab_size=19, layer_norm_epsilon=1e-5), 1)  # fmt: skip
    optimizer = build_optimizer(OptimConfig(name="muon"), model.named_parameters(), heads=2)
    assert isinstance(optimizer, Muon)
    names = {p: n for n, p in model.named_parameters()}
    found = {names[p] for group in optimizer.param_groups if group["orthogonal"] for p in group["params"]}
    assert found == {f"blocks.0.{n}.weight" for n in ("attn.qkv", "attn.out", "mlp.up", "mlp.down")}


BASE = Config.model_validate({"train": {"steps": 5}})


def refused(**values: Any) -> list[tuple[str, ...]]:
    return [problem.settings for problem in validate(with_values(BASE, {"optim": OptimConfig(**values)}), 1)]


def test_settings_of_another_optimizer_are_refused() -> None:
    values = {"beta1": 0.5, "beta2": 0.5, "epsilon": 1e-6, "momentum": 0.7, "nesterov": True, "alpha": 0.5,
              "centered": True, "ns_steps": 7, "implementation": "foreach"}  # fmt: skip
    assert set(values) == set(READ_BY)
    for key, readers in READ_BY.items():
        for name in get_args(OptimizerName):
            found = refused(**{"name": name, key: values[key]})
            assert [s[0].split("=")[0] for s in found] == ([] if name in readers else [f"optim.{key}"]), (key, name)


def test_nesterov_needs_momentum() -> None:
    assert refused(name="sgd", nesterov=True) == []
    assert refused(name="sgd", nesterov=True, momentum=0.0) == [("optim.nesterov=true", "optim.momentum=0.0")]


def test_a_run_goes_on_with_its_own_kind_of_optimizer(tmp_path: Path) -> None:
    """adamw and lamb keep the same; sgd without momentum keeps less than with it; an older config says nothing of it."""
    before = with_values(BASE, {"optim": OptimConfig(name="sgd")})
    (tmp_path / "config.yaml").write_text(dump(before))

    def found(folder: Path, **values: Any) -> list[tuple[str, ...]]:
        now = with_values(BASE, {"optim": OptimConfig(**values)})
        return [problem.settings for problem in preflight._changed(now, folder)]

    assert found(tmp_path, name="sgd", lr=1.0, nesterov=True) == []
    where = f"{tmp_path}/config.yaml has optim.name=sgd"
    assert found(tmp_path, name="sgd", momentum=0.0) == [("optim.name=sgd", where)]
    assert found(tmp_path, name="muon") == [("optim.name=muon", where)]
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.yaml").write_text(dump(before).split("optim:")[0])
    assert found(old, name="lamb") == []


@pytest.mark.parametrize("engine", ["deepspeed", "horovod"])
def test_other_engines_say_why_not(engine: str) -> None:
    for name in get_args(OptimizerName):
        problems = missing(with_values(BASE, {"engine": engine, "optim": OptimConfig(name=name)}))
        assert (problems == []) == (name == "adamw")
        assert all(f"engine {engine} cannot do optim.name={name}: it " in p.message for p in problems)
