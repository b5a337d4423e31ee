"""Verify must catch what it claims: every planted fault, in the right phase, on the right axis, by its name."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from disttrain.verify.layouts import parse
from disttrain.verify.proof import Proof
from tests.chosen import chosen
from tests.verify.mutants import MUTANTS, Mutant
from tests.verify.small import proof_for


@pytest.fixture(scope="module")
def proofs() -> Iterator[dict[str, Proof]]:
    with proof_for("gpt") as gpt, proof_for("bert") as bert:
        yield {"gpt": gpt, "bert": bert}


def test_there_are_enough() -> None:
    assert len(MUTANTS) >= 25
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    caught = {mutant.phase for mutant in MUTANTS}
    assert caught == {"run", "initial_weights", "counts", "forward", "gradients", "grad_norm", "skip", "clip",
                      "weights", "replicas", "evaluation", "checkpoint", "resume", "reshard"}  # fmt: skip
    assert {"tensor", "sequence", "pipeline", "context", "data", "zero", "replicate", "recompute", "micro_batch",
            "dropout", "label_smoothing"} <= set().union(*(mutant.axes for mutant in MUTANTS))  # fmt: skip


TAKEN_APART = {mutant.name for mutant in chosen(MUTANTS, 3)}
"""Of which smaller layouts are run, too, to find the axes that the fault needs."""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_is_caught(mutant: Mutant, proofs: dict[str, Proof]) -> None:
    timeout = 5 if mutant.name == "one_rank_waits" else 60
    proof = replace(proofs[mutant.family], plant=mutant.plant, timeout_s=timeout)
    verdict = proof.verify(parse(mutant.layout))
    assert not verdict.equal
    apart = mutant.name in TAKEN_APART
    finding = proof.explain(verdict, "disttrain verify x.yaml", bisect=apart)
    said = "\n".join(finding.lines())
    assert verdict.failures[0].phase == finding.first.phase == mutant.phase, said
    if apart:  # some causes show only then
        assert mutant.cause in finding.cause, said
        assert set(finding.axes) == mutant.axes, said
        assert finding.smallest.name in finding.rerun


IN_OWN_PRECISION = ("row_not_reduced", "partial_not_summed", "mean_of_ranks", "clip_by_local_norm", "stale_shard",
                    "tied_updated_on_one_side", "one_rank_skips_alone", "moments_lost", "stale_moments_saved")  # fmt: skip


def test_faults_show_in_bf16_too() -> None:
    """Not only losses and gradients: what follows from these is compared to the last bits in any precision."""
    chosen = [mutant for mutant in MUTANTS if mutant.name in IN_OWN_PRECISION]
    assert len(chosen) == len(IN_OWN_PRECISION)
    with proof_for("gpt", "bf16") as proof:
        for mutant in chosen:
            verdict = replace(proof, plant=mutant.plant).verify(parse(mutant.layout))
            assert [d.phase for d in verdict.failures[:1]] == [mutant.phase], mutant.name
