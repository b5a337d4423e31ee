"""int8 layers multiply the whole numbers they say; training rounds to the same."""

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disttrain.model_compression import int8
from disttrain.model_compression.int8 import BYTE_STEPS, Bounds, Int8Embedding, Int8Linear
from disttrain.models.rounding import INPUT_STEPS, WEIGHT_STEPS, round_in_training, rounded_rows
from tests.unit.model_compression.test_structured import batch_of, model_of, weights_of


def layer(outputs: int, inputs: int, bias: bool = True) -> tuple[nn.Linear, dict[str, Tensor]]:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias)
    with torch.no_grad():
        linear.weight[0] = 0  # a row of zeros has scale 1
    return linear, int8.quantize({name: p.detach() for name, p in linear.named_parameters()})


def test_weights_are_rounded_to_the_nearest_step_of_their_row() -> None:
    found = int8.quantize({"w": torch.tensor([[1.27, -0.634, 0.0, 0.004], [0.0, 0.0, 0.0, 0.0]]), "b": torch.ones(2)})
    assert found["w"].tolist() == [[127, -63, 0, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(found["w.scale"], torch.tensor([0.01, 1.0]))
    assert torch.equal(found["b"], torch.ones(2))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_dynamic_products_are_those_of_whole_numbers(bias: bool, rows: int) -> None:
    """In int64 and float64; the largest sums of two products of bytes occur, which 16 bits would not hold at 8 bits."""
    linear, found = layer(24, 40, bias)
    x = torch.randn(rows, 5, 40)
    x[0, 0] = 1.0
    x[0, 1] = 0.0
    module = Int8Linear(found["weight"], found["weight.scale"], found.get("bias"), None)
    scale = x.abs().amax(-1, keepdim=True) / INPUT_STEPS
    scale[scale == 0] = 1
    whole = (x / scale).round().long() @ found["weight"].long().T
    expected = whole.double() * scale.double() * found["weight.scale"].double() + (
        found["bias"].double() if bias else 0
    )
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(module(x), F.linear(x, linear.weight, linear.bias), rtol=0, atol=0.06)


def test_static_products_are_those_of_whole_numbers() -> None:
    """What is beyond the bounds takes the nearest of them."""
    _, found = layer(24, 40)
    x = torch.randn(7, 40) + 0.5
    bounds = Bounds(-1.0, 2.0)
    step = 3.0 / BYTE_STEPS
    module = Int8Linear(found["weight"], found["weight.scale"], found["bias"], bounds)
    inputs = (x / step).round().long().add(bounds.zero).clamp(0, BYTE_STEPS)
    whole = (inputs - bounds.zero) @ found["weight"].long().T
    expected = whole.double() * step * found["weight.scale"].double() + found["bias"].double()
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-6)
    assert Bounds(0.0, 0.0).step == 1.0 and bounds.zero == 42


def test_sums_do_not_overflow() -> None:
    """127 x 127 many times over, of both signs."""
    weight = torch.ones(16, 512)
    weight[8:] = -1
    found = int8.quantize({"weight": weight})
    for bounds in (None, Bounds(0.0, 1.0)):
        module = Int8Linear(found["weight"], found["weight.scale"], None, bounds)
        torch.testing.assert_close(module(torch.ones(4, 512)), 512 * weight.sign()[:, 0].expand(4, -1))


def test_rows_of_embeddings() -> None:
    weight = torch.randn(11, 6)
    found = int8.quantize({"weight": weight})
    ids = torch.tensor([[1, 1], [10, 0]])
    got = Int8Embedding(found["weight"], found["weight.scale"])(ids)
    assert torch.equal(got, rounded_rows(weight, WEIGHT_STEPS)[ids])


@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_a_dynamic_model_is_the_one_that_was_trained_with_rounding(family: str) -> None:
    """Up to float32's order of sums: a value at the border of two steps may go either way."""
    model, batch = model_of(family).float(), batch_of()
    found = int8.int8_model(model.config, int8.quantize(weights_of(model)), {})
    batch = model.prepare_batch(batch)
    whole, small = (sum(losses(m, batch).values()) for m in (model, found))
    round_in_training(model)
    rounded = sum(losses(model, batch).values())
    assert small == pytest.approx(rounded, rel=2e-3)
    assert abs(small - rounded) < abs(small - whole) or small == pytest.approx(whole, rel=2e-3)
    assert small == pytest.approx(whole, rel=0.1)


def test_calibration_sees_every_layer_and_zero() -> None:
    model, batch = model_of("gpt").float(), batch_of()
    bounds = int8.calibrate(model, [batch, batch_of(1)])
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert bounds.keys() == names
    assert all(b.low <= 0 <= b.high and 0 <= b.zero <= BYTE_STEPS for b in bounds.values())
    seen = []
    model.blocks["0"].mlp.up.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0]))
    with torch.no_grad():
        model.scores(batch)
        model.scores(batch_of(1))
    assert bounds["blocks.0.mlp.up"].high == float(torch.cat(seen).max())
    found = int8.int8_model(model.config, int8.quantize(weights_of(model)), bounds)
    assert losses(found, batch)["lm"] == pytest.approx(losses(model, batch)["lm"], rel=0.1)
    with pytest.raises(ValueError, match="at least one"):
        int8.calibrate(model, [])


def losses(model, batch: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(loss.sum.detach()) for name, loss in model.loss(dict(batch)).items()}


def test_rounding_is_torchs_and_its_gradient_the_identitys() -> None:
    """Against fake_quantize_per_channel_affine, whose gradient is the identity within the bounds, where all is here."""
    x = torch.randn(5, 9, requires_grad=True)
    mine = rounded_rows(x, 127)
    scale = x.detach().abs().amax(1) / 127
    theirs = torch.fake_quantize_per_channel_affine(x, scale, torch.zeros(5, dtype=torch.int32), 0, -127, 127)
    torch.testing.assert_close(mine, theirs)
    weights = torch.randn(5, 9)
    torch.testing.assert_close(*(torch.autograd.grad((y * weights).sum(), x)[0] for y in (mine, theirs)))


@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_training_with_rounding_reaches_every_weight(family: str) -> None:
    model = model_of(family)
    round_in_training(model)
    sum(loss.sum for loss in model.loss(batch_of()).values()).backward()  # pyright: ignore
    lonely = {n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())}
    assert all(name.endswith("qkv.bias") for name in lonely)
