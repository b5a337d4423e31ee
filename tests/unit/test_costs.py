"""Formulas against the models themselves: parameters counted, FLOPs and saved bytes measured."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from disttrain import costs, memory
from disttrain.config.presets import PRESETS
from disttrain.config.schema import Config, ModelConfig
from disttrain.models import build_model

SHAPES: list[dict[str, Any]] = [
    {"layers": 2, "hidden_size": 32, "heads": 4, "ffn_hidden_size": 128, "max_positions": 64, "vocab_size": 101},
    {"layers": 3, "hidden_size": 48, "heads": 3, "ffn_hidden_size": 100, "max_positions": 40, "vocab_size": 57},
    {"layers": 1, "hidden_size": 64, "heads": 8, "ffn_hidden_size": 256, "max_positions": 33, "vocab_size": 500},
]


def config(family: str, shape: dict[str, Any]) -> ModelConfig:
    return ModelConfig.model_validate({"family": family, "layer_norm_epsilon": 1e-5, **shape})


def preset(name: str) -> ModelConfig:
    return ModelConfig.model_validate({"vocab_size": 300, "layer_norm_epsilon": 1e-5, **PRESETS[name]})


def random_batch(model: ModelConfig, sequences: int, length: int, predicted: int) -> dict[str, torch.Tensor]:
    """Every sequence has `predicted` targets (all of them for a GPT)."""
    assert model.vocab_size
    tokens = torch.randint(0, model.vocab_size, (sequences, length))
    targets = tokens.clone()
    if model.family == "bert":
        targets[:, predicted:] = -100
    return {
        "tokens": tokens,
        "targets": targets,
        "token_types": torch.zeros_like(tokens),
        "attention_mask": torch.ones_like(tokens, dtype=torch.bool),
        "next_sentence": torch.zeros(sequences, dtype=torch.int64),
        "dropout_seeds": torch.arange(sequences),
    }


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count_equals_every_preset(name: str):
    model = build_model(preset(name), seed=0, device="meta")
    count = costs.parameter_count(preset(name))
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.embedding == sum(
        p.numel() for n, p in model.named_parameters() if n.startswith("embed.") and p.ndim > 1
    )


def test_published_parameter_counts():
    assert costs.parameter_count(preset("gpt2-124m")).total == 124_439_808
    assert costs.parameter_count(preset("gpt3-175b")).total == pytest.approx(175e9, rel=5e-3)
    assert costs.parameter_count(preset("bert-base")).total == pytest.approx(110e6, rel=1e-2)
    assert costs.parameter_count(preset("bert-tiny")).total == pytest.approx(4.4e6, rel=2e-2)


@pytest.mark.parametrize("family", ["gpt", "bert"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [16, 33])
def test_flops_equal_the_flop_counter(family: str, shape: dict[str, Any], length: int):
    """The unfused path, as a fused kernel's backward pass recomputes; both count the whole square."""
    model_config, sequences, predicted = config(family, shape), 3, 5
    model = build_model(model_config, seed=0)
    batch = random_batch(model_config, sequences, length, predicted)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            losses = model.loss(batch)
        forward = counter.get_total_flops()
        with counter:
            sum(loss.sum for loss in losses.values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
        both = forward + counter.get_total_flops()
    expected = costs.forward_flops_per_sequence(model_config, length, causal=False, predicted_tokens=predicted)
    assert forward == sequences * expected.total
    assert both == sequences * costs.training_flops_per_sequence(model_config, length, False, predicted)


@pytest.mark.parametrize("family, dropout", [("gpt", 0.0), ("gpt", 0.1), ("bert", 0.0), ("bert", 0.1)])
def test_full_recompute_equals_the_flop_counter(family: str, dropout: float):
    model_config, length, predicted = config(family, {**SHAPES[0], "dropout": dropout}), 16, 4
    model = build_model(model_config, seed=0)
    for name, block in model.blocks.items():
        model.blocks[name] = Checkpointed(block)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        losses = model.loss(random_batch(model_config, 2, length, predicted))
        sum(loss.sum for loss in losses.values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    assert counter.get_total_flops() == 2 * costs.hardware_flops_per_sequence(model_config, length, "full", predicted)


class Checkpointed(torch.nn.Module):
    def __init__(self, block: torch.nn.Module):
        super().__init__()
        self.block = block

    def forward(self, *args: Any) -> Any:
        from torch.utils.checkpoint import checkpoint

        return checkpoint(self.block, *args, use_reentrant=False)


def test_causal_attention_counts_the_pairs_of_the_mask():
    model, length = config("gpt", SHAPES[0]), 7
    pairs = torch.ones(length, length).tril().sum().item()
    square = costs.forward_flops_per_sequence(model, length, causal=False)
    triangle = costs.forward_flops_per_sequence(model, length, causal=True)
    assert triangle.attention / square.attention == pairs / length**2
    assert triangle.block_linears == square.block_linears and triangle.head == square.head
    bert = config("bert", SHAPES[0])
    assert costs.forward_flops_per_sequence(bert, length, True) == costs.forward_flops_per_sequence(bert, length, False)


def test_bert_predicts_the_default_share_of_tokens():
    bert = config("bert", SHAPES[0])
    assert costs.training_flops_per_sequence(bert, 40, True) == costs.training_flops_per_sequence(bert, 40, True, 6)


def test_recomputation_adds_forward_passes():
    model = config("gpt", SHAPES[0])
    forward = costs.forward_flops_per_sequence(model, 16, causal=False)
    none, selective, full = (costs.hardware_flops_per_sequence(model, 16, r) for r in ("none", "selective", "full"))
    assert none == costs.training_flops_per_sequence(model, 16, causal=False)
    assert selective - none == forward.attention
    assert none < selective < full < none + forward.total


def test_six_n_is_near_the_exact_count_for_a_large_model():
    """GPT-3's attention and biases are small beside its matrices (Brown et al. 2020, table D.1: 3.14e23 FLOPs)."""
    model = preset("gpt3-175b")
    exact = costs.training_flops_per_sequence(model, 2048, causal=True)
    assert costs.six_n_flops_per_sequence(costs.parameter_count(model).total, 2048) == pytest.approx(exact, rel=0.02)
    assert exact * 300e9 / 2048 == pytest.approx(3.14e23, rel=0.02)


def test_bytes_of_state_and_checkpoint():
    assert costs.state_bytes_per_parameter("fp32") == (4, 0, 4, 8)
    assert costs.state_bytes_per_parameter("bf16") == costs.state_bytes_per_parameter("fp16") == (4, 2, 4, 8)
    assert costs.state_bytes_per_parameter("fp64") == (8, 0, 8, 16)
    assert costs.state_bytes_per_parameter("bf16").total == 18
    model = config("gpt", SHAPES[0])
    held = build_model(model, seed=0)
    optimizer = torch.optim.AdamW(held.parameters())
    held.loss(random_batch(model, 1, 8, 8))["lm"].sum.backward()
    optimizer.step()
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
    weights = sum(p.nbytes for p in held.parameters())
    assert memory.checkpoint_bytes(Config(model=model), "fp32") == weights + moments
    assert memory.checkpoint_bytes(Config(model=model), "fp64") == 2 * (weights + moments)


def saved_bytes(model_config: ModelConfig, precision: str, sequences: int, length: int, predicted: int) -> int:
    """Bytes of distinct storages, parameters and their casts apart, that the forward pass keeps for the backward."""
    dtype = torch.float64 if precision == "fp64" else torch.float32
    model = build_model(model_config, seed=0, dtype=dtype)
    shapes = {p.shape for p in model.parameters()} | {p.t().shape for p in model.parameters() if p.ndim == 2}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.shape not in shapes:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    low = precision == "bf16"
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16, low):
        losses = model.loss(random_batch(model_config, sequences, length, predicted))
    assert losses
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("family", ["gpt", "bert"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_activation_bytes_are_near_what_autograd_keeps(family: str, precision: Any):
    shape = {"layers": 4, "hidden_size": 96, "heads": 4, "ffn_hidden_size": 384, "max_positions": 72, "vocab_size": 210}
    model, length, sequences, predicted = config(family, shape), 72, 5, 11
    measured = saved_bytes(model, precision, sequences, length, predicted)
    estimate = costs.activation_bytes(
        model, length, sequences, precision, fused_attention=precision != "bf16", predicted_tokens=predicted
    )
    assert estimate.saved == pytest.approx(measured, rel=0.04)
    assert estimate.total > estimate.saved


def test_recomputation_saves_memory():
    model = preset("gpt2-124m")
    none, selective, full = (
        costs.activation_bytes(model, 1024, 8, "bf16", recompute, fused_attention=False, head=False)
        for recompute in ("none", "selective", "full")
    )
    assert full.saved < selective.saved / 2 < none.saved / 3
    assert full.total < selective.total < none.total
    assert full.working > selective.working and full.working > none.working  # whole blocks are there again


def test_costs_import_no_torch():
    code = "import sys, disttrain.costs, disttrain.hardware, disttrain.config.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
