"""The header record of a run: what ran, where, and in which versions."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from disttrain import __version__
from disttrain.assembly import Session

PACKAGES = ("numpy", "tokenizers", "datasets", "transformers", "tensorboard", "wandb", "deepspeed", "horovod", "mpi4py")


def header(session: Session, resumed_step: int | None) -> dict[str, Any]:
    """The header record; its keys are explained in docs/measurement.md."""
    peak = session.peak_flops
    return {
        "kind": "header",
        "name": session.config.run.name,
        "config": session.config.model_dump(mode="json"),
        "mesh": dict(zip(("pipeline", "replicate", "shard", "context", "tensor"), session.mesh.sizes, strict=True)),
        "world_size": session.rank.world_size,
        "launcher": session.rank.launcher,
        "versions": versions(),
        "hardware": {
            "host": platform.node(),
            "device": session.device_name,
            "devices": session.rank.world_size,
            "cores": len(os.sched_getaffinity(0)),
            "threads_per_rank": torch.get_num_threads(),
            "memory_bytes": psutil.virtual_memory().total,
        },
        "precision": session.config.precision,
        "parameters": session.parameters,
        "flops_six_n_per_sequence": session.flops.six_n,
        "flops_causal_per_sequence": session.flops.causal,
        "flops_full_per_sequence": session.flops.full,
        "flops_hardware_per_sequence": session.flops.hardware,
        "peak_flops_per_second": peak[0] if peak else None,
        "peak_flops_source": peak[1] if peak else f"no datasheet figure for {session.device_name}",
        "energy_source": session.energy_source,
        "git_commit": git_commit(),
        "resumed_step": resumed_step,
    }


def versions() -> dict[str, str]:
    """Version of disttrain, Python, torch and each optional package that is installed."""
    found = {"disttrain": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of disttrain when it runs from a checkout, with ``+`` when files were changed; None otherwise."""
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / ".git").exists():
        return None
    try:
        commit = _git(checkout, "rev-parse", "HEAD")
        return commit + ("+" if _git(checkout, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(checkout: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
