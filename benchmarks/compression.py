"""Seconds and bytes of a step under each gradient codec, between emulated hosts whose link is limited.

python benchmarks/compression.py [--hosts 2 4] [--rates 10mbit 100mbit 1gbit off] [--steps N] [--only NAME ...]
                                 [--curve STEPS --text FILE]

Hosts are network namespaces with one rank each, joined by a bridge; tc limits what each sends and receives. Needs root and
Linux. Every variant of one (hosts, rate) runs in the same processes one after the other, so that figures are ratios within
one run. torch's own hooks and Horovod's fp16 are measured beside, and what compression.codec=auto chooses. With --curve each
also trains on the bytes of a text for so many steps, once, on an unlimited link: what it learns in a step does not depend on
the rate. So losses at equal tokens are read there, and losses at equal time follow from the seconds of a step at each rate.
Writes compression_<hardware>_<yyyymm>.{json,md} after each part; parts that are there already are not measured again.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import report

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

BASE = "none"
VARIANTS: dict[str, tuple[str, ...]] = {
    BASE: (),
    "auto": ("compression.codec=auto",),
    "fp16": ("compression.codec=fp16",),
    "bf16": ("compression.codec=bf16",),
    "int8": ("compression.codec=int8",),
    "int4": ("compression.codec=int4",),
    "qsgd, 2 bits": ("compression.codec=qsgd", "compression.bits=2"),
    "sign": ("compression.codec=sign",),
    "top-k, 1 %": ("compression.codec=topk",),
    "random-k, 1 %": ("compression.codec=randomk",),
    "threshold, 3 rms": ("compression.codec=threshold",),
    "PowerSGD, rank 4": ("compression.codec=powersgd",),
    "1-bit Adam": ("compression.codec=onebit_adam", "compression.warmup_steps=15%"),
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
HELD_OUT = 16
"""Sequences at the end of the text."""
CURVE_POINTS = 8
"""Held-out losses of a curve, beside the one before the first step."""
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
    parser.add_argument("--curve", type=int, default=0, help="train each for so many steps, too")
    parser.add_argument("--text", default=str(ROOT / "../shared/data/wikitext-2/train.txt"), help="what to train on")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    about = report.describe("cpu", 1, "python benchmarks/compression.py " + shlex.join(sys.argv[1:]))
    about["versions"]["horovod"] = report.version("horovod")
    about |= {"sequences_per_rank": options.sequences, "curve_steps": options.curve}
    out = options.out or HERE / report.file_name(about).replace("throughput_", "compression_")
    path = out.with_suffix(".json")
    runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else []
    for count in options.hosts:
        for rate in [*options.rates, *([CURVE] if options.curve else [])]:
            there = {run["name"] for run in runs if (run["hosts"], run["rate"]) == (count, rate)}
            if missing := [
                name for name in options.only if name not in there and not (rate == CURVE and name == "auto")
            ]:
                runs += between_hosts(count, rate, options, missing)
            path.write_text(json.dumps({"about": about, "runs": runs}, indent=1))
            out.with_suffix(".md").write_text(markdown(about, runs))
    print(out.with_suffix(".md"))


CURVE = "curve"
"""In the place of a rate: no limit, and losses instead of seconds."""


def between_hosts(count: int, rate: str, options: argparse.Namespace, names: Sequence[str]) -> list[dict[str, Any]]:
    """These variants on so many hosts with this link."""
    from tests.launchers.hosts import Hosts

    variants = {name: VARIANTS[name] for name in names if "orovod" not in name or report.version("horovod")}
    with tempfile.TemporaryDirectory() as scratch, Hosts(Path(scratch), count) as hosts:
        hosts.limit(None if rate in ("off", CURVE) else rate)
        told = {name: getattr(options, name) for name in ("steps", "sequences", "text")}
        told["curve"] = options.curve if rate == CURVE else 0
        command = [sys.executable, str(HERE / "compression.py"), "--rank", json.dumps(variants), json.dumps(told)]
        ranks = [hosts.start(rank, command, 29512, stdout=subprocess.PIPE) for rank in range(count)]
        outputs = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"a rank failed: {[rank.returncode for rank in ranks]}")
    of_ranks = [[json.loads(line) for line in output.splitlines() if line.startswith("{")] for output in outputs]
    runs = []
    for readings in zip(*of_ranks, strict=True):
        if rate == CURVE:
            runs.append({**readings[0], "hosts": count, "rate": rate})
            print(f"{count} hosts, {readings[0]['name']}: {readings[0]['curve']}", file=sys.stderr, flush=True)
            continue
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
    for name, words in variants.items():
        start = torch_loop if words[:1] == ["torch"] else our_engine
        rounds = next((int(word.split("=")[1]) for word in words if word.startswith("outer.every")), 1)
        loop = start([word.replace("15%", str(max(options.curve * 15 // 100, 1))) for word in words], tokens)
        reading = {"name": name, **loop.chosen}
        if options.curve:
            reading["curve"] = losses(loop, options.curve)
        else:
            reading |= seconds_and_bytes(loop, -(-options.steps // rounds) * rounds, rounds)
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


def losses(loop: "Loop", steps: int) -> list[tuple[int, float]]:
    """Held-out losses, in nats a byte, before the first step and after every eighth of them."""
    found = [(0, loop.evaluate())]
    for number in range(1, steps + 1):
        loop.step(number)
        if number * CURVE_POINTS % steps < CURVE_POINTS:
            found.append((number, loop.evaluate()))
    return found


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
        if options.curve:
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
    chosen: dict[str, Any] = field(default_factory=dict)
    """What compression.codec=auto chose, and what it expects."""


def rate(number: int) -> float:
    """Learning rate of a step."""
    return RATE * min(1.0, number / WARM_UP)


def our_engine(words: Sequence[str], tokens: Tokens) -> Loop:
    """disttrain's engine."""
    import torch
    import torch.distributed as dist

    from disttrain import codec_choice, engines
    from disttrain.config.load import load, with_values
    from disttrain.mesh import build_mesh
    from disttrain.parallel.collectives import Traffic
    from disttrain.parallel.groups import make_groups

    rank, ranks = dist.get_rank(), dist.get_world_size()
    config = load(HERE / "gpt_10m.yaml", [*WORKLOAD, f"train.global_batch_size={tokens.sequences * ranks}",
                                         f"train.micro_batch_size={tokens.sequences}", *words])  # fmt: skip
    groups = make_groups(build_mesh(config.parallel, ranks), rank, "cpu", Traffic())

    def batch(number: int) -> dict[str, Any]:
        windows = tokens.windows(number, rank)
        return {"tokens": windows[:, :-1], "targets": windows[:, 1:]}

    chosen = {}
    if config.compression.codec == "auto":
        choice = codec_choice.choose(config, groups, torch.device("cpu"), "fp32", [batch(1)])
        config = with_values(config, {"compression.codec": choice.best.codec})
        chosen = {"chosen": choice.best.codec, "predicted_s": choice.best.step_s, "choosing_s": choice.seconds,
                  "speed": asdict(choice.speed), "candidates": [asdict(each) for each in choice.candidates]}  # fmt: skip
    engine = engines.build(config, groups, torch.device("cpu"), "fp32")

    def step(number: int) -> None:
        engine.step([batch(number)], number, rate(number))

    def counted() -> dict[str, float]:
        traffic = engine.traffic()
        return {"counted_wire_bytes": traffic.on_wire, "handed_bytes": traffic.handed}

    def evaluate() -> float:
        mine = tokens.held_out[rank::ranks]
        (loss, *_) = engine.evaluate([{"tokens": mine[:, :-1], "targets": mine[:, 1:]}]).values()
        return float(loss.sum / loss.count)

    return Loop(step, counted, evaluate, engine.close, chosen)


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
    curves = {(run["hosts"], run["name"]): run["curve"] for run in runs if run["rate"] == CURVE}
    if curves:
        lines += [
            "",
            f"Loss: held-out nats a byte of {HELD_OUT} sequences after {about['curve_steps']} steps, measured without a "
            "limit, and after as many seconds as the fastest in the table needs for these, from its seconds a step and the "
            f"curve of losses; AdamW, rate {RATE:g} after {WARM_UP} steps, untuned, one seed.",
        ]
    for count, rate in dict.fromkeys((run["hosts"], run["rate"]) for run in runs if run["rate"] != CURVE):
        here = [run for run in runs if (run["hosts"], run["rate"]) == (count, rate)]
        medians = {run["name"]: statistics.median(run["seconds"]) for run in here}
        base = medians.get(BASE)
        lines += ["", f"## {count} hosts, {'no limit' if rate == 'off' else rate}", ""]
        learned = {name: dict(curve) for (n, name), curve in curves.items() if n == count and name in medians}
        more = " loss at equal tokens | loss at equal time |" if learned else ""
        lines.append(f"| codec | s/step | spread | ratio | MB/step sent | MB/step counted |{more}")
        lines.append("| --- | --- | --- | --- | --- | --- |" + " --- |" * more.count("|"))
        time_s = about["curve_steps"] * min((medians[name] for name in learned), default=0.0)
        for run in here:
            seconds, median = run["seconds"], medians[run["name"]]
            ratio = "-" if base is None else f"{base / median:.2f}"
            counted = f"{run['counted_wire_bytes'] / 1e6:.2f}" if run.get("counted_wire_bytes") else "-"
            spread = f"{min(seconds):.3f} to {max(seconds):.3f} ({len(seconds)})"
            cells = [run["name"], f"{median:.3f}", spread, ratio, f"{run['wire_bytes'] / 1e6:.2f}", counted]
            if run["name"] in learned:
                curve = learned[run["name"]]
                cells += [f"{curve[max(curve)]:.3f}", f"{at(curve, time_s / median):.3f}"]
            elif learned:
                cells += ["-", "-"]
            lines.append(f"| {' | '.join(cells)} |")
        for run in here:
            if "chosen" in run:
                lines += ["", f"auto chose {run['chosen']} in {run['choosing_s']:.1f} s and predicted "
                              f"{run['predicted_s']:.3f} s a step."]  # fmt: skip
    return "\n".join(lines) + "\n"


def at(curve: dict[int, float], step: float) -> float:
    """The loss at a step of a curve, between two of its points on a straight line."""
    import numpy as np

    return float(np.interp(step, list(curve), list(curve.values())))


if __name__ == "__main__":
    main()
