"""Which device a rank gets, and when it is refused."""

import platform
import resource

import pytest
import torch

from disttrain.assembly import choose_device, keep_freed_memory
from disttrain.config.problems import RefusedInput
from disttrain.config.schema import Config, RunConfig
from disttrain.launch import RankInfo


def rank(launcher: str, local_rank: int, local_world_size: int) -> RankInfo:
    return RankInfo(launcher, local_rank, local_world_size, local_rank, local_world_size, 0, 1, "127.0.0.1", 29500)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("device", "launcher", "local_rank", "ranks", "gpus", "expected"),
    [
        ("auto", "none", 0, 1, 0, "cpu"),
        ("auto", "torchrun", 1, 2, 0, "cpu"),
        ("cpu", "torchrun", 1, 2, 8, "cpu"),
        ("auto", "torchrun", 1, 2, 2, "cuda:1"),
        ("cuda", "torchrun", 3, 4, 8, "cuda:3"),
        ("auto", "srun", 3, 4, 1, "cuda:0"),  # --gpus-per-task=1 shows each rank its own
        ("auto", "torchrun", 1, 2, 1, None),  # never silently on the CPU
        ("cuda", "none", 0, 1, 0, None),
    ],
)
def test_device(monkeypatch, device, launcher, local_rank, ranks, gpus, expected) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config = Config(run=RunConfig(device=device))
    if expected is None:
        with pytest.raises(RefusedInput, match="GPUs for"):
            choose_device(config, rank(launcher, local_rank, ranks))
    else:
        assert choose_device(config, rank(launcher, local_rank, ranks)) == torch.device(expected)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has other settings")
def test_large_tensors_cost_no_page_faults() -> None:
    """64 MiB allocated again and again: the kernel is asked for it at first, not every time."""
    assert keep_freed_memory()
    for _ in range(10):
        torch.ones(1 << 24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(1 << 24)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < (5 << 26) // 4096 // 10
