"""Between hosts: bytes that are counted are those on the wire, and `auto` knows a slow link from a fast one."""

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


CHOOSING = """
import json, sys
import torch, torch.distributed as dist
from disttrain.parallel import codec_choice
from tests.parallel.test_data_parallel import config_for, make_engine

dist.init_process_group("gloo")
config = config_for("gpt", **{"model.hidden_size": 256, "model.ffn_hidden_size": 1024, "precision": "fp32"})
groups = make_engine(config, dist.get_rank(), dist.get_world_size()).groups
choice = codec_choice.choose(config, groups, groups.data, torch.device("cpu"))
print(json.dumps({"best": choice.best.codec, "rate": choice.speed.bytes_per_second, "reason": choice.reason}), flush=True)
dist.destroy_process_group()
"""


def on_hosts(folder: Path, count: int, rate: str | None, script: str, *words: str) -> list[list[dict]]:
    """What each host's rank prints."""
    (folder / "rank.py").write_text(script)
    with Hosts(folder, count) as hosts:
        hosts.limit(rate)
        ranks = []
        for rank, name in enumerate(hosts.names):
            environment = {
                **os.environ, "RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": hosts.addresses[0],
                "MASTER_PORT": "29511", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            }  # fmt: skip
            command = ["ip", "netns", "exec", name, sys.executable, str(folder / "rank.py"), *words]
            ranks.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * count
    return [[json.loads(line) for line in output.splitlines()] for output in outputs]


@pytest.mark.parametrize("count", [2, 4])
def test_counted_bytes_are_those_on_the_wire(tmp_path: Path, count: int) -> None:
    for found in on_hosts(tmp_path, count, None, RANK, json.dumps(CASES)):
        assert [case["words"] for case in found] == CASES
        for case in found:
            # Ethernet, IP and TCP headers are 66 of 1514 bytes or less; acknowledgements and the small messages come on top.
            slack = 60_000
            assert case["counted"] < case["wire"] < 1.05 * case["counted"] + slack, case


def test_auto_codes_on_a_slow_link_only(tmp_path: Path) -> None:
    slow, slow_too = (found[0] for found in on_hosts(tmp_path, 2, "20mbit", CHOOSING))
    assert slow == slow_too
    assert slow["best"] in ("sign", "topk", "powersgd")
    assert 0.8 * 2.5e6 < slow["rate"] < 1.1 * 2.5e6  # with a bucket of some milliseconds that is full at first
    fast, _ = (found[0] for found in on_hosts(tmp_path, 2, None, CHOOSING))
    assert fast["best"] == "none"
    assert fast["reason"].startswith("gradients stay whole")
