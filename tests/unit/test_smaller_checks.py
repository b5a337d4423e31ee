"""Settings of pruning and rounding that contradict each other are refused, with what to do about it."""

import pytest

from disttrain.config.load import load
from disttrain.layout import problems

GRADUAL = ["pruning.method=magnitude", "pruning.sparsity=0.8", "pruning.end_step=600"]


def refused(*words: str, world_size: int = 1) -> set[str]:
    """Names of the settings that problems are about."""
    found = problems(load("configs/gpt_tiny.yaml", ["train.steps=800", *words]), world_size)
    assert all(p.message and p.fix for p in found)
    return {setting.partition("=")[0] for p in found for setting in p.settings}


@pytest.mark.parametrize(
    "words, settings",
    [
        (["pruning.sparsity=0.5"], {"pruning.sparsity", "pruning.method"}),
        (["pruning.method=keep", "pruning.every=10"], {"pruning.every", "pruning.method"}),
        (["pruning.method=magnitude"], {"pruning.method", "pruning.sparsity", "pruning.end_step"}),
        ([*GRADUAL, "pruning.initial_sparsity=0.8"], {"pruning.initial_sparsity", "pruning.sparsity"}),
        ([*GRADUAL, "pruning.begin_step=600"], {"pruning.begin_step", "pruning.end_step"}),
        ([*GRADUAL[:2], "pruning.end_step=801"], {"pruning.end_step", "800 training steps"}),
        ([*GRADUAL, "outer.method=nesterov"], {"pruning.method", "outer.method"}),
        ([*GRADUAL, "engine=deepspeed"], {"pruning.method", "engine"}),
        (["quantization.aware=true", "engine=horovod"], {"quantization.aware", "engine"}),
        (["quantization.aware=true", "model.source=a.py:B"], {"quantization.aware", "model.source"}),
    ],
)
def test_it_is_refused(words: list[str], settings: set[str]) -> None:
    assert settings <= refused(*words, world_size=2 if "outer.method=nesterov" in words else 1)


def test_rounding_under_tensor_parallelism_is_refused() -> None:
    words = ["quantization.aware=true", "parallel.tensor=2"]
    assert refused(*words, world_size=2) == {"quantization.aware", "parallel.tensor"}


@pytest.mark.parametrize(
    "words",
    [GRADUAL, ["pruning.method=keep", "pruning.embeddings=true"], ["quantization.aware=true", "parallel.zero=3"]],
)
def test_these_are_good(words: list[str]) -> None:
    assert refused(*words, world_size=2) == set()
