"""The same checks on a CPU and, where there is one, on a GPU: a run there equals float64 on the CPU within its precision."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from disttrain.precision import choose
from tests import warm
from tests.runs.conftest import Workplace, workplace

__all__ = ["workplace"]

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def train(place: Workplace, device: str, *words: str) -> list[dict]:
    name = f"{device}_{len(list(place.folder.glob('runs/*')))}"
    command = ("train", "run.yaml", f"run.name={name}", f"run.device={device}", "model.dropout=0", *words)
    if device == "cpu":
        place.run(*command)
    else:  # a process of its own
        subprocess.run(place.command(*command), cwd=place.folder, env=place.environment, check=True, timeout=200)
    return place.records(name, "step")


def execute(program: str, folder: Path, device: str, *words: str) -> None:
    """Run a program: on a CPU in a fork of a process that has imported torch, on a GPU in a process of its own."""
    path = folder / "program.py"
    path.write_text(program)
    if device == "cpu":
        running = warm.Running((device, *words), folder, os.environ, script=path)
        said = running.communicate(timeout=200)
        assert running.returncode == 0, said
    else:
        subprocess.run([sys.executable, str(path), device, *words], check=True, timeout=200)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-3), ("bf16", 3e-2), ("fp16", 1e-2)])
def test_low_precision_runs_follow_float64(workplace: Workplace, device: str, precision: str, tolerance: float) -> None:
    reference = [r["loss"] for r in train(workplace, "cpu", "precision=fp64")]
    records = train(workplace, device, f"precision={precision}")
    assert [r["loss"] for r in records] == pytest.approx(reference, rel=tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_memory_and_mfu_are_reported_where_they_are_known(workplace: Workplace, device: str) -> None:
    last = train(workplace, device, "precision=bf16")[-1]
    assert last["host_rss_bytes_max"] > 50e6
    assert (last["peak_allocated_bytes_max"] is None) == (device == "cpu")
    header = json.loads((next(workplace.folder.glob("runs/*")) / "metrics.jsonl").read_text().splitlines()[0])
    assert (last["mfu_causal"] is None) == (header["peak_flops_per_second"] is None)
    assert header["peak_flops_source"]


@pytest.mark.gpu
def test_auto_takes_bf16_where_the_gpu_multiplies_it() -> None:
    assert choose("auto", "cuda") == ("bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp32")
