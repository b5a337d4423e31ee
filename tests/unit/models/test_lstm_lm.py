"""The LSTM language model: equal to the cell's equations, causal, independent of other sequences, trained like a GPT."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disttrain.config.schema import Config, ModelConfig
from disttrain.models import build_model, lstm_lm
from disttrain.models.gpt import GPT
from disttrain.models.lstm_lm import EMBEDDING_STD
from disttrain.parallel import own_model

B, S, V, H = 3, 11, 40, 16
SOURCE = f"{Path(lstm_lm.__file__)}:LSTMLM"


def config(**changes: Any) -> ModelConfig:
    shape = {"layers": 2, "hidden_size": H, "heads": 1, "ffn_hidden_size": 1, "max_positions": S, "vocab_size": V}
    return ModelConfig.model_validate({"source": SOURCE, "layer_norm_epsilon": 1e-5, **shape, **changes})


def lstm(**changes: Any) -> GPT:
    model = build_model(config(**changes), seed=0, dtype=torch.float64)
    assert isinstance(model, GPT)
    return model


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, V, (B, S + 1), generator=generator)
    targets = tokens[:, 1:].where(torch.rand(B, S, generator=generator) < 0.8, -100)
    return {"tokens": tokens[:, :-1], "targets": targets, "dropout_seeds": torch.tensor([11, 12, 13])}


def test_names() -> None:
    cell = [f"blocks.{i}.lstm.{leaf}_{way}_l0" for i in range(2) for leaf in ("weight", "bias") for way in ("ih", "hh")]
    assert set(lstm().state_dict()) == {"embed.tokens.weight", "head.decoder.weight", "head.decoder.bias", *cell}
    assert "head.output.weight" in lstm(options={"tied": False}).state_dict()


def test_logits_are_the_cells_equations() -> None:
    model, tokens = lstm(), batch()["tokens"]
    state = model.state_dict()
    x = state["embed.tokens.weight"][tokens]
    for layer in range(2):
        w, u, b, c = (
            state[f"blocks.{layer}.lstm.{name}_l0"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        hidden = cell = torch.zeros(B, H, dtype=torch.float64)
        rows = []
        for t in range(S):
            i, f, g, o = (x[:, t] @ w.T + b + hidden @ u.T + c).chunk(4, 1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
            rows.append(hidden)
        x = torch.stack(rows, 1)
    expected = x @ state["embed.tokens.weight"].T + state["head.decoder.bias"]
    torch.testing.assert_close(model(tokens), expected, atol=1e-12, rtol=0)


def test_loss_is_the_sum_over_targets() -> None:
    model, b = lstm(), batch()
    loss = model.loss(b)["lm"]
    expected = F.cross_entropy(model(b["tokens"]).flatten(0, 1), b["targets"].flatten(), reduction="sum")
    assert loss.sum.item() == pytest.approx(expected.item(), rel=1e-12)
    assert loss.count.item() == (b["targets"] != -100).sum()
    assert model.scores(b).keys() == set(model.SCORES)


def test_no_token_sees_a_later_one() -> None:
    model, tokens = lstm(), batch()["tokens"]
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % V
    before, after = model(tokens), model(changed)
    assert torch.equal(after[:, :5], before[:, :5])
    assert (after[:, 5:] - before[:, 5:]).abs().amax(-1).min() > 1e-12


def test_a_sequence_does_not_know_the_others() -> None:
    model, tokens = lstm(), batch()["tokens"]
    whole = model(tokens)
    model(tokens.flip(0))
    for row in range(B):
        torch.testing.assert_close(model(tokens[row : row + 1]), whole[row : row + 1], atol=1e-14, rtol=0)


def test_dropout_does_not_depend_on_the_cut_into_micro_batches() -> None:
    model, b = lstm(dropout=0.4).train(), batch()
    parts = [model.loss({k: v[rows] for k, v in b.items()})["lm"].sum for rows in (slice(0, 1), slice(1, 3))]
    assert sum(parts).item() == pytest.approx(model.loss(b)["lm"].sum.item(), rel=1e-12)
    assert model.loss(b)["lm"].sum != model.eval().loss(b)["lm"].sum


def test_stages_are_the_whole() -> None:
    whole, first, last, b = lstm(), lstm(), lstm(), batch()
    first.head, last.embed = None, None
    del first.blocks["1"], last.blocks["0"]
    assert torch.equal(last.forward_batch(b, first.forward_batch(b)), whole.forward_batch(b))


def test_tied_and_untied_heads() -> None:
    tied, untied = lstm(), lstm(options={"tied": False})
    assert tied.head is not None and tied.embed is not None and untied.head is not None and untied.embed is not None
    assert tied.head.decoder.weight is tied.embed.tokens.weight
    assert isinstance(untied.head.output, nn.Linear)
    assert not torch.equal(untied.head.output.weight, untied.embed.tokens.weight)
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == V * H
    with pytest.raises(ValueError, match="tied='no'"):
        lstm(options={"tied": "no"})


def test_initial_values() -> None:
    model = build_model(config(hidden_size=64, vocab_size=300), seed=3)
    for name, p in model.named_parameters():
        if "bias" in name:
            assert p.count_nonzero() == 0, name
        else:
            std = 1 / math.sqrt(3 * 64) if ".lstm." in name else EMBEDDING_STD
            assert p.std().item() == pytest.approx(std, rel=5 / math.sqrt(p.numel())), name


def test_it_can_be_trained_as_an_own_model_and_not_cut_along_sequences() -> None:
    settings = {"data": {"corpus": "python-docs"}, "train": {"steps": 1}}
    good = Config.model_validate({**settings, "model": config().model_dump()})
    assert own_model.problems(good) == []
    cut = Config.model_validate({**settings, "model": config().model_dump(), "parallel": {"context": 2}})
    (problem,) = own_model.problems(cut)
    assert "parallel.context=2" in problem.settings
    parameters, flops = own_model.measure(good.model, S)
    assert parameters == sum(p.numel() for p in lstm().parameters()) and flops > 0


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
    assert loss.sum / loss.count < 0.3 < math.log(12)
