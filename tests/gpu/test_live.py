"""Counted bytes of live tensors at world size 1; on a GPU they are what its allocator has handed out."""

from pathlib import Path

import pytest

from tests.gpu.test_device import DEVICES, execute

COUNT = """
import sys
import torch
import torch.distributed as dist
from disttrain import memory
from disttrain.config.load import with_values
from disttrain.config.schema import Config
from disttrain.mesh import build_mesh
from disttrain.rehearsal.trace import count_here, rehearsed

device = sys.argv[1]
dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
shape = {"layers": 4, "hidden_size": 256, "heads": 4, "ffn_hidden_size": 1024, "max_positions": 128, "vocab_size": 2048,
         "layer_norm_epsilon": 1e-5}
precision = "bf16" if device == "cuda" else "fp32"  # which some CPUs multiply much faster
config = Config.model_validate({"model": shape, "precision": precision, "train": {"steps": 4, "global_batch_size": 4}})
config = with_values(config, {"parallel.zero": int(sys.argv[2]), "data.sequence_length": 128,
                              "train.micro_batch_size": 1})
live = count_here(0, config, device)
mesh = build_mesh(config.parallel, 1)
(predicted,) = memory.predict(rehearsed(config, mesh), mesh, precision, 4, device)
print(live, predicted)
assert abs(predicted.total / live.total - 1) < (0.05 if device == "cpu" else 0.1), (live, predicted)
if device == "cuda":
    most = torch.cuda.max_memory_allocated()
    assert 0.95 * most < live.total <= 1.001 * most, (live, most)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("zero", ["2"])
@pytest.mark.parametrize("device", DEVICES)
def test_the_count_is_the_allocators(tmp_path: Path, device: str, zero: str) -> None:
    execute(COUNT, tmp_path, device, zero)
