"""Generation: reproducible, greedy at temperature 0, cut to the likely tokens, and without a trace on the model."""

import pytest
import torch
from torch import nn

from disttrain.config.schema import ModelConfig
from disttrain.models import GPT, build_model
from disttrain.tasks.generate import generate

VOCAB = 11


def small_gpt(dropout: float = 0.0) -> GPT:
    """A GPT of 11 tokens and 8 positions whose logits are spread enough to tell tokens apart."""
    config = ModelConfig(
        layers=2,
        hidden_size=16,
        heads=2,
        ffn_hidden_size=64,
        max_positions=8,
        vocab_size=VOCAB,
        dropout=dropout,
        layer_norm_epsilon=1e-5,
    )
    model = build_model(config, seed=0)
    assert isinstance(model, GPT)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    return model


class FixedLogits(nn.Module):
    """Stands in for a GPT: the same next-token logits after anything; remembers the contexts it saw."""

    def __init__(self, logits: list[float], max_positions: int = 4):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))
        self.config = ModelConfig(max_positions=max_positions, vocab_size=len(logits))
        self.contexts: list[list[int]] = []

    def forward(self, tokens):
        self.contexts.append(tokens[0].tolist())
        return self.logits.expand(1, tokens.shape[1], -1)


def test_greedy_takes_the_most_likely_token_each_time():
    model = small_gpt()
    ids = [3, 1]
    for _ in range(10):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids[-8:]]))[0, -1].argmax()))
    assert generate(model, [3, 1], 10, temperature=0, seed=5) == ids[2:]


def test_the_seed_decides_the_text():
    model = small_gpt()
    texts = [tuple(generate(model, [3], 20, seed=seed)) for seed in (0, 0, 1, 2)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3
    assert all(len(text) == 20 and set(text) <= set(range(VOCAB)) for text in texts)


def test_the_global_random_state_is_neither_used_nor_moved():
    model = small_gpt()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = generate(model, [3], 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert generate(model, [3], 5) == first


def test_samples_follow_the_softmax_and_temperature_sharpens_it():
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    model = FixedLogits(probabilities.log().tolist())
    drawn = torch.tensor(generate(model, [0], 4000, seed=1)).bincount(minlength=3) / 4000
    torch.testing.assert_close(drawn, probabilities, atol=0.03, rtol=0)
    sharp = probabilities**2 / (probabilities**2).sum()
    drawn = torch.tensor(generate(model, [0], 4000, temperature=0.5, seed=1)).bincount(minlength=3) / 4000
    torch.testing.assert_close(drawn, sharp, atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("cut", "survivors"),
    [
        ({"top_k": 1}, {2}),
        ({"top_k": 2}, {1, 2}),
        ({"top_k": 9}, {0, 1, 2, 3}),
        ({"top_p": 0.05}, {2}),
        ({"top_p": 0.45}, {1, 2}),  # 0.4 alone does not reach 0.45
        ({"top_p": 0.75}, {0, 1, 2}),
        ({"top_p": 1.0}, {0, 1, 2, 3}),
        ({"top_k": 3, "top_p": 0.75}, {1, 2}),  # of the three left, two hold 7 / 9
        ({"vocab_size": 2}, {0, 1}),
    ],
)
def test_top_k_and_top_p_keep_the_most_likely_tokens(cut, survivors):
    model = FixedLogits(torch.tensor([0.2, 0.3, 0.4, 0.1]).log().tolist())
    assert set(generate(model, [0], 300, seed=3, **cut)) == survivors


def test_the_context_is_cropped_to_the_model_s_positions():
    model = FixedLogits([0.0, 5.0], max_positions=4)
    generate(model, [0] * 6, 3, temperature=0)
    assert model.contexts == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 1]]
    assert len(generate(small_gpt(), [1] * 20, 4)) == 4


def test_stops_before_the_stop_token():
    model = FixedLogits([0.0, 5.0])
    assert generate(model, [0], 9, temperature=0, stop_id=1) == []
    assert generate(model, [0], 3, temperature=0, stop_id=0) == [1, 1, 1]


def test_dropout_is_off_and_every_module_s_mode_comes_back():
    model = small_gpt(dropout=0.5).train()
    model.blocks["0"].eval()
    modes = [module.training for module in model.modules()]
    assert generate(model, [3], 6, temperature=0) == generate(model, [3], 6, temperature=0)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(IndexError):  # a failure inside the model gives its mode back too
        model.embed.tokens = nn.Embedding(2, 16)
        generate(model, [3], 1)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_ids": []}, "empty"),
        ({"prompt_ids": [VOCAB]}, "outside the 11 embedding rows"),
        ({"max_new_tokens": -1}, "negative"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"vocab_size": 0}, "no token"),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(small_gpt(), **{"prompt_ids": [0], "max_new_tokens": 1, **arguments})
