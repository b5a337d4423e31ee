"""What a whole run records does not depend on its layout, and says what the layout cost."""

import pytest

from tests.runs.conftest import Workplace

COUNTED = ("tokens_seen", "target_tokens", "padded_tokens")
BERT = [
    "model.family=bert", "model.layers=2", "model.max_positions=128", "data.sequence_length=128", "data.document=line",
    "train.steps=2", "train.eval_every=0",
]  # fmt: skip
"""Lines fill about half of a sequence."""


def run(workplace: Workplace, name: str, ranks: int, *words: str) -> list[dict]:
    workplace.run("train", "run.yaml", *BERT, f"run.name={name}", "--nproc", str(ranks), *words)
    return workplace.records(name, "step")


@pytest.mark.slow
def test_layouts_count_the_same_tokens_and_divide_rates_by_the_world(workplace: Workplace) -> None:
    """Every rank of a model-parallel layout sees the same sequences; they count once."""
    alone = run(workplace, "alone", 1)
    assert any(record["padded_tokens"] > 0 for record in alone)
    layouts: dict[str, tuple] = {
        "tensor": (4, "parallel.tensor=2", "parallel.pipeline=2", "train.micro_batch_size=2"),
        "context": (2, "parallel.context=2", "parallel.zero=3"),
    }
    for name, (ranks, *words) in layouts.items():
        records = run(workplace, name, ranks, *words)
        header = workplace.records(name, "header")[0]
        assert len(records) == len(alone) == 2
        for ours, expected in zip(records, alone, strict=True):
            assert [ours[key] for key in COUNTED] == [expected[key] for key in COUNTED]
            assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert ours["sequences_per_second"] * ours["step_seconds"] == pytest.approx(8)
            assert ours["tokens_per_second_per_rank"] == ours["tokens_per_second"] / ranks
            flops = header["flops_causal_per_sequence"] / 128 * ours["tokens_per_second"]  # padding is no use
            assert ours["model_flops_per_second_per_rank"] == pytest.approx(flops / ranks)
            pipelined = name == "tensor"
            assert ours["pipeline_bubble_fraction_theory"] == (pytest.approx(1 / 5) if pipelined else None)
            assert (ours["pipeline_bubble_fraction"] is not None) == pipelined
            assert not pipelined or 0 < ours["pipeline_bubble_fraction"] < 1
    assert all(record["pipeline_bubble_fraction"] is None for record in alone)
