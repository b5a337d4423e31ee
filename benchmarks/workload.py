"""What every contestant of the throughput benchmark trains, and what each of its ranks reports (no torch).

A contestant is a script called as ``python SCRIPT WORKLOAD.json``; each rank writes ``rank_<r>.json`` beside that file.
"""

import json
import os
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Workload:
    """Model, data, arithmetic and length of one run."""

    layers: int
    hidden_size: int
    heads: int
    vocab_size: int
    sequence_length: int
    """Tokens of a sequence, and the model's positions."""
    micro_batch_size: int
    """Sequences of a step on one rank."""
    tokens: str
    """File of token ids, without header."""
    token_type: str
    """numpy name of the ids' type, such as uint16."""
    precision: str
    """fp32 or bf16."""
    device: str
    """cpu or cuda."""
    steps: int
    """Optimizer steps, warm-up included."""
    learning_rate: float = 3e-4
    weight_decay: float = 0.1
    clip_grad_norm: float = 1.0

    @classmethod
    def read(cls, path: Path) -> "Workload":
        """The workload that `write` wrote."""
        return cls(**json.loads(path.read_text()))

    def write(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1))

    def stream(self) -> np.ndarray:
        """The token ids, memory-mapped, [tokens]."""
        return np.memmap(self.tokens, dtype=self.token_type, mode="r")


def write_rank_report(workload_path: Path, **values: object) -> None:
    """Write what this rank measured; `host_bytes` (peak resident memory of this process) is added."""
    rank = int(os.environ.get("RANK", "0"))
    record = {"host_bytes": peak_resident_bytes(), **values}
    (workload_path.parent / f"rank_{rank}.json").write_text(json.dumps(record))


def peak_resident_bytes() -> int:
    """Most resident memory of this process so far. VmHWM where there is one: ru_maxrss survives exec on Linux."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
