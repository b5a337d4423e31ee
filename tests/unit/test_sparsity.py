"""The gradual schedule by hand, when it acts, and what of a model it looks at."""

from typing import Any

import pytest

from disttrain.config.smaller import PruningConfig
from disttrain.sparsity import cubic, due, prunable


def test_the_cubic_by_hand() -> None:
    """From 0 to 0.8 between steps 100 and 500: 1 - (3/4)^3 = 37/64 of the way at 200, 7/8 at 300, 63/64 at 400."""
    shares = [cubic(step, 100, 500, 0.0, 0.8) for step in (0, 100, 200, 300, 400, 500, 900)]
    assert shares == pytest.approx([0, 0, 0.8 * 37 / 64, 0.7, 0.8 * 63 / 64, 0.8, 0.8], rel=1e-14)
    assert cubic(300, 100, 500, 0.2, 0.6) == pytest.approx(0.6 - 0.4 / 8)


def schedule(**values: Any) -> PruningConfig:
    given = {"method": "magnitude", "sparsity": 0.8, "begin_step": 10, "end_step": 35, "every": 10}
    return PruningConfig.model_validate({**given, **values})


def test_it_acts_every_so_many_steps_and_at_the_end() -> None:
    pruning = schedule()
    acts = {step: share for step in range(1, 62) if (share := due(pruning, step)) is not None}
    assert list(acts) == [10, 20, 30, 35, 40, 50, 60]
    assert acts[10] == 0.0 and acts[35] == acts[40] == acts[60] == 0.8
    assert acts[20] == pytest.approx(0.8 * (1 - 0.6**3))
    assert all(one <= other for one, other in zip(acts.values(), list(acts.values())[1:], strict=False))


def test_it_does_not_act_where_it_is_not_asked_to() -> None:
    assert due(PruningConfig(), 10) is None
    assert due(schedule(method="keep"), 10) is None


@pytest.mark.parametrize(
    "name, shape, embeddings, expected",
    [
        ("blocks.0.attn.qkv.weight", (48, 16), False, True),
        ("blocks.0.attn.qkv.bias", (48,), True, False),
        ("blocks.0.attn_norm.weight", (16,), True, False),
        ("embed.tokens.weight", (61, 16), False, False),
        ("embed.tokens.weight", (61, 16), True, True),
        ("head.decoder.weight", (61, 16), False, False),
        ("head.transform.weight", (16, 16), False, True),
    ],
)
def test_matrices_are_pruned(name: str, shape: tuple, embeddings: bool, expected: bool) -> None:
    assert prunable(name, shape, embeddings) == expected
