"""The formulas of heads and small encoders are those of the modules: parameters, their shapes, and FLOPs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from disttrain import costs, memory
from disttrain.config.schema import ModelConfig
from disttrain.models import build_model
from tests.parallel.test_tasks import MODELS, SHAPE

MORE = {
    "gpt tag, attention": {"family": "gpt", "head": "tag", "top_attention_heads": 4},
    "plain rnn": {"family": "rnn", "head": "classify", "cell": "rnn", "embedding_size": 7, "bidirectional": False},
}
ALL = MODELS | MORE


def model_of(name: str) -> ModelConfig:
    return ModelConfig.model_validate({**SHAPE, "dropout": 0.0, **ALL[name]})


@pytest.mark.parametrize("name", ALL)
def test_shapes_and_counts(name: str) -> None:
    config = model_of(name)
    real = {key: tuple(p.shape) for key, p in build_model(config, 0, device="meta").named_parameters()}
    assert memory.parameter_shapes(config, range(config.layers)) == real
    assert costs.parameter_count(config).total == sum(torch.Size(shape).numel() for shape in real.values())


@pytest.mark.parametrize("name", [n for n in ALL if ALL[n]["family"] != "rnn"])
def test_flops_are_those_that_torch_counts(name: str) -> None:
    config, length = model_of(name), SHAPE["max_positions"]
    model = build_model(config, 0, device="meta").eval()  # where attention counts, too
    tokens = torch.ones(1, length, dtype=torch.int64, device="meta")
    batch = {"tokens": tokens, "token_types": tokens * 0, "attention_mask": tokens.bool()}
    with FlopCounterMode(display=False) as counter:
        model.forward_batch(batch)
    assert costs.forward_flops_per_sequence(config, length, causal=False).total == counter.get_total_flops()


def test_flops_of_a_recurrent_network_by_hand() -> None:
    """Torch counts none. A GRU: 3 gates of 16 units that read 16 and 16 numbers, 12 words; then 16 features to 5 classes."""
    flops = costs.forward_flops_per_sequence(model_of("ghm"), 12, causal=False)
    assert flops.block_linears == 2 * 12 * 3 * 16 * (16 + 16)
    assert flops.head == 2 * 16 * 5
