"""Tokens per second and peak memory of disttrain, a bare PyTorch loop and Hugging Face Trainer, in interleaved repeats.

python benchmarks/throughput.py [--steps N] [--repeats N] [--precision fp32 bf16] [--ranks 1 2] [--device cpu|cuda]

See benchmarks/README.md for what is measured and how.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import report
from workload import Workload

from disttrain.config.load import load
from disttrain.config.schema import Config
from disttrain.data import prepare
from disttrain.data.shards import TokenSet, read_index

HERE = Path(__file__).resolve().parent
CONTESTANTS = ("ceiling", "bare", "disttrain", "hf")
SCRIPTS = {"ceiling": "matmul_ceiling.py", "bare": "bare_torch.py", "hf": "hf_trainer.py"}


@dataclass(frozen=True)
class Run:
    """One contestant, once."""

    contestant: str
    precision: str
    ranks: int
    repeat: int
    tokens_per_second: float
    """Of all ranks together, after warm-up; for the ceiling, if a step were its matrix products alone."""
    flops_per_second: float | None
    """Of all ranks together; the ceiling only."""
    host_bytes: int
    """Peak resident memory of the worst rank."""
    device_bytes: int | None
    """Peak allocated device memory of the worst rank."""


@dataclass(frozen=True)
class Plan:
    """What to run and how."""

    config: Path
    overrides: tuple[str, ...]
    workload: Workload
    warmup: int
    threads: int
    """Of each rank."""
    folder: Path
    """Scratch."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the JSON and Markdown files."""
    options = parse(arguments)
    ranks = possible_ranks(options.ranks, options.device)
    threads = options.threads or max(1, len(os.sched_getaffinity(0)) // max(ranks))
    about = report.describe(options.device, threads, "python benchmarks/throughput.py " + shlex.join(options.typed))
    out = options.out or HERE / report.file_name(about)
    with tempfile.TemporaryDirectory() as scratch:
        plan = make_plan(options, threads, Path(scratch))
        runs: list[Run] = []
        for repeat in range(options.repeats):
            for precision in options.precision:
                for count in ranks:
                    for contestant in options.contestants:
                        runs.append(measure(plan, contestant, precision, count, repeat))
                        print(report.line(runs[-1]), file=sys.stderr, flush=True)
            measured = {"warmup_steps": plan.warmup, "measured_steps": options.steps}
            report.write(out, about, asdict(plan.workload) | measured, runs)
    print(out.with_suffix(".md"))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; `typed` holds them as given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that replace the config's")
    parser.add_argument("--config", type=Path, default=HERE / "gpt_10m.yaml")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=("fp32", "bf16"))
    parser.add_argument("--ranks", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--steps", type=int, default=12, help="measured steps of a run")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them, of every contestant")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads of a rank; cores / largest number of ranks by default")
    parser.add_argument("--out", type=Path, help="output files, without suffix")
    options = parser.parse_intermixed_args(arguments)
    if min(options.steps, options.warmup, options.repeats, *options.ranks) < 1:
        parser.error("steps, warmup, repeats and ranks must be at least 1")
    options.typed = list(sys.argv[1:] if arguments is None else arguments)
    return options


def possible_ranks(wanted: Sequence[int], device: str) -> list[int]:
    """The numbers of ranks this machine can run: on GPUs no more than there are."""
    if device == "cpu":
        return list(wanted)
    import torch

    gpus = torch.cuda.device_count()
    if gpus == 0:
        sys.exit("throughput: --device cuda, but torch finds no GPU")
    for ranks in wanted:
        if ranks > gpus:
            print(f"throughput: {ranks} ranks left out: this machine has {gpus} GPU(s)", file=sys.stderr)
    return [ranks for ranks in wanted if ranks <= gpus]


def make_plan(options: argparse.Namespace, threads: int, scratch: Path) -> Plan:
    """Prepare the tokens once, as `disttrain train` will find them, and write the same ids as one file for the others."""
    overrides = (*options.overrides, f"data.cache_dir={scratch / 'cache'}")
    config = load(options.config, overrides)
    ((folder, _weight),) = prepare(config).train
    index = read_index(folder)
    tokens = TokenSet(index, "train")
    flat = scratch / "tokens.bin"
    tokens.read(0, tokens.tokens).astype(index.dtype).tofile(flat)
    workload = workload_of(config, index.vocab_size, flat, index.dtype, options.device, options.steps + options.warmup)
    return Plan(options.config, overrides, workload, options.warmup, threads, scratch)


def workload_of(config: Config, vocab_size: int, tokens: Path, dtype: str, device: str, steps: int) -> Workload:
    """The config as the other contestants read it."""
    return Workload(
        layers=config.model.layers,
        hidden_size=config.model.hidden_size,
        heads=config.model.heads,
        vocab_size=config.model.vocab_size or vocab_size,
        sequence_length=config.data.sequence_length,
        micro_batch_size=config.train.micro_batch_size or config.train.global_batch_size,
        tokens=str(tokens),
        token_type=dtype,
        precision="fp32",
        device=device,
        steps=steps,
        learning_rate=config.optim.lr,
        weight_decay=config.optim.weight_decay,
        clip_grad_norm=config.train.clip_grad_norm or float("inf"),
    )


def measure(plan: Plan, contestant: str, precision: str, ranks: int, repeat: int) -> Run:
    """Run one contestant in fresh processes."""
    folder = plan.folder / f"{contestant}_{precision}_{ranks}_{repeat}"
    folder.mkdir()
    workload = replace(plan.workload, precision=precision)
    of_step = workload.micro_batch_size * workload.sequence_length
    if contestant == "disttrain":
        reports = [run_disttrain(plan, workload, ranks, folder)]
    else:
        reports = run_script(plan, SCRIPTS[contestant], workload, ranks, folder)
    flops = None
    if contestant == "ceiling":
        rate = sum(of_step / r["seconds_per_step"] for r in reports)
        flops = sum(r["flops_per_step"] / r["seconds_per_step"] for r in reports)
    else:
        seconds = reports[0]["step_seconds"][plan.warmup :]
        rate = ranks * of_step * len(seconds) / sum(seconds)
    device_bytes = [r["device_bytes"] for r in reports if r.get("device_bytes") is not None]
    host_bytes = max(r["host_bytes"] for r in reports)
    return Run(contestant, precision, ranks, repeat, rate, flops, host_bytes, max(device_bytes, default=None))


def run_script(plan: Plan, script: str, workload: Workload, ranks: int, folder: Path) -> list[dict]:
    """Run a script on each rank and collect what the ranks report; the ceiling's ranks do not talk to each other."""
    path = folder / "workload.json"
    workload.write(path)
    program = [str(HERE / script), str(path)]
    alone = [sys.executable, *program]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *program]
    if script == SCRIPTS["ceiling"]:
        variables = [{"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(ranks)]
        execute([alone] * ranks, folder, plan.threads, variables)
    else:
        execute([alone if ranks == 1 else torchrun], folder, plan.threads, [{}])
    return [json.loads((folder / f"rank_{r}.json").read_text()) for r in range(ranks)]


def run_disttrain(plan: Plan, workload: Workload, ranks: int, folder: Path) -> dict:
    """`disttrain train` on the prepared tokens; what a rank would report, read from metrics.jsonl.

    A step lasts from one step record to the next, so everything disttrain does in between counts.
    """
    settings = {
        "run.dir": folder,
        "run.name": "run",
        "run.device": workload.device,
        "train.steps": workload.steps,
        "train.global_batch_size": ranks * workload.micro_batch_size,
        "train.micro_batch_size": workload.micro_batch_size,
        "train.eval_sequences": workload.micro_batch_size,
        "precision": workload.precision,
        "checkpoint.resume": "never",
        "log.console": "none",
    }
    words = [f"{key}={value}" for key, value in settings.items()]
    command = ["train", str(plan.config), *plan.overrides, *words, "--nproc", str(ranks)]
    execute([[sys.executable, "-m", "disttrain", *command]], folder, plan.threads, [{}])
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    if [record["step"] for record in steps] != list(range(1, workload.steps + 1)):
        raise RuntimeError(f"disttrain recorded {len(steps)} of {workload.steps} steps one by one")
    ends = [record["time"] for record in steps]
    seconds = [steps[0]["step_seconds"], *(b - a for a, b in zip(ends, ends[1:], strict=False))]
    last = steps[-1]
    return {
        "step_seconds": seconds,
        "host_bytes": last["host_rss_bytes_max"],
        "device_bytes": last["peak_allocated_bytes_max"],
    }


def execute(commands: list[list[str]], folder: Path, threads: int, variables: list[dict[str, str]]) -> None:
    """Run commands at the same time and wait; raises RuntimeError with the end of the output of one that fails."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    started = []
    for number, (command, extra) in enumerate(zip(commands, variables, strict=True)):
        log = open(folder / f"log_{number}.txt", "w+", encoding="utf-8")  # noqa: SIM115 closed below
        process = subprocess.Popen(command, env=environment | extra, stdout=log, stderr=subprocess.STDOUT)
        started.append((process, log))
    try:
        codes = [process.wait() for process, _ in started]
        for code, (_, log), command in zip(codes, started, commands, strict=True):
            if code != 0:
                log.seek(0)
                raise RuntimeError(f"{shlex.join(command)} ended with {code}:\n{log.read()[-4000:]}")
    finally:
        for process, log in started:
            if process.poll() is None:
                process.terminate()
                process.wait()
            log.close()


if __name__ == "__main__":
    main()
