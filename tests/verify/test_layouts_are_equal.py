"""The real thing: layouts of every kind train like one process, and nothing correct is called wrong."""

from collections.abc import Iterator
from functools import cache

import pytest

from disttrain.verify.layouts import Layout, parse
from disttrain.verify.matrix import full_matrix, sample
from disttrain.verify.proof import Proof
from tests.chosen import chosen
from tests.verify.small import config_for, proof_for

SAMPLES = 6
"""Layouts a family, drawn from the full matrix; `make verify` proves all that there are."""


@pytest.fixture(scope="module", params=["gpt", "bert"])
def proof(request: pytest.FixtureRequest) -> Iterator[Proof]:
    with proof_for(request.param) as made:
        yield made


@cache
def sampled(seed: int) -> list[Layout]:
    return sample([layout for layout in full_matrix(config_for()) if layout.world >= 4], SAMPLES, seed)


@pytest.mark.parametrize("number", chosen(range(SAMPLES), 2))
def test_a_sample_of_the_full_matrix_is_equal(number: int, proof: Proof) -> None:
    layout = sampled(7)[number]
    verdict = proof.verify(layout)
    assert verdict.equal, (layout.name, verdict.error or verdict.failures[:3])
    assert len(verdict.worst) == 13  # every phase was reached


def test_the_reference_does_what_is_compared(proof: Proof) -> None:
    """Otherwise layouts could be equal in doing nothing."""
    config, reference, _ = proof.reference()
    skips = [trace.ranks[0].skipped for trace in reference.steps]
    assert skips == [False, True, False]
    limit = config.train.clip_grad_norm
    norms = [trace.ranks[0].norm for trace in reference.steps if trace.clipped]
    assert limit and min(norms) < limit < max(norms)  # clipped in some steps only
    scales = [trace.ranks[0].scales["next_loss_scale"] for trace in reference.steps]
    assert scales == [1024, 512, 512]
    assert reference.repeated.ranks[0].scales == {"loss_scale": 1024, "next_loss_scale": 2048, "good_steps": 0}
    before, after = reference.initial, reference.steps[-1].weights
    assert all(not before[name].equal(after[name]) for name in after)


@pytest.mark.parametrize(("precision", "name"), chosen([
    ("fp32", "pp2-1f1b.cp2-ring.mb4 on 4"), ("bf16", "tp2.sp.dp2.zero2.mb2 on 4"), ("fp16", "tp2.sp.dp2.zero2.mb2 on 4"),
], 3))  # fmt: skip
def test_the_runs_own_precision(precision: str, name: str) -> None:
    with proof_for("gpt", precision) as proof:  # type: ignore[arg-type]
        verdict = proof.verify(parse(name))
        assert verdict.equal, verdict.error or verdict.failures[:3]
