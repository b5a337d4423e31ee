"""A trained model of a run folder, in this one process."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from disttrain import checkpoint, data, inputs
from disttrain.config.load import load, with_values
from disttrain.config.problems import Problem, RefusedInput
from disttrain.config.schema import Config
from disttrain.data import Prepared, Tokenizer
from disttrain.labelled.loading import WORDS
from disttrain.labelled.words import Vocabulary, load_vocabulary
from disttrain.models import Model, build_model


@dataclass(frozen=True)
class Trained:
    """Model with the weights of the newest good checkpoint, in evaluation mode, and what made its tokens."""

    config: Config
    model: Model
    tokenizer: Tokenizer | Vocabulary
    prepared: Prepared
    step: int


def trained_checkpoint(folder: Path) -> tuple[Config, Path]:
    """A run's config and its newest good checkpoint. Raises RefusedInput where there is none."""
    path, damaged = checkpoint.newest_good(folder / "checkpoints")
    if path is None or not (folder / "config.yaml").is_file():
        reason = f"no checkpoint can be used ({'; '.join(damaged)})" if damaged else "there is no checkpoint in it"
        raise RefusedInput(
            [Problem((f"run {folder}",), reason, "give the folder of a trained run, such as runs/gpt_tiny")]
        )
    return load(folder / "config.yaml"), path


def load_trained(folder: Path, values: Mapping[str, Any] | None = None) -> Trained:
    """Load a run's newest good checkpoint on the CPU, with some settings of its data changed. Raises RefusedInput where
    there is none, or no such data."""
    config, path = trained_checkpoint(folder)
    if config.data.tokenizer == "words":
        config = with_values(config, {"task.vocabulary": str(folder / WORDS)})
    if values:
        config = with_values(config, dict(values))
        if problems := inputs.preflight(config):
            raise RefusedInput(problems)
    model = build_model(config.model, config.run.seed, torch.float64 if config.precision == "fp64" else torch.float32)
    weights = {name: value for name, value in model.state_dict().items() if name not in model.tied}
    trainer = checkpoint.load(path, {"model": weights})  # in place: these are the model's own tensors
    prepared = inputs.prepare(config)
    words = config.data.tokenizer == "words"
    tokenizer = load_vocabulary(prepared.tokenizer) if words else data.load_tokenizer(prepared.tokenizer)
    return Trained(config, model.eval(), tokenizer, prepared, trainer["step"])
