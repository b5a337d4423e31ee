"""Bytes that are counted are the bytes on the wire: two and four hosts, read from their network interfaces."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launchers.hosts import Hosts

ROOT = Path(__file__).resolve().parents[2]
RANK = """
import json, os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from disttrain.config.load import with_values
from tests.parallel.test_data_parallel import config_for, global_batch, make_engine

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
sent = lambda: int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())
for words in json.loads(sys.argv[1]):
    config = config_for("gpt", **{"model.hidden_size": 256, "model.ffn_hidden_size": 1024, "precision": "fp32", **words})
    engine = make_engine(config, rank, world)
    share = 8 // world
    batch = {k: v[rank * share : (rank + 1) * share] for k, v in global_batch("gpt", 1).items()}
    engine.step([batch], 1, 0.0)  # DDP settles
    engine.traffic()
    dist.barrier()
    before = sent()
    for step in range(2, 5):
        engine.step([batch], step, 0.0)
    print(json.dumps({"words": words, "wire": sent() - before, "counted": engine.traffic().on_wire}), flush=True)
    dist.barrier()
    engine.close()
dist.destroy_process_group()
"""
CASES = [
    {},
    {"parallel.zero": 2},
    *({"compression.codec": codec} for codec in ("bf16", "int8", "int4", "sign", "topk", "randomk", "powersgd")),
    {"parallel.zero": 2, "compression.codec": "int8"},
]


@pytest.mark.parametrize("count", [2, 4])
def test_counted_bytes_are_those_on_the_wire(tmp_path: Path, count: int) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    with Hosts(tmp_path, count) as hosts:
        ranks = []
        for rank, name in enumerate(hosts.names):
            environment = {
                **os.environ, "RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": hosts.addresses[0],
                "MASTER_PORT": "29511", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            }  # fmt: skip
            command = ["ip", "netns", "exec", name, sys.executable, str(tmp_path / "rank.py"), json.dumps(CASES)]
            ranks.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * count
    for output in outputs:
        found = [json.loads(line) for line in output.splitlines()]
        assert [case["words"] for case in found] == CASES
        for case in found:
            # Ethernet, IP and TCP headers are 66 of 1514 bytes or less; acknowledgements and the small messages come on top.
            slack = 60_000
            assert case["counted"] < case["wire"] < 1.05 * case["counted"] + slack, case
