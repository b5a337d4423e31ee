"""Element-wise pruning of a trained model: the smallest, together or each, and what is left alone."""

import pytest
import torch

from disttrain.model_compression.magnitude import prune, zeros


def weights() -> dict[str, torch.Tensor]:
    return {
        "embed.tokens.weight": torch.tensor([[0.01, 0.02], [0.03, 0.04]]),
        "blocks.0.mlp.up.weight": torch.tensor([[1.0, -2.0], [3.0, -4.0]]),
        "blocks.0.mlp.down.weight": torch.tensor([[-10.0, 0.5], [30.0, 40.0]]),
        "blocks.0.mlp.up.bias": torch.tensor([0.001, 0.001]),
    }


@pytest.mark.parametrize(
    "each, embeddings, up, down, embed",
    [
        (False, False, [[0, 0], [0, -4]], [[-10, 0], [30, 40]], [[0.01, 0.02], [0.03, 0.04]]),
        (True, False, [[0, 0], [3, -4]], [[0, 0], [30, 40]], [[0.01, 0.02], [0.03, 0.04]]),
        (True, True, [[0, 0], [3, -4]], [[0, 0], [30, 40]], [[0, 0], [0.03, 0.04]]),
        (False, True, [[0, -2], [3, -4]], [[-10, 0], [30, 40]], [[0, 0], [0, 0]]),
    ],
)
def test_the_smallest_half_goes(each: bool, embeddings: bool, up: list, down: list, embed: list) -> None:
    before = weights()
    found = prune(before, 0.5, each, embeddings)
    assert found["blocks.0.mlp.up.weight"].tolist() == up
    assert found["blocks.0.mlp.down.weight"].tolist() == down
    torch.testing.assert_close(found["embed.tokens.weight"], torch.tensor(embed, dtype=torch.float32))
    assert torch.equal(found["blocks.0.mlp.up.bias"], before["blocks.0.mlp.up.bias"])
    assert torch.equal(before["blocks.0.mlp.up.weight"], weights()["blocks.0.mlp.up.weight"])
    assert zeros(found) == pytest.approx((4 + 2 * embeddings) / 12)
