"""Layouts at world size 1 on a CPU and, where there is one, on a GPU: the same losses, and no waiting for the device."""

from pathlib import Path

import pytest

from tests.gpu.test_device import DEVICES, execute, train
from tests.runs.conftest import Workplace, workplace

__all__ = ["workplace"]

LAYOUTS = {
    "zero 3, full": ["parallel.zero=3", "parallel.recompute=full"],
    "zero 3, offload": ["parallel.zero=3", "parallel.offload=true"],
    "selective": ["parallel.recompute=selective", "train.micro_batch_size=4"],
}


@pytest.mark.parametrize("device", DEVICES)
def test_layouts_follow_float64(workplace: Workplace, device: str) -> None:
    reference = [r["loss"] for r in train(workplace, "cpu", "precision=fp64")]
    for name, layout in LAYOUTS.items():
        found = [r["loss"] for r in train(workplace, device, "precision=bf16", *layout)]
        assert found == pytest.approx(reference, rel=3e-2), name


@pytest.mark.gpu
def test_compiled_blocks_follow_float64(workplace: Workplace) -> None:
    """On a CPU: tests/parallel/test_recompute.py."""
    reference = [r["loss"] for r in train(workplace, "cpu", "precision=fp64")]
    found = [r["loss"] for r in train(workplace, "cuda", "precision=bf16", "run.compile=true", "parallel.zero=2")]
    assert found == pytest.approx(reference, rel=3e-2)


STEPS = """
import sys
import numpy as np
import torch
import torch.distributed as dist
from disttrain.config.load import with_values
from disttrain.config.schema import Config
from disttrain.engines.native import NativeEngine
from disttrain.mesh import build_mesh
from disttrain.parallel.collectives import Traffic
from disttrain.parallel.groups import make_groups

device = torch.device(sys.argv[1], 0) if sys.argv[1] == "cuda" else torch.device("cpu")
backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
shape = {"layers": 2, "hidden_size": 64, "heads": 4, "ffn_hidden_size": 128, "max_positions": 32, "vocab_size": 101,
         "layer_norm_epsilon": 1e-5, "dropout": 0.1}
config = Config.model_validate({"model": shape, "precision": "bf16", "train": {"steps": 4, "global_batch_size": 8}})
config = with_values(config, {"parallel.zero": int(sys.argv[2]), "data.sequence_length": 32})
engine = NativeEngine(config, make_groups(build_mesh(config.parallel, 1), 0, device.type, Traffic()), device, "bf16")
rng = np.random.default_rng(0)
results = []
for step in range(1, 5):
    tokens = rng.integers(0, 101, (2, 4, 32))
    batches = [{"tokens": t, "targets": t, "samples": np.arange(4) + 8 * step + 4 * i} for i, t in enumerate(tokens)]
    if device.type == "cuda" and step > 2:
        torch.cuda.set_sync_debug_mode("error")  # any wait for the device raises
    results.append(engine.step(batches, step, 1e-3))
if device.type == "cuda":
    torch.cuda.set_sync_debug_mode("default")
losses = [float(r.losses["lm"].sum / r.losses["lm"].count) for r in results]
assert losses[-1] < losses[0], losses
engine.close()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("zero", ["0", "3"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_does_not_wait_for_the_device(tmp_path: Path, device: str, zero: str) -> None:
    execute(STEPS, tmp_path, device, zero)
