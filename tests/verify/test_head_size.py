"""A model whose heads were pruned trains under layouts exactly like one process."""

import pytest

from disttrain.verify.layouts import parse
from tests.verify.small import proof_for


@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_verify_holds_fewer_heads_to_one_process(family: str) -> None:
    """Four heads of 2 in a model that is 16 wide, and 12 neurons."""
    shape = {"model.head_size": 2, "model.ffn_hidden_size": 12}
    with proof_for(family, "fp64", **shape) as proof:
        for layout in ("tp2.sp.dp2.zero2.mb2 on 4", "pp2-1f1b.cp2-ulysses.mb1 on 4"):
            verdict = proof.verify(parse(layout))
            assert verdict.equal, (layout, verdict.failures[:3])
