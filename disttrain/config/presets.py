"""Named model shapes, as published, and the checked shape of a resolved model (no torch).

A preset gives the shape only; dropout and everything about training keep their own settings. Sources:

- gpt2-*: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", table 2 (parameter counts as
  published with the weights), vocabulary 50257, 1024 positions.
- gpt3-*: Brown et al. 2020, "Language Models are Few-Shot Learners", table 2.1, 2048 positions. Two rows of that table
  cannot be built as printed: the 1.3B model (24 heads of 128 are not 2048; 16 heads here) and the 13B model (width 5140
  is not 40 x 128; 5120 here). Every layer is dense; the paper alternates dense and sparse layers.
- bert-tiny to bert-medium: Turc et al. 2019, "Well-Read Students Learn Better"; bert-base and bert-large: Devlin et al.
  2019, "BERT", section 3. Vocabulary 30522 (uncased), 512 positions.
"""

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

from disttrain.config.problems import Problem, RefusedInput
from disttrain.config.schema import ModelConfig

_GPT_VOCABULARY = 50257
_BERT_VOCABULARY = 30522


class Shape(NamedTuple):
    """The integers that fix every parameter's shape."""

    layers: int
    hidden_size: int
    heads: int
    ffn_hidden_size: int
    max_positions: int
    vocab_size: int
    head_size: int

    @property
    def attention_size(self) -> int:
        """Width of all heads together: hidden_size, or less where heads were pruned."""
        return self.heads * self.head_size


def shape_of(model: ModelConfig) -> Shape:
    """The shape of a resolved model. Raises ValueError when the vocabulary or feed-forward width is still open."""
    if model.vocab_size is None or model.ffn_hidden_size is None:
        raise ValueError("model.vocab_size and model.ffn_hidden_size are not resolved yet")
    return Shape(
        layers=model.layers,
        hidden_size=model.hidden_size,
        heads=model.heads,
        ffn_hidden_size=model.ffn_hidden_size,
        max_positions=model.max_positions,
        vocab_size=model.vocab_size,
        head_size=model.head_size or model.hidden_size // model.heads,
    )


def _preset(
    family: str, layers: int, hidden_size: int, heads: int, max_positions: int, vocab_size: int | None
) -> dict[str, Any]:
    preset: dict[str, Any] = {
        "family": family,
        "layers": layers,
        "hidden_size": hidden_size,
        "heads": heads,
        "ffn_hidden_size": 4 * hidden_size,
        "max_positions": max_positions,
    }
    return preset if vocab_size is None else {**preset, "vocab_size": vocab_size}


PRESETS: dict[str, dict[str, Any]] = {
    "gpt-1m": _preset("gpt", 4, 128, 4, 256, None),
    "gpt-10m": _preset("gpt", 6, 384, 6, 256, None),
    "gpt2-124m": _preset("gpt", 12, 768, 12, 1024, _GPT_VOCABULARY),
    "gpt2-355m": _preset("gpt", 24, 1024, 16, 1024, _GPT_VOCABULARY),
    "gpt2-774m": _preset("gpt", 36, 1280, 20, 1024, _GPT_VOCABULARY),
    "gpt2-1.5b": _preset("gpt", 48, 1600, 25, 1024, _GPT_VOCABULARY),
    "gpt3-125m": _preset("gpt", 12, 768, 12, 2048, _GPT_VOCABULARY),
    "gpt3-350m": _preset("gpt", 24, 1024, 16, 2048, _GPT_VOCABULARY),
    "gpt3-760m": _preset("gpt", 24, 1536, 16, 2048, _GPT_VOCABULARY),
    "gpt3-1.3b": _preset("gpt", 24, 2048, 16, 2048, _GPT_VOCABULARY),
    "gpt3-2.7b": _preset("gpt", 32, 2560, 32, 2048, _GPT_VOCABULARY),
    "gpt3-6.7b": _preset("gpt", 32, 4096, 32, 2048, _GPT_VOCABULARY),
    "gpt3-13b": _preset("gpt", 40, 5120, 40, 2048, _GPT_VOCABULARY),
    "gpt3-175b": _preset("gpt", 96, 12288, 96, 2048, _GPT_VOCABULARY),
    "bert-tiny": _preset("bert", 2, 128, 2, 512, _BERT_VOCABULARY),
    "bert-mini": _preset("bert", 4, 256, 4, 512, _BERT_VOCABULARY),
    "bert-small": _preset("bert", 4, 512, 8, 512, _BERT_VOCABULARY),
    "bert-medium": _preset("bert", 8, 512, 8, 512, _BERT_VOCABULARY),
    "bert-base": _preset("bert", 12, 768, 12, 512, _BERT_VOCABULARY),
    "bert-large": _preset("bert", 24, 1024, 16, 512, _BERT_VOCABULARY),
}


def apply_preset(model: Mapping[str, Any]) -> dict[str, Any]:
    """Fill what a `model:` section leaves out from its preset; keys that are given win.

    The feed-forward width follows a given hidden_size (4 times), unless it is given itself. Raises RefusedInput for an
    unknown preset, naming the nearest one, and for a family that contradicts the preset.
    """
    name = model.get("preset")
    if name is None:
        return dict(model)
    preset = PRESETS.get(name) if isinstance(name, str) else None
    if preset is None:
        known = ", ".join(PRESETS)
        nearest = difflib.get_close_matches(str(name).lower(), PRESETS, n=1, cutoff=0.0)[0]
        raise RefusedInput(
            [
                Problem(
                    (f"model.preset={name}",), "There is no such preset.", f"Did you mean {nearest}? There are {known}."
                )
            ],
        )
    family = model.get("family", preset["family"])
    if family != preset["family"]:
        raise RefusedInput(
            [
                Problem(
                    (f"model.preset={name}", f"model.family={family}"),
                    f"The preset is a {preset['family']} model.",
                    "Leave model.family out, or take a preset of that family.",
                )
            ]
        )
    filled = {**preset, **model}
    if "hidden_size" in model and "ffn_hidden_size" not in model:
        del filled["ffn_hidden_size"]  # the default, 4 x hidden_size, follows the given width
    return filled
