"""Seconds and bytes of a step under each gradient codec, between emulated hosts whose link is limited.

python benchmarks/compression.py [--hosts 2 4] [--rates 10mbit 100mbit 1gbit off] [--steps N] [--only NAME ...]
                                 [--train-s SECONDS --text FILE]

Hosts are network namespaces with one rank each, joined by a bridge; tc limits what each sends and receives. Needs root and
Linux. Every variant of one (hosts, rate) runs in the same processes one after the other, so that figures are ratios within
one run. torch's own hooks and Horovod's fp16 are measured beside. With --train-s each trains on the bytes of a text for so
many seconds and to as many steps as the first one did, for held-out losses at equal time and at equal tokens. Writes
compression_<hardware>_<yyyymm>.{json,md}.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

BASE = "none"
VARIANTS: dict[str, tuple[str, ...]] = {
    BASE: (),
    "bf16": ("compression.codec=bf16",),
    "int8": ("compression.codec=int8",),
    "int4": ("compression.codec=int4",),
    "qsgd, 2 bits": ("compression.codec=qsgd", "compression.bits=2"),
    "sign": ("compression.codec=sign",),
    "top-k, 1 %": ("compression.codec=topk",),
    "random-k, 1 %": ("compression.codec=randomk",),
    "threshold, 3 rms": ("compression.codec=threshold",),
    "PowerSGD, rank 4": ("compression.codec=powersgd",),
    "DiLoCo, 32 steps": ("outer.method=nesterov", "outer.every=32"),
    "DiLoCo, 32 steps, int8": ("outer.method=nesterov", "outer.every=32", "compression.codec=int8"),
    "DiLoCo, 32 steps, streaming": ("outer.method=nesterov", "outer.every=32", "outer.fragments=4", "outer.overlap=4"),
    "torch DDP": ("torch", "none"),
    "torch fp16 hook": ("torch", "fp16"),
    "torch PowerSGD hook, rank 4": ("torch", "powersgd"),
    "Horovod": ("engine=horovod",),
    "Horovod fp16": ("engine=horovod", "horovod.compression=fp16"),
}
WORKLOAD = ("model.preset=gpt-10m", "model.vocab_size=256", "data.tokenizer=bytes", "data.sequence_length=256",
            "train.steps=100000", "precision=fp32")  # fmt: skip
RATE, WARM_UP = 5e-4, 10
"""Learning rate, constant after so many steps of linear warm-up."""
HELD_OUT = 32
"""Sequences at the end of the text."""
ENOUGH_S = 40.0
"""No further step of a variant begins after so many seconds."""


def main() -> None:
    """Measure and write the JSON and Markdown files."""
    if sys.argv[1:2] == ["--rank"]:
        return measure(json.loads(sys.argv[2]), argparse.Namespace(**json.loads(sys.argv[3])))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rates", nargs="+", default=["10mbit", "100mbit", "1gbit", "off"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=1, help="of each rank in a step")
    parser.add_argument("--only", nargs="+", default=list(VARIANTS))
    parser.add_argument("--train-s", type=float, default=0.0, help="train for so many seconds, too")
    parser.add_argument("--text", default=str(ROOT / "../shared/data/wikitext-2/train.txt"), help="what to train on")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    about = report.describe("cpu", 1, "python benchmarks/compression.py " + shlex.join(sys.argv[1:]))
    about["versions"]["horovod"] = report.version("horovod")
    about |= {"sequences_per_rank": options.sequences, "train_s": options.train_s}
    out = options.out or HERE / report.file_name(about).replace("throughput_", "compression_")
    runs: list[dict[str, Any]] = []
    for count in options.hosts:
        for rate in options.rates:
            runs += between_hosts(count, rate, options)
            out.with_suffix(".json").write_text(json.dumps({"about": about, "runs": runs}, indent=1))
            out.with_suffix(".md").write_text(markdown(about, runs))
    print(out.with_suffix(".md"))


def between_hosts(count: int, rate: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every variant on so many hosts with this link."""
    from tests.launchers.hosts import Hosts

    variants = {name: VARIANTS[name] for name in options.only if "orovod" not in name or report.version("horovod")}
    with tempfile.TemporaryDirectory() as scratch, Hosts(Path(scratch), count) as hosts:
        hosts.limit(None if rate == "off" else rate)
        ranks = []
        for rank, name in enumerate(hosts.names):
            environment = {
                **os.environ, "RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": hosts.addresses[0], "MASTER_PORT": "29512", "GLOO_SOCKET_IFNAME": "eth0",
                "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            }  # fmt: skip
            told = {name: getattr(options, name) for name in ("steps", "sequences", "train_s", "text")}
            words = ["--rank", json.dumps(variants), json.dumps(told)]
            script = shlex.join([sys.executable, str(HERE / "compression.py"), *words])
            named = ["unshare", "--uts", "sh", "-c", f"hostname {name}; exec {script}"]
            command = ["ip", "netns", "exec", name, *named]
            ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        outputs = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"a rank failed: {[rank.returncode for rank in ranks]}")
    of_ranks = [[json.loads(line) for line in output.splitlines() if line.startswith("{")] for output in outputs]
    runs = []
    for readings in zip(*of_ranks, strict=True):
        seconds = [max(step) for step in zip(*(r["seconds"] for r in readings), strict=True)]
        runs.append({**readings[0], "hosts": count, "rate": rate, "seconds": seconds,
                     "wire_bytes": max(r["wire_bytes"] for r in readings)})  # fmt: skip
        last = runs[-1]
        print(f"{count} hosts, {rate}, {last['name']}: {statistics.median(seconds):.3f} s a step, "
              f"{last['wire_bytes'] / 1e6:.2f} MB", file=sys.stderr, flush=True)  # fmt: skip
    return runs


def measure(variants: dict[str, Sequence[str]], options: argparse.Namespace) -> None:
    """One rank: train a few steps of each variant, or for some time, and print a line for each."""
    import torch.distributed as dist

    from disttrain.assembly import keep_freed_memory

    keep_freed_memory()
    dist.init_process_group("gloo")
    tokens = Tokens(options)
    enough = 0  # steps of the first variant
    for name, words in variants.items():
        start = torch_loop if words[:1] == ["torch"] else our_engine
        rounds = next((int(word.split("=")[1]) for word in words if word.startswith("outer.every")), 1)
        loop = start(words, tokens)
        reading = {"name": name, **seconds_and_bytes(loop, -(-options.steps // rounds) * rounds, rounds)}
        loop.close()
        if options.train_s:
            loop = start(words, tokens)
            reading |= losses(loop, options.train_s, enough)
            enough = enough or reading["steps"]
            loop.close()
        print(json.dumps(reading), flush=True)
    dist.destroy_process_group()


def seconds_and_bytes(loop: "Loop", steps: int, rounds: int) -> dict[str, Any]:
    """Of each step after two, or of the mean step of each round."""
    import torch.distributed as dist

    seconds: list[float] = []
    before, began = 0, 0.0
    loop.counted()
    for number in range(1, steps + 3):
        if number == 3:  # after warm-up
            loop.counted()
            before, began = sent(), time.perf_counter()
        dist.barrier()
        start = time.perf_counter()
        loop.step(number)
        dist.barrier()
        if number >= 3:
            seconds.append(time.perf_counter() - start)
            if len(seconds) % rounds == 0 and agreed(time.perf_counter() - began > ENOUGH_S):
                break
    counted = {key: value / len(seconds) for key, value in loop.counted().items()}
    means = [statistics.mean(seconds[i : i + rounds]) for i in range(0, len(seconds), rounds)]
    return {"seconds": means, "wire_bytes": (sent() - before) / len(seconds), **counted}


def losses(loop: "Loop", train_s: float, enough: int) -> dict[str, Any]:
    """Held-out losses, in nats a byte, after so many seconds in steps, and after `enough` of them."""
    spent, number, found = 0.0, 0, {}
    while "loss_at_time" not in found or number < enough:
        number += 1
        start = time.perf_counter()
        loop.step(number)
        spent += time.perf_counter() - start
        if "loss_at_time" not in found and agreed(spent >= train_s):
            found |= {"loss_at_time": loop.evaluate(), "steps": number}
        if number == enough:
            found["loss_at_tokens"] = loop.evaluate()
    return {"loss_at_tokens": found["loss_at_time"], **found} if not enough else found


def sent() -> int:
    """Bytes that left this host."""
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


def agreed(flag: bool) -> bool:
    """The first rank's flag."""
    import torch
    import torch.distributed as dist

    told = torch.tensor(flag, dtype=torch.uint8)
    dist.broadcast(told, src=0)
    return bool(told)


class Tokens:
    """Bytes of a text where there is one, else random ones: windows to train on, and the same held-out ones for all."""

    def __init__(self, options: argparse.Namespace):
        import numpy as np

        self.sequences, length = options.sequences, 257
        if options.train_s:
            text = np.frombuffer(Path(options.text).read_bytes()[: 1 << 24], dtype=np.uint8).astype(np.int64)
        else:
            text = np.random.default_rng(0).integers(0, 256, 1 << 16)
        kept = len(text) - HELD_OUT * length
        self.train, self.held_out = text[:kept], text[kept:].reshape(HELD_OUT, length)

    def windows(self, number: int, rank: int) -> Any:
        """[sequences, 257] of step `number`."""
        import numpy as np

        starts = np.random.default_rng((number, rank)).integers(0, len(self.train) - 257, self.sequences)
        return np.stack([self.train[start : start + 257] for start in starts])


@dataclass
class Loop:
    """What is measured."""

    step: Callable[[int], Any]
    counted: Callable[[], dict[str, float]]
    evaluate: Callable[[], float]
    close: Callable[[], Any]


def rate(number: int) -> float:
    """Learning rate of a step."""
    return RATE * min(1.0, number / WARM_UP)


def our_engine(words: Sequence[str], tokens: Tokens) -> Loop:
    """disttrain's engine."""
    import torch
    import torch.distributed as dist

    from disttrain import engines
    from disttrain.config.load import load
    from disttrain.mesh import build_mesh
    from disttrain.parallel.collectives import Traffic
    from disttrain.parallel.groups import make_groups

    rank, ranks = dist.get_rank(), dist.get_world_size()
    config = load(HERE / "gpt_10m.yaml", [*WORKLOAD, f"train.global_batch_size={tokens.sequences * ranks}",
                                         f"train.micro_batch_size={tokens.sequences}", *words])  # fmt: skip
    groups = make_groups(build_mesh(config.parallel, ranks), rank, "cpu", Traffic())
    engine = engines.build(config, groups, torch.device("cpu"), "fp32")

    def step(number: int) -> None:
        windows = tokens.windows(number, rank)
        engine.step([{"tokens": windows[:, :-1], "targets": windows[:, 1:]}], number, rate(number))

    def counted() -> dict[str, float]:
        traffic = engine.traffic()
        return {"counted_wire_bytes": traffic.on_wire, "handed_bytes": traffic.handed}

    def evaluate() -> float:
        mine = tokens.held_out[rank::ranks]
        (loss, *_) = engine.evaluate([{"tokens": mine[:, :-1], "targets": mine[:, 1:]}]).values()
        return float(loss.sum / loss.count)

    return Loop(step, counted, evaluate, engine.close)


def torch_loop(words: Sequence[str], tokens: Tokens) -> Loop:
    """A bare DistributedDataParallel loop with one of torch's own hooks."""
    import torch
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
    from torch.nn.functional import cross_entropy
    from torch.nn.parallel import DistributedDataParallel

    from disttrain.config.load import load
    from disttrain.models import build_model
    from disttrain.optim import build_optimizer

    config = load(HERE / "gpt_10m.yaml", list(WORKLOAD))
    model = build_model(config.model, config.run.seed, torch.float32)
    # In one bucket: with several, PowerSGD's callbacks may start their collectives in another order on each rank.
    size = {"bucket_cap_mb": 1000} if words[1] == "powersgd" else {}
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, **size)
    if words[1] == "fp16":
        wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif words[1] == "powersgd":
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
        wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    optimizer = build_optimizer(config.optim, model.named_parameters())

    def loss_of(windows: Any) -> Any:
        logits = wrapped(torch.from_numpy(windows[:, :-1]))
        return cross_entropy(logits.flatten(0, 1), torch.from_numpy(windows[:, 1:]).flatten())

    def step(number: int) -> None:
        loss = loss_of(tokens.windows(number, dist.get_rank()))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(number)
        optimizer.step()

    def evaluate() -> float:
        wrapped.eval()
        with torch.no_grad():
            loss = float(loss_of(tokens.held_out))
        wrapped.train()
        return loss

    return Loop(step, dict, evaluate, lambda: None)


def markdown(about: dict[str, Any], runs: Sequence[dict[str, Any]]) -> str:
    """A table for each number of hosts and rate."""
    lines = [
        "# Gradient codecs between emulated hosts",
        "",
        f"{about['date']}, {about['cpu']}, {about['cores']} cores shared by all hosts, one thread a rank, torch "
        f"{about['versions']['torch']}, commit {about['commit']}. GPT of 10.7 million parameters, "
        f"{about['sequences_per_rank']} sequence(s) of 256 a rank and step, fp32. `{about['command']}`",
        "",
        "Median seconds of a step, the slowest rank's; ratio: seconds without a codec / seconds. Bytes: what the host's "
        "network interface sent a step, and what disttrain counted for rings. DiLoCo: mean step of a round.",
    ]
    trained = any("steps" in run for run in runs)
    if trained:
        lines += [
            "",
            f"Loss: held-out nats a byte after {about['train_s']:g} seconds in steps, and after as many steps "
            f"as without a codec; AdamW, rate {RATE:g} after {WARM_UP} steps, untuned, one seed.",
        ]
    for count, rate in dict.fromkeys((run["hosts"], run["rate"]) for run in runs):
        here = [run for run in runs if (run["hosts"], run["rate"]) == (count, rate)]
        base = next((statistics.median(run["seconds"]) for run in here if run["name"] == BASE), None)
        lines += ["", f"## {count} hosts, {'no limit' if rate == 'off' else rate}", ""]
        more = " loss at equal tokens | loss at equal time | steps |" if trained else ""
        lines.append(f"| codec | s/step | spread | ratio | MB/step sent | MB/step counted |{more}")
        lines.append("| --- | --- | --- | --- | --- | --- |" + " --- |" * more.count("|"))
        for run in here:
            seconds = run["seconds"]
            median = statistics.median(seconds)
            ratio = "-" if base is None else f"{base / median:.2f}"
            counted = f"{run['counted_wire_bytes'] / 1e6:.2f}" if run.get("counted_wire_bytes") else "-"
            spread = f"{min(seconds):.3f} to {max(seconds):.3f} ({len(seconds)})"
            cells = [run["name"], f"{median:.3f}", spread, ratio, f"{run['wire_bytes'] / 1e6:.2f}", counted]
            if trained:
                cells += [f"{run['loss_at_tokens']:.3f}", f"{run['loss_at_time']:.3f}", str(run["steps"])]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
