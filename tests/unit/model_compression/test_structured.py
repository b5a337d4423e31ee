"""What leaves the model had no effect, so nothing changes; what matters is what the loss says."""

from typing import Any

import pytest
import torch
from torch import Tensor

from disttrain.config.presets import shape_of
from disttrain.config.schema import ModelConfig
from disttrain.model_compression.importance import Importance, by_magnitude, by_taylor
from disttrain.model_compression.structured import Kept, choose, shrink, shrunk_config
from disttrain.models import Model, build_model

FAMILIES = ("gpt", "bert")
V = 37


def model_of(family: str, **values: Any) -> Model:
    """Three layers of four heads of 4, float64, with weights large enough to matter."""
    shape = {"layers": 3, "hidden_size": 16, "heads": 4, "ffn_hidden_size": 12, "max_positions": 8, "vocab_size": V}
    config = ModelConfig.model_validate({"family": family, "layer_norm_epsilon": 1e-5, **shape, **values})
    model = build_model(config, seed=3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.eval()


def batch_of(seed: int = 0) -> dict[str, Tensor]:
    tokens = torch.randint(0, V, (2, 8), generator=torch.Generator().manual_seed(seed))
    return {"tokens": tokens, "targets": tokens.roll(-1, 1), "token_types": torch.zeros_like(tokens),
            "attention_mask": torch.ones_like(tokens, dtype=torch.bool), "next_sentence": torch.tensor([0, 1])}  # fmt: skip


def loss_of(model: Model, batch: dict[str, Tensor]) -> Tensor:
    return torch.stack([loss.sum / loss.count for loss in model.loss(batch).values()]).sum()


def weights_of(model: Model) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.state_dict().items() if name not in model.tied}


def loaded(config: ModelConfig, weights: dict[str, Tensor]) -> Model:
    model = build_model(config, seed=9, dtype=torch.float64)
    assert {n: v.shape for n, v in weights_of(model).items()} == {n: v.shape for n, v in weights.items()}
    model.load_state_dict(weights, strict=False)
    return model.eval()


KEPT = Kept([0, 2], {0: [1, 3], 2: [0, 2]}, {0: [0, 1, 5, 11], 2: [2, 3, 4, 9]})


def without(model: Model, kept: Kept) -> None:
    """The same model, in place, in which everything else gives zero."""
    size = model.blocks["0"].attn.head_size
    with torch.no_grad():
        for number, block in model.blocks.items():
            heads, neurons = kept.heads.get(int(number), []), kept.neurons.get(int(number), [])
            for head in set(range(4)) - set(heads):
                block.attn.out.weight[:, head * size : (head + 1) * size] = 0
            for neuron in set(range(12)) - set(neurons):
                block.mlp.down.weight[:, neuron] = 0
            if int(number) not in kept.layers:
                block.attn.out.bias.zero_()
                block.mlp.down.bias.zero_()


@pytest.mark.parametrize("family", FAMILIES)
def test_removing_what_gives_zero_changes_nothing(family: str) -> None:
    """Of a BERT no layer goes: its norms, which come after the sum, would go with it."""
    model = model_of(family)
    kept = KEPT if family == "gpt" else Kept([0, 1, 2], {**KEPT.heads, 1: [2, 3]}, {**KEPT.neurons, 1: [0, 5, 6, 7]})
    without(model, kept)
    config = shrunk_config(model.config, kept)
    small = loaded(config, shrink(model.config, weights_of(model), kept))
    assert (config.heads, config.head_size, config.ffn_hidden_size, config.layers) == (2, 4, 4, len(kept.layers))
    assert shape_of(config).attention_size == 8 < config.hidden_size
    for one, other in zip(small.loss(batch_of()).values(), model.loss(batch_of()).values(), strict=True):
        torch.testing.assert_close(one.sum, other.sum, rtol=1e-12, atol=1e-12)


def test_all_heads_leave_the_size_open() -> None:
    model = model_of("gpt")
    kept = Kept([1], {1: [0, 1, 2, 3]}, {1: list(range(12))})
    config = shrunk_config(model.config, kept)
    assert config.head_size is None and config.layers == 1
    assert torch.equal(shrink(model.config, weights_of(model), kept)["blocks.0.mlp.up.weight"],
                       model.blocks["1"].mlp.up.weight)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_taylor_is_the_derivative_by_a_gate(family: str) -> None:
    """Central differences of the loss by a factor on one head's, neuron's or layer's output."""
    model, batch = model_of(family), batch_of()
    found, step = by_taylor(model, [batch]), 1e-5

    def derivative(tensors: list[Tensor]) -> float:
        kept, losses = [t.clone() for t in tensors], []
        with torch.no_grad():
            for factor in (1 + step, 1 - step):
                for tensor, value in zip(tensors, kept, strict=True):
                    tensor.copy_(value * factor)
                losses.append(float(loss_of(model, batch)))
            for tensor, value in zip(tensors, kept, strict=True):
                tensor.copy_(value)
        return abs(losses[0] - losses[1]) / (2 * step)

    out, down = model.blocks["1"].attn.out, model.blocks["1"].mlp.down
    head = [out.weight.detach()[:, 8:12]]
    assert float(found.heads[1, 2]) == pytest.approx(derivative(head), rel=1e-5, abs=1e-9)
    assert float(found.neurons[1, 5]) == pytest.approx(derivative([down.weight.detach()[:, 5]]), rel=1e-5, abs=1e-9)
    layer = [t.detach() for t in (out.weight, out.bias, down.weight, down.bias)]
    assert float(found.layers[1]) == pytest.approx(derivative(layer), rel=1e-5, abs=1e-9)
    assert all(p.grad is None for p in model.parameters())


def test_taylor_is_the_mean_over_batches() -> None:
    model = model_of("gpt")
    one, other = (by_taylor(model, [batch_of(seed)]) for seed in (0, 1))
    both = by_taylor(model, [batch_of(0), batch_of(1)])
    torch.testing.assert_close(both.heads, (one.heads + other.heads) / 2, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="at least one"):
        by_taylor(model, [])


def test_magnitude_is_a_norm_of_the_parts_weights() -> None:
    model = model_of("gpt")
    found, block = by_magnitude(model.config, weights_of(model)), model.blocks["2"]
    rows = slice(1 * 3 * 4, 2 * 3 * 4)
    parts = [block.attn.qkv.weight[rows], block.attn.qkv.bias[rows], block.attn.out.weight[:, 4:8]]
    assert float(found.heads[2, 1]) == pytest.approx(float(torch.cat([p.flatten() for p in parts]).norm()), rel=1e-12)
    parts = [block.mlp.up.weight[7], block.mlp.up.bias[7:8], block.mlp.down.weight[:, 7]]
    assert float(found.neurons[2, 7]) == pytest.approx(float(torch.cat(parts).norm()), rel=1e-12)
    parts = [block.attn.out.weight, block.attn.out.bias, block.mlp.down.weight, block.mlp.down.bias]
    assert float(found.layers[2]) == pytest.approx(float(torch.cat([p.flatten() for p in parts]).norm()), rel=1e-12)


def test_the_most_important_stay_in_their_order() -> None:
    config = model_of("gpt").config
    importance = Importance(
        torch.tensor([[4.0, 1, 3, 2], [1, 1, 1, 1], [0, 5, 6, 0]]),
        torch.arange(36.0).view(3, 12),
        torch.tensor([2.0, 1.0, 3.0]),
    )
    kept = choose(config, importance, layers=2, heads=2, neurons=3)
    assert kept == Kept([0, 2], {0: [0, 2], 2: [1, 2]}, {0: [9, 10, 11], 2: [9, 10, 11]})
    assert choose(config, importance, 3, 1, 12).heads == {0: [0], 1: [0], 2: [2]}  # of equals the first
    with pytest.raises(ValueError, match="5 heads cannot stay of 4"):
        choose(config, importance, 3, 5, 12)
