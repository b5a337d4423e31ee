"""The convolutional language model: equal to the paper's equation, causal, with the context that its layers give it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from disttrain.config.schema import Config, ModelConfig
from disttrain.models import build_model, cnn_lm
from disttrain.models.gpt import GPT
from disttrain.models.lstm_lm import EMBEDDING_STD
from disttrain.parallel import own_model

B, S, V, H = 3, 14, 40, 16
SOURCE = f"{Path(cnn_lm.__file__)}:CNNLM"


def config(**changes: Any) -> ModelConfig:
    shape = {"layers": 2, "hidden_size": H, "heads": 1, "ffn_hidden_size": 1, "max_positions": S, "vocab_size": V}
    return ModelConfig.model_validate({"source": SOURCE, "layer_norm_epsilon": 1e-5, **shape, **changes})


def cnn(**changes: Any) -> GPT:
    model = build_model(config(**changes), seed=0, dtype=torch.float64)
    assert isinstance(model, GPT)
    return model


def batch() -> dict[str, Tensor]:
    tokens = torch.randint(0, V, (B, S + 1), generator=torch.Generator().manual_seed(1))
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "dropout_seeds": torch.tensor([11, 12, 13])}


def test_names() -> None:
    blocks = [f"blocks.{i}.{part}.{leaf}" for i in range(2) for part in ("norm", "conv") for leaf in ("weight", "bias")]
    ends = ["embed.tokens.weight", "head.norm.weight", "head.norm.bias", "head.decoder.weight"]
    assert set(cnn().state_dict()) == {*ends, *blocks}


def test_logits_are_the_papers_equation() -> None:
    model, tokens = cnn(options={"kernel_size": 3}), batch()["tokens"]
    state = model.state_dict()
    x = state["embed.tokens.weight"][tokens]
    for layer in range(2):
        weight, bias = state[f"blocks.{layer}.conv.weight"], state[f"blocks.{layer}.conv.bias"]
        y = F.layer_norm(x, (H,), state[f"blocks.{layer}.norm.weight"], state[f"blocks.{layer}.norm.bias"], 1e-5)
        rows = []
        for t in range(S):
            total = bias.expand(B, -1)
            for back in range(3):
                if t - back >= 0:
                    total = total + y[:, t - back] @ weight[:, :, 2 - back].T
            rows.append(total[:, :H] * total[:, H:].sigmoid())
        x = x + torch.stack(rows, 1)
    x = F.layer_norm(x, (H,), state["head.norm.weight"], state["head.norm.bias"], 1e-5)
    torch.testing.assert_close(model(tokens), x @ state["embed.tokens.weight"].T, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("kernel_size", "reach"), [(2, 2), (4, 6)])
def test_a_token_sees_what_its_layers_reach_and_nothing_later(kernel_size: int, reach: int) -> None:
    model, tokens = cnn(options={"kernel_size": kernel_size}), batch()["tokens"]
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % V
    difference = (model(changed) - model(tokens)).abs().amax((0, 2))
    assert (difference > 1e-12).tolist() == [5 <= t <= 5 + reach for t in range(S)]


def test_loss_dropout_and_stages() -> None:
    model, b = cnn(dropout=0.4), batch()
    loss = model.eval().loss(b)["lm"]
    expected = F.cross_entropy(model(b["tokens"]).flatten(0, 1), b["targets"].flatten(), reduction="sum")
    assert loss.sum.item() == pytest.approx(expected.item(), rel=1e-12) and loss.count == B * S
    model.train()
    parts = [model.loss({k: v[rows] for k, v in b.items()})["lm"].sum for rows in (slice(0, 1), slice(1, 3))]
    assert sum(parts).item() == pytest.approx(model.loss(b)["lm"].sum.item(), rel=1e-12)
    assert model.loss(b)["lm"].sum != loss.sum
    whole, first, last = cnn(), cnn(), cnn()
    first.head, last.embed = None, None
    del first.blocks["1"], last.blocks["0"]
    assert torch.equal(last.forward_batch(b, first.forward_batch(b)), whole.forward_batch(b))


def test_initial_values_and_tied_head() -> None:
    model = build_model(config(hidden_size=64, vocab_size=300), seed=3)
    assert model.head is not None and model.embed is not None
    assert model.head.decoder.weight is model.embed.tokens.weight
    for name, p in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            assert (p == float(name.endswith("weight"))).all(), name
        else:
            std = 2 / math.sqrt(4 * 64 * 2) if "conv" in name else EMBEDDING_STD
            assert p.std().item() == pytest.approx(std, rel=5 / math.sqrt(p.numel())), name


@pytest.mark.parametrize("size", [1, True, 2.5, "4"])
def test_kernels_that_are_none(size: Any) -> None:
    with pytest.raises(ValueError, match="kernel_size="):
        cnn(options={"kernel_size": size})


def test_it_can_be_trained_as_an_own_model() -> None:
    settings = {"data": {"corpus": "python-docs"}, "train": {"steps": 1}, "model": config().model_dump()}
    assert own_model.problems(Config.model_validate(settings)) == []
    (problem,) = own_model.problems(Config.model_validate({**settings, "parallel": {"context": 2}}))
    assert "parallel.context=2" in problem.settings
    parameters, flops = own_model.measure(config(), S)
    assert parameters == sum(p.numel() for p in cnn().parameters())
    assert flops == 2 * S * (2 * (H * 2 * H * 4) + H * V)


def test_it_learns_to_count() -> None:
    model = build_model(config(hidden_size=32, vocab_size=12), seed=0)
    tokens = (torch.arange(S + 1) + torch.arange(12)[:, None]) % 12
    b = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = model.loss(b)["lm"]
        (loss.sum / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
    loss = model.loss(b)["lm"]
    assert loss.sum / loss.count < 0.3
