"""`check --trace`: what a rehearsal records is what a real run calls, legal layouts match, and planted faults are named."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import typer
import yaml
from torch import Tensor

from disttrain import checking
from disttrain.config.load import with_values
from disttrain.config.problems import RefusedInput
from disttrain.config.schema import Config
from disttrain.engines import objective
from disttrain.hang.observer import ledger
from disttrain.mesh import Mesh
from disttrain.parallel import collectives, gradients
from disttrain.parallel.groups import Group
from disttrain.parallel.stage import Stage
from disttrain.rehearsal.comparison import first_deadlock, first_mismatch
from disttrain.rehearsal.everyone import ranks_that_differ, rehearse
from disttrain.rehearsal.report import deadlock, disagreement
from disttrain.rehearsal.trace import batches_of, steps, trace
from disttrain.verify.layouts import parse
from disttrain.verify.matrix import full_matrix, sample
from tests.chosen import chosen
from tests.parallel.test_data_parallel import make_engine
from tests.ranks import run_ranks
from tests.verify.small import config_for

AS_GLOO = {"all_gather_into_tensor": "all_gather", "reduce_scatter": "all_reduce"}
SMALL = {"model.layers": 2, "train.global_batch_size": 4, "train.steps": 3}


def laid_out(name: str, family: str = "gpt", **values: object) -> tuple[Config, int]:
    layout = parse(name)
    return layout.applied(with_values(config_for(family), {**SMALL, **values})), layout.world


def trained(rank: int, config: Config, world: int) -> tuple[int, list[tuple]]:
    """Bytes of the last step, and every collective of the run."""
    engine, handed = make_engine(config, rank, world), 0
    for step in steps(config):
        engine.traffic()
        engine.step(batches_of(config, engine.groups.mesh, rank, step), step, 1e-3)
        handed = engine.traffic().handed
    engine.evaluate(batches_of(config, engine.groups.mesh, rank, 0))
    return handed, [(c.group.split()[1], c.sequence, c.operation, c.shapes) for c in ledger()]


@pytest.mark.parametrize(
    "name", ["dp2.zero2 on 2", "tp2.sp.dp2.mb1 on 4", "pp2-zbv.mb1 on 2", "cp2-ring.zero3.full on 2"]
)
def test_a_rehearsal_records_what_a_run_calls(name: str) -> None:
    config, world = laid_out(name, "gpt", **{"model.layers": 4} if "zbv" in name else {})
    with pytest.raises(RuntimeError):  # a world that nobody else joins: torch has counted its group all the same
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=2, timeout=timedelta(seconds=0.1))
    rehearsed = trace(config, world, world - 1)
    handed, called = run_ranks(trained, world, config, world)[-1]
    last = f"step {steps(config)[-1]}"
    assert rehearsed.handed_bytes == handed
    assert sum(r.handed_bytes for r in rehearsed.recorded if r.phase == last) == handed
    mine = [
        (r.call.group, r.call.sequence, AS_GLOO.get(r.call.operation, r.call.operation.split(" ")[0]), r.call.shapes)
        for r in rehearsed.recorded if r.ends is None
    ]  # fmt: skip
    newest = {(group, sequence) for group, sequence, *_ in called}  # a ledger is not endless
    assert [call for call in mine if call[:2] in newest] == called


def test_legal_layouts_match() -> None:
    config = with_values(config_for(), SMALL)
    sampled = sample([layout for layout in full_matrix(config, max_world=4) if layout.world > 1], 4, seed=1)
    for layout in chosen(sampled, 2):
        traces = rehearse(layout.applied(config), layout.world)
        assert [t.error for t in traces if t.error] == []
        assert first_mismatch(traces) is None and not first_deadlock(traces), layout
        assert all(t.recorded for t in traces)


@pytest.mark.parametrize(
    ("name", "family", "values"),
    [
        ("dp2.zero2 on 2", "gpt", {"compression.codec": "powersgd", "precision": "fp16"}),
        ("dp2 on 2", "gpt", {"compression.codec": "int4"}),
        ("dp2 on 2", "gpt", {"outer.method": "nesterov", "outer.every": 2, "outer.overlap": True}),
        ("tp2.cp2-ulysses.zero1 on 4", "bert", {}),
    ],
)
def test_codecs_workers_and_bert_match(name: str, family: str, values: dict) -> None:
    traces = rehearse(*laid_out(name, family, **values))
    assert [t.error for t in traces if t.error] == []
    assert first_mismatch(traces) is None and not first_deadlock(traces)
    assert sum(r.handed_bytes for r in traces[0].recorded if r.phase.startswith("step")) >= traces[0].handed_bytes > 0


def left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 does not count targets together with the others."""

    def reduce_over(group: Group, tensor: Tensor) -> Tensor:
        return tensor if dist.get_rank() == 1 else collectives.reduce_over(group, tensor)

    monkeypatch.setattr(objective, "reduce_over", reduce_over)


def other_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 sends its norm as a vector."""

    def reduce_over(group: Group, tensor: Tensor) -> Tensor:
        return collectives.reduce_over(group, tensor.view(1) if dist.get_rank() == 1 else tensor).view(())

    monkeypatch.setattr(gradients, "reduce_over", reduce_over)


def sent_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stage sends its last hidden states once more."""
    once = Stage.get_fwd_send_ops

    def ops(stage: Stage, number: int) -> list[dist.P2POp]:
        return once(stage, number) * (2 if number == 1 else 1)

    monkeypatch.setattr(Stage, "get_fwd_send_ops", ops)


def largest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 takes the largest norm, not the sum."""

    def reduce_over(group: Group, tensor: Tensor) -> Tensor:
        return collectives.reduce_over(group, tensor, dist.ReduceOp.MAX if dist.get_rank() == 1 else dist.ReduceOp.SUM)

    monkeypatch.setattr(gradients, "reduce_over", reduce_over)


@pytest.mark.parametrize(
    ("plant", "name", "told"),
    [
        (left_out, "dp2.zero1 on 2",
         [f"rank 0 calls all_reduce number 1 of group data (ranks 0, 1), int64 [2], at {__file__}:",
          "rank 1 calls all_gather_into_tensor number 1 of group data"]),
        (other_shape, "dp2.zero1 on 2",
         [f"rank 0 calls all_reduce number 10 of group data (ranks 0, 1), float64 [], at {__file__}", "float64 [1], at"]),
        (largest, "dp2.zero1 on 2",
         ["rank 0 calls all_reduce number 10 of group data", "rank 1 calls all_reduce of max number 10 of group data"]),
        (sent_twice, "pp2-1f1b.mb2 on 2",
         [" to rank 1 in group pipeline, float64 [2, 16, 16], at disttrain/", "rank 1 does not"]),
    ],
)  # fmt: skip
def test_planted_faults_are_named(
    plant: Callable[[pytest.MonkeyPatch], None], name: str, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, world = laid_out(name)
    plant(monkeypatch)
    traces = [trace(config, world, rank) for rank in range(world)]
    mismatch = first_mismatch(traces)
    assert mismatch is not None
    text = disagreement(mismatch, traces, config, world)
    assert [words for words in ["in step 1", *told] if words not in text] == [], text


def test_groups_in_another_order_are_a_deadlock(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()

    def reduce_over(group: Group, tensor: Tensor) -> Tensor:
        first = dist.get_rank() not in seen
        seen.add(dist.get_rank())
        if first and dist.get_rank() == 0:
            dist.all_reduce(torch.ones(3))
        reduced = collectives.reduce_over(group, tensor)
        if first and dist.get_rank() != 0:
            dist.all_reduce(torch.ones(3))
        return reduced

    config, world = laid_out("tp2.dp2.zero1 on 4")
    monkeypatch.setattr(objective, "reduce_over", reduce_over)
    traces = [trace(config, world, rank) for rank in range(world)]
    assert first_mismatch(traces) is None
    text = deadlock(first_deadlock(traces), traces, config, world)
    assert "would wait for each other for ever in step 1: rank 0 waits in all_reduce number" in text
    assert "of group world (ranks 0 to 3), float32 [3], at" in text, text
    assert ", for rank 0. They call the same, in another order." in text


OWN = """
import torch.distributed as dist
from disttrain.models.gpt import GPT

class Own(GPT):
    def forward_batch(self, batch, x=None):
        y = super().forward_batch(batch, x)
        if dist.is_initialized() and dist.get_rank() == {rank}:
            {line}
        return y
"""


def own(folder: Path, line: str, rank: int = 1) -> tuple[Path, list[str]]:
    (folder / "own.py").write_text(OWN.format(line=line, rank=rank))
    path = folder / "own.yaml"
    values = {
        **SMALL,
        "run.dir": str(folder / "runs"),
        "model.vocab_size": 261,
        "model.dropout": 0.0,
        "train.global_batch_size": 8,
    }
    config = with_values(config_for(), values).model_dump(mode="json", exclude_defaults=True)
    path.write_text(yaml.safe_dump(config))
    return path, [f"model.source={folder / 'own.py'}:Own", "parallel.tensor=2", "model.layers=1"]


def test_a_users_model_that_calls_on_one_rank_only(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path, words = own(tmp_path, "dist.broadcast(y.detach().sum(), 0)")
    with pytest.raises(typer.Exit) as ended:
        checking.check(path, words, 2, trace=True)
    assert ended.value.exit_code == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "calls broadcast from rank 0 number" in text
    assert "of group tensor (ranks 0, 1), float64 []" in text and "own.py:9" in text.replace(" ", "")


def test_a_rank_that_fails_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path, words = own(tmp_path, "y[y > 0]")
    with pytest.raises(typer.Exit) as ended:
        checking.check(path, words, 2, trace=True)
    assert ended.value.exit_code == 1
    assert "Rank 1 fails at" in (text := capsys.readouterr().out) and "depends on values" in " ".join(text.split())


def test_the_table_of_a_layout_that_matches(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path, words = own(tmp_path, "pass")
    checking.check(path, [*words, "parallel.zero=1"], 8, trace=True)
    text = capsys.readouterr().out
    assert "rehearsed 6 of 8 ranks" in text and "match" in text
    assert "6 all_reduce, 1 all_gather_into_tensor" in text


def test_what_cannot_be_rehearsed_is_refused(tmp_path: Path) -> None:
    path, _ = own(tmp_path, "pass")
    with pytest.raises(RefusedInput) as refused:
        checking.check(path, ["engine=horovod", "compression.codec=topk"], 2, trace=True)
    assert sum("--trace" in problem.settings for problem in refused.value.problems) == 2


def test_ranks_that_only_read_other_sequences_are_left_out() -> None:
    mesh = Mesh(pipeline=2, replicate=4, shard=1, context=1, tensor=2)
    assert ranks_that_differ(mesh) == [0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 14, 15]
