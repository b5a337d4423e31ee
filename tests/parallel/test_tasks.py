"""Models of tasks train as in one process: heads of BERT and GPT on every axis they take, small encoders on data ranks."""

import functools

import numpy as np
import pytest
import torch

from disttrain.config.load import with_values
from disttrain.config.schema import Config, ModelConfig
from disttrain.engines.native import NativeEngine
from tests.chosen import chosen
from tests.parallel.test_data_parallel import make_engine
from tests.ranks import disagreeing, gathered, run_ranks

BATCH, LENGTH, WORDS, LABELS = 8, 12, 50, 5
SHAPE = {"layers": 2, "hidden_size": 16, "heads": 4, "max_positions": LENGTH, "vocab_size": WORDS, "dropout": 0.1,
         "ffn_hidden_size": 32, "layer_norm_epsilon": 1e-5, "labels": LABELS}  # fmt: skip
MODELS: dict[str, dict] = {
    "bert classify": {"family": "bert", "head": "classify"},
    "gpt classify": {"family": "gpt", "head": "classify", "loss": "focal", "focal_alpha": 0.3},
    "bert tag": {"family": "bert", "head": "tag", "crf": True},
    "bert answer": {"family": "bert", "head": "answer", "labels": None},
    "gpt regress": {"family": "gpt", "head": "regress", "labels": None},
    "text_cnn": {
        "family": "text_cnn",
        "head": "classify",
        "channels": 6,
        "kernels": [2, 3],
        "top_attention_heads": 2,
        "embedding_dropout": 0.2,
    },
    "ghm": {"family": "rnn", "head": "classify", "loss": "ghm", "cell": "gru", "bidirectional": False, "layers": 1},
    "rnn": {"family": "rnn", "head": "tag", "crf": True, "character_size": 4, "character_channels": 3},
}
WIDE = {
    "data": (2, {}),
    "tensor x sequence": (2, {"parallel.tensor": 2, "parallel.sequence": True}),
    "tensor x pipeline x zero 1": (8, {"parallel.tensor": 2, "parallel.pipeline": 2, "parallel.zero": 1,
                                       "train.micro_batch_size": 2}),
    "zero 3": (4, {"parallel.zero": 3, "train.micro_batch_size": 1}),
    "recompute": (2, {"parallel.recompute": "full", "parallel.zero": 2}),
}  # fmt: skip
NARROW = {"data": (2, {}), "zero 2": (4, {"parallel.zero": 2}), "zero 3": (2, {"parallel.zero": 3})}


def config_of(model: str, **values) -> Config:
    shape = ModelConfig.model_validate({**SHAPE, **MODELS[model]})
    return with_values(Config(), {
        "model": shape, "precision": "fp64", "run.device": "cpu", "data.sequence_length": LENGTH,
        "train.global_batch_size": BATCH, "train.steps": 4, **values,
    })  # fmt: skip


def whole_batch(config: Config, step: int) -> dict[str, np.ndarray]:
    """Examples of uneven lengths, one of them without a label."""
    rng = np.random.default_rng(step)
    lengths = rng.integers(3, LENGTH + 1, BATCH)
    mask = np.arange(LENGTH) < lengths[:, None]
    tokens = np.where(mask, rng.integers(2, WORDS, (BATCH, LENGTH)), 0)
    batch = {"tokens": tokens, "attention_mask": mask, "token_types": (np.arange(LENGTH) > 4) * mask.astype(np.int64),
             "samples": np.arange(BATCH) + BATCH * step}  # fmt: skip
    kind, labels = config.model.head, rng.integers(0, LABELS, (BATCH, LENGTH))
    targets = {
        "classify": labels[:, 0], "tag": np.where(mask, labels, -100), "regress": rng.normal(size=BATCH),
        "answer": np.stack([rng.integers(0, lengths), rng.integers(0, lengths)], 1),
    }[kind]  # fmt: skip
    targets[step % BATCH] = -100
    if kind == "answer":
        batch["answerable"] = mask
    if config.model.character_size:
        batch["characters"] = rng.integers(0, 256, (BATCH, LENGTH, 5)) * mask[..., None]
    return {**batch, "targets": targets}


def micro_batches(engine: NativeEngine, step: int) -> list[dict[str, np.ndarray]]:
    config, mesh = engine.config, engine.groups.mesh
    batch = whole_batch(config, step)
    size = config.train.micro_batch_size or BATCH // mesh.data_ranks
    first, stride = mesh.data_rank(engine.groups.rank) * size, size * mesh.data_ranks
    return [{name: array[i : i + size] for name, array in batch.items()} for i in range(first, BATCH, stride)]


def train(rank: int, config: Config, world: int) -> dict:
    engine = make_engine(config, rank, world)
    numbers = []
    for step in (1, 2, 3):
        result = engine.step(micro_batches(engine, step), step, 1e-2)
        ((_, loss),) = result.losses.items()
        numbers += [float(loss.sum / loss.count), float(result.grad_norm)]
    scores = engine.evaluate(micro_batches(engine, 4))
    numbers += [float(value) for one in scores.values() for value in one]
    predicted = {} if config.parallel.pipeline > 1 else engine.predict(micro_batches(engine, 4))[0]
    return {"numbers": numbers, "apart": disagreeing(engine, "weight"), "weights": gathered(engine, "weight"),
            "first": {name: tensor[0] for name, tensor in predicted.items()}}  # fmt: skip


@functools.cache
def alone(model: str) -> dict:
    return run_ranks(train, 1, config_of(model), 1)[0]


def cases() -> list[tuple[str, str]]:
    small = [(name, layout) for name in MODELS if MODELS[name]["family"] in ("text_cnn", "rnn") for layout in NARROW]
    return [*((name, layout) for name in list(MODELS)[:5] for layout in WIDE), *small]


@pytest.mark.parametrize(("model", "layout"), chosen(cases(), 4))
def test_every_layout_equals_one_process(model: str, layout: str) -> None:
    world, values = {**NARROW, **WIDE}[layout]
    expected, found = alone(model), run_ranks(train, world, config_of(model, **values), world)[0]
    assert found["numbers"] == pytest.approx(expected["numbers"], rel=1e-10, abs=1e-12)
    assert found["apart"] == []
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-10, atol=1e-10, msg=name)
    for name, tensor in found["first"].items():
        torch.testing.assert_close(tensor, expected["first"][name], rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("model", MODELS)
def test_padding_does_not_matter(model: str) -> None:
    """A batch that is padded further has the same scores and loss."""
    config = config_of(
        model, **{"model.dropout": 0.0, "model.embedding_dropout": 0.0, "model.max_positions": 2 * LENGTH}
    )
    (engine,) = run_ranks(padded_losses, 1, config, 1)
    assert engine[0] == pytest.approx(engine[1], rel=1e-10)


def padded_losses(rank: int, config: Config, world: int) -> list[list[float]]:
    engine = make_engine(config, rank, world)
    batch = whole_batch(config, 1)
    wider = {name: _wider(array) for name, array in batch.items()}
    found = [engine.evaluate([one]) for one in (batch, wider)]
    return [[float(value) for score in scores.values() for value in score] for scores in found]


def _wider(array: np.ndarray) -> np.ndarray:
    if array.ndim < 2 or array.shape[1] != LENGTH:
        return array
    fill = -100 if (array < 0).any() else 0
    return np.concatenate([array, np.full_like(array, fill)], 1)
