"""Initial weights depend on the seed and the parameter's name, and on nothing else."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from disttrain.config.schema import ModelConfig
from disttrain.models import FAMILIES, build_model, initial_value, initialise


def config(family: str, **changes: Any) -> ModelConfig:
    shape = {"layers": 8, "hidden_size": 64, "heads": 4, "ffn_hidden_size": 256, "max_positions": 32, "vocab_size": 300}
    return ModelConfig.model_validate({"family": family, "layer_norm_epsilon": 1e-5, **shape, **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics(family: str):
    for name, p in build_model(config(family), seed=7).named_parameters():
        if name.endswith("bias"):
            assert p.count_nonzero() == 0, name
        elif name.endswith("norm.weight"):
            assert (p == 1).all(), name
        else:
            into_residual = name.endswith(("attn.out.weight", "mlp.down.weight"))
            std = 0.02 / math.sqrt(2 * 8) if family == "gpt" and into_residual else 0.02
            error = 5 / math.sqrt(p.numel())  # five standard errors
            assert abs(p.mean().item()) < error * std, name
            assert p.std().item() == pytest.approx(std, rel=error), name


def test_every_parameter_has_its_own_draw():
    model = build_model(config("gpt"), seed=0)
    draws = [p.flatten()[:4].tolist() for n, p in model.named_parameters() if p.ndim == 2]
    scales = [p.flatten()[0] / p.flatten()[1] for n, p in model.named_parameters() if p.ndim == 2]
    assert len({tuple(d) for d in draws}) == len({s.item() for s in scales}) == len(draws)


@pytest.mark.parametrize("family", FAMILIES)
def test_seeds_differ_and_repeat(family: str):
    def state(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(3)  # the global generator plays no part
        return build_model(config(family), seed).state_dict()

    first, again, other = state(1), state(1), state(2)
    for name, value in first.items():
        assert torch.equal(value, again[name])
        drawn = value.ndim == 2
        assert torch.equal(value, other[name]) != drawn, name


@pytest.mark.parametrize("family", FAMILIES)
def test_dtype_and_layout_do_not_matter(family: str):
    whole = build_model(config(family), seed=5).state_dict()
    double = build_model(config(family), seed=5, dtype=torch.float64).state_dict()
    assert all(double[n].dtype == torch.float64 and torch.equal(double[n], whole[n].double()) for n in whole)

    with torch.device("meta"):
        stage = FAMILIES[family](config(family))
    stage.embed = None  # the last stage: its decoder has no embedding beside it, and must still equal it
    del stage.blocks["0"], stage.blocks["3"]
    stage.to_empty(device="cpu")
    initialise(stage, seed=5)
    state = stage.state_dict()
    assert "head.decoder.weight" in state and "blocks.1.mlp.up.weight" in state
    assert all(torch.equal(value, whole[name]) for name, value in state.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_and_embedding_are_one_parameter(family: str):
    for device in ("cpu", "meta"):
        model = build_model(config(family), seed=0, device=device)
        assert model.head is not None and model.embed is not None
        assert model.head.decoder.weight is model.embed.tokens.weight
    model = build_model(config(family), seed=0)
    assert model.head is not None and model.embed is not None
    model.to_empty(device="cpu")
    model.head.decoder.weight = nn.Parameter(model.head.decoder.weight.detach().clone())
    initialise(model, seed=0)
    assert model.head.decoder.weight is model.embed.tokens.weight


def test_values_are_the_same_in_every_release():
    """A changed draw would change every run of a given seed: change these numbers knowingly only."""
    value = initial_value(config("gpt"), "blocks.1.attn.qkv.weight", torch.Size((192, 64)), seed=1234)
    torch.testing.assert_close(
        value[0, :4], torch.tensor([-0.01567428, -0.008405291, 0.031350978, -0.044808436]), atol=1e-7, rtol=0
    )
