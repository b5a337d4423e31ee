from typing import Any

import pytest

from disttrain.config.presets import PRESETS, Shape, apply_preset, shape_of
from disttrain.config.problems import RefusedInput
from disttrain.config.schema import ModelConfig


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_valid_model(name: str):
    model = ModelConfig.model_validate(apply_preset({"preset": name, "family": PRESETS[name]["family"]}))
    assert model.preset == name and model.hidden_size % model.heads == 0
    assert model.ffn_hidden_size == 4 * model.hidden_size
    assert name.startswith(("gpt", "bert")) and model.family == ("bert" if name.startswith("bert") else "gpt")
    assert model.vocab_size == (30522 if model.family == "bert" else 50257 if name[3] in "23" else None)
    assert model.dropout == ModelConfig().dropout  # a preset is a shape


@pytest.mark.parametrize(
    "name, shape",
    [
        ("gpt2-124m", Shape(12, 768, 12, 3072, 1024, 50257, 64)),
        ("gpt2-1.5b", Shape(48, 1600, 25, 6400, 1024, 50257, 64)),
        ("gpt3-1.3b", Shape(24, 2048, 16, 8192, 2048, 50257, 128)),
        ("gpt3-175b", Shape(96, 12288, 96, 49152, 2048, 50257, 128)),
        ("bert-tiny", Shape(2, 128, 2, 512, 512, 30522, 64)),
        ("bert-large", Shape(24, 1024, 16, 4096, 512, 30522, 64)),
    ],
)
def test_published_shapes(name: str, shape: Shape):
    assert shape_of(ModelConfig.model_validate(apply_preset({"preset": name}))) == shape


def test_given_keys_win_and_the_input_stays():
    given = {"preset": "gpt2-124m", "layers": 2, "vocab_size": None}
    filled = apply_preset(given)
    assert filled["layers"] == 2 and filled["vocab_size"] is None and filled["heads"] == 12
    assert given == {"preset": "gpt2-124m", "layers": 2, "vocab_size": None}
    assert PRESETS["gpt2-124m"]["layers"] == 12


def test_the_feed_forward_width_follows_a_given_width():
    assert "ffn_hidden_size" not in apply_preset({"preset": "gpt2-124m", "hidden_size": 384})
    assert apply_preset({"preset": "gpt2-124m", "hidden_size": 384, "ffn_hidden_size": 7})["ffn_hidden_size"] == 7


@pytest.mark.parametrize("model", [{}, {"layers": 3}, {"preset": None, "layers": 3}])
def test_without_a_preset_nothing_changes(model: dict[str, Any]):
    assert apply_preset(model) == model


@pytest.mark.parametrize(
    "name, nearest", [("gpt2-24m", "gpt2-124m"), ("bert_base", "bert-base"), ("GPT3-175B", "gpt3-175b"), (7, "")]
)
def test_an_unknown_preset_names_the_nearest(name: Any, nearest: str):
    with pytest.raises(RefusedInput) as refused:
        apply_preset({"preset": name})
    (problem,) = refused.value.problems
    assert problem.settings == (f"model.preset={name}",)
    assert f"Did you mean {nearest}" in problem.fix


def test_a_family_that_contradicts_the_preset_is_refused():
    with pytest.raises(RefusedInput) as refused:
        apply_preset({"preset": "bert-base", "family": "gpt"})
    assert refused.value.problems[0].settings == ("model.preset=bert-base", "model.family=gpt")


def test_an_open_shape_is_refused():
    with pytest.raises(ValueError, match="vocab_size"):
        shape_of(ModelConfig())
