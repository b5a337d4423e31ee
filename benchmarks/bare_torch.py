"""A training loop by hand: one process or DistributedDataParallel, nothing from disttrain but the model class.

python bare_torch.py WORKLOAD.json, or torchrun --nproc-per-node N bare_torch.py WORKLOAD.json
"""

import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from workload import Workload, write_rank_report

from disttrain.config.schema import ModelConfig
from disttrain.models import build_model


def main(path: Path) -> None:
    """Train and report the time of every step."""
    w = Workload.read(path)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    cuda = w.device == "cuda"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")

    model = build_model(
        ModelConfig(
            layers=w.layers,
            hidden_size=w.hidden_size,
            heads=w.heads,
            ffn_hidden_size=4 * w.hidden_size,
            max_positions=w.sequence_length,
            vocab_size=w.vocab_size,
            layer_norm_epsilon=1e-5,
        ),
        seed=0,
        device=device,
    )
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": w.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=w.learning_rate, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.55 + 0.45 * math.cos(math.pi * i / w.steps))
    train = (
        DistributedDataParallel(model, [device] if cuda else None, gradient_as_bucket_view=True) if world > 1 else model
    )

    stream = w.stream()
    random = np.random.default_rng(rank)
    length = w.sequence_length
    seconds, losses = [], []
    for _ in range(w.steps):
        began = time.perf_counter()
        starts = random.integers(0, len(stream) - length, w.micro_batch_size)
        rows = torch.from_numpy(np.stack([stream[s : s + length + 1] for s in starts]).astype(np.int64)).to(device)
        with torch.autocast(w.device, dtype=torch.bfloat16, enabled=w.precision == "bf16"):
            logits = train(rows[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), w.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())  # what a loop logs; waits for the device
        seconds.append(time.perf_counter() - began)
    device_bytes = torch.cuda.max_memory_allocated() if cuda else None
    write_rank_report(path, step_seconds=seconds, losses=losses, device_bytes=device_bytes)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
