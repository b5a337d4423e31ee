"""Every engine is held to its row, and the tables that people read are the code's."""

from pathlib import Path

import pytest

from disttrain.capabilities import ENGINES, missing, table
from disttrain.config.load import load
from disttrain.engines import ENGINES as MAKERS

ROOT = Path(__file__).resolve().parents[2]
BEYOND = {
    "precision": "precision=fp64", "run.compile": "run.compile=true", "optim.name": "optim.name=lamb",
    "parallel.tensor": "parallel.tensor=2",
    "parallel.sequence": "parallel.sequence=true", "parallel.pipeline": "parallel.pipeline=2",
    "parallel.context": "parallel.context=2", "parallel.zero": "parallel.zero=2",
    "parallel.replicate": "parallel.replicate=2", "parallel.offload": "parallel.offload=true",
    "compression.codec": "compression.codec=topk", "outer.method": "outer.method=nesterov",
    "pruning.method": "pruning.method=keep", "quantization.aware": "quantization.aware=true",
    "watch.on_spike": "watch.on_spike=rollback", "watch.on_nonfinite": "watch.on_nonfinite=rollback",
    "deepspeed": "deepspeed={comms_logger: {enabled: true}}",
    "horovod": "horovod.compression=fp16",
}  # fmt: skip
"""For each feature that an engine may lack, a value beyond what every engine can do."""


def test_every_engine_has_a_row_and_a_maker() -> None:
    assert list(ENGINES) == list(MAKERS)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_beyond_a_row_is_refused_and_what_is_within_is_not(engine: str) -> None:
    for key, accepted in ENGINES[engine].items():
        if key not in BEYOND:
            assert accepted == "any", f"give a value beyond {key} of {engine}"
            continue
        refused = [
            s for p in missing(load("configs/gpt_tiny.yaml", [f"engine={engine}", BEYOND[key]])) for s in p.settings
        ]
        assert any(s.startswith(key) for s in refused) == (accepted != "any"), (key, refused)


@pytest.mark.parametrize("page", ["README.md", "docs/engines.md"])
def test_tables_are_generated(page: str) -> None:
    text = (ROOT / page).read_text()
    shown = text.split("<!-- capabilities -->\n")[1].split("<!-- /capabilities -->")[0]
    assert shown == table(), f"write capabilities.table() into {page}:\n{table()}"


def test_curves_have_a_row_for_every_launcher_and_engine() -> None:
    from tests.engines.curves import BEGIN, LOCAL, PAGE, SLURM

    shown = PAGE.read_text().split(BEGIN)[1]
    for launched, engine, *_ in LOCAL:
        assert f"| {launched} | {engine} | 2 |" in shown
    for script, engine, _ in SLURM:
        assert f"| `slurm/{script}` | {engine} | 4 |" in shown
