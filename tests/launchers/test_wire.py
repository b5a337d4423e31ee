"""Between hosts: bytes that are counted are those on the wire, and `auto` knows a slow link from a fast one."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chosen import ALL
from tests.launchers.hosts import Hosts

ROOT = Path(__file__).resolve().parents[2]
RANK = """
import json, os, sys, time
from pathlib import Path
from disttrain.importing import at_once
with at_once():
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
EACH_WAY = ("int8", "topk", "powersgd")
"""Codecs whose messages are exchanged, gathered and summed: what grows with the ranks is of the way, not of the codec."""


CHOOSING = """
import json, sys
from disttrain.importing import at_once
with at_once():
    import numpy as np
    import torch, torch.distributed as dist
    from disttrain import codec_choice
    from disttrain.config.load import with_values
    from tests.parallel.test_data_parallel import config_for, global_batch, make_engine

dist.init_process_group("gloo")
rank = dist.get_rank()
config = config_for("gpt", **{"model.hidden_size": 256, "model.ffn_hidden_size": 1024, "precision": "fp32"})
groups = make_engine(config, rank, dist.get_world_size()).groups
batch = {k: np.tile(v, (8, 1)) for k, v in global_batch("gpt", 1).items()}  # computing enough to be what takes time
auto = with_values(config, {"compression.codec": "auto"})
choice = codec_choice.choose(auto, groups, torch.device("cpu"), "fp32", [batch])
print(json.dumps({"best": choice.best.codec, "rate": choice.speed.bytes_per_second, "reason": choice.reason}), flush=True)
dist.destroy_process_group()
"""


def on_hosts(folder: Path, count: int, rate: str | None, script: str, *words: str) -> list[list[dict]]:
    """What each host's rank prints."""
    (folder / "rank.py").write_text(script)
    with Hosts(folder, count) as hosts:
        hosts.limit(rate)
        command = [sys.executable, str(folder / "rank.py"), *words]
        ranks = [hosts.start(rank, command, 29511, cwd=ROOT, stdout=subprocess.PIPE) for rank in range(count)]
        outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * count
    return [[json.loads(line) for line in output.splitlines()] for output in outputs]


@pytest.mark.parametrize("count", [2, 4])
def test_counted_bytes_are_those_on_the_wire(tmp_path: Path, count: int) -> None:
    cases = [case for case in CASES if count == 2 or ALL or case.get("compression.codec") in (None, *EACH_WAY)]
    for found in on_hosts(tmp_path, count, None, RANK, json.dumps(cases)):
        assert [case["words"] for case in found] == cases
        for case in found:
            # Ethernet, IP and TCP headers are 66 of 1514 bytes or less; acknowledgements and the small messages come on top.
            slack = 60_000
            assert case["counted"] < case["wire"] < 1.05 * case["counted"] + slack, case


CONFIG = """
model: {family: gpt, layers: 2, hidden_size: 256, heads: 4, max_positions: 64}
data: {corpus: python-docs, max_bytes: 1000000, tokenizer: bytes, sequence_length: 64}
train: {steps: 20, global_batch_size: 16}
compression: {codec: auto, look_every: 5, candidates: [int8]}
checkpoint: {keep: 1}
precision: fp32
run: {dir: runs, name: auto}
"""


def test_auto_chooses_anew_when_the_link_changes(tmp_path: Path) -> None:
    """A run of two hosts whose link becomes slow under way."""
    (tmp_path / "run.yaml").write_text(CONFIG)
    with Hosts(tmp_path, 2) as hosts:
        command = [sys.executable, "-m", "disttrain", "train", "run.yaml"]
        ranks = [hosts.start(rank, command, 29513, cwd=tmp_path, stdout=subprocess.DEVNULL) for rank in range(2)]
        metrics = tmp_path / "runs" / "auto" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and '"step": 6,' in metrics.read_text(), ranks[0])
        hosts.limit("50mbit")
        assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    first, *later = [r for r in records if r.get("event") == "codec_chosen"]
    assert first["message"].startswith("gradients stay whole: your link is fast enough")
    assert later[0]["message"].startswith("the link has changed from")
    assert "gradient codec int8" in later[0]["message"]
    steps = [r for r in records if r["kind"] == "step"]
    assert [r["step"] for r in steps] == list(range(1, 21))
    assert steps[-1]["wire_bytes_per_step"] < steps[0]["wire_bytes_per_step"] / 3
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert all(r["predicted_step_seconds"] > 0 for r in steps)
    elapsed = [r["elapsed_seconds"] for r in steps]
    assert elapsed == sorted(elapsed)


def wait_for(happened: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, "the run ended"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_auto_codes_on_a_slow_link_only(tmp_path: Path) -> None:
    slow, slow_too = (found[0] for found in on_hosts(tmp_path, 2, "20mbit", CHOOSING))
    assert slow == slow_too
    assert slow["best"] in ("int4", "powersgd")
    assert 0.8 * 2.5e6 < slow["rate"] < 1.1 * 2.5e6  # with a bucket of some milliseconds that is full at first
    fast, _ = (found[0] for found in on_hosts(tmp_path, 2, None, CHOOSING))
    assert fast["best"] == "none"
    assert fast["reason"].startswith("gradients stay whole")
