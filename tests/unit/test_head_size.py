"""Heads that are narrower together than the model: shapes, FLOPs, memory, checks and the planner follow."""

from math import prod
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from disttrain import costs, memory
from disttrain.config.checks import validate
from disttrain.config.load import load
from disttrain.config.presets import shape_of
from disttrain.config.schema import ModelConfig
from disttrain.models import build_model
from disttrain.parallel.collectives import Traffic
from disttrain.parallel.groups import Group
from disttrain.parallel.tensor import apply_tensor_parallel
from tests.unit.test_costs import random_batch

FAMILIES = ("gpt", "bert")


def model_of(family: str, **values: Any) -> ModelConfig:
    """Two heads of eight where hidden_size has room for three."""
    shape = {"layers": 2, "hidden_size": 24, "heads": 2, "head_size": 8, "ffn_hidden_size": 20, "max_positions": 16,
             "vocab_size": 61}  # fmt: skip
    return ModelConfig.model_validate({"family": family, "layer_norm_epsilon": 1e-5, **shape, **values})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tensor", [1, 2])
def test_shapes_and_counts_are_those_of_the_model(family: str, tensor: int) -> None:
    config = model_of(family)
    model = build_model(config, 0, device="meta")
    assert sum(p.numel() for p in model.parameters()) == costs.parameter_count(config).total
    apply_tensor_parallel(model, Group(tensor, 0, tuple(range(tensor)), None, Traffic()), sequence=False)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert memory.parameter_shapes(config, range(2), tensor=tensor) == expected
    assert expected["blocks.0.attn.qkv.weight"] == (48 // tensor, 24)
    assert sum(map(prod, memory.parameter_shapes(config, range(2)).values())) == costs.parameter_count(config).total


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_equal_the_flop_counter(family: str) -> None:
    config, predicted = model_of(family), 5
    model = build_model(config, 0)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.loss(random_batch(config, 3, 16, predicted))
    expected = costs.forward_flops_per_sequence(config, 16, causal=False, predicted_tokens=predicted)
    assert counter.get_total_flops() == 3 * expected.total


def test_activations_are_smaller_by_the_heads() -> None:
    """Query, key, value and the input of out: 4 c E of each token and block; the log-sum-exp is of the heads alone."""
    whole, narrow = (costs.activation_bytes(model_of("gpt", heads=heads), 16, 2, "fp32") for heads in (3, 2))
    tokens, blocks = 32, 2
    assert whole.saved - narrow.saved == blocks * tokens * (4 * 4 * 8 + 4)


def test_the_default_is_the_whole_width() -> None:
    assert shape_of(model_of("gpt", heads=3, head_size=None)).head_size == 8
    assert shape_of(model_of("gpt", heads=3)).attention_size == 24


def test_heads_need_not_divide_the_width_where_their_size_is_given() -> None:
    words = ["model.hidden_size=128", "model.heads=3", "train.steps=100"]
    assert [p for p in validate(load("configs/gpt_tiny.yaml", words), 1) if "model.heads=3" in p.settings]
    assert not validate(load("configs/gpt_tiny.yaml", [*words, "model.head_size=32"]), 1)
