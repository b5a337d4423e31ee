"""What the throughput benchmark writes: the machine and the runs as JSON, and Markdown tables."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from throughput import Run

NAMES = {"ceiling": "matrix products alone", "bare": "bare PyTorch loop", "hf": "Hugging Face Trainer"}
PACKAGES = ("torch", "numpy", "transformers", "accelerate", "disttrain")
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def describe(device: str, threads: int, command: str) -> dict[str, Any]:
    """The machine, without its name, the versions, the date and the command."""
    model, flags = platform.machine(), set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(re.findall(r"^(model name|flags)\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE))
        model, flags = fields.get("model name", model), set(fields.get("flags", "").split())
    cores = len(os.sched_getaffinity(0))
    about = {
        "date": datetime.date.today().isoformat(),
        "command": command,
        "device": device,
        "cpu": model,
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "cores": cores,
        "threads_per_rank": threads,
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": commit(),
    }
    if device == "cuda":
        import torch

        about |= {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count(), "cuda": torch.version.cuda}
    return about


def version(package: str) -> str | None:
    """Installed version, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Commit of this checkout, with + when tracked files differ; None outside a checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)

    try:
        head = git("rev-parse", "--short", "HEAD")
    except FileNotFoundError:
        return None
    if head.returncode != 0:
        return None
    return head.stdout.strip() + ("+" if git("status", "--porcelain", "--untracked-files=no").stdout else "")


def file_name(about: dict[str, Any]) -> str:
    """throughput_<hardware>_<yyyymm>, without suffix."""
    hardware = about.get("gpu") or f"{about['cpu']} {about['cores']} cores"
    slug = re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")
    return f"throughput_{slug}_{about['date'][:7].replace('-', '')}"


def line(run: "Run") -> str:
    """One finished run, for the terminal."""
    name = NAMES.get(run.contestant, run.contestant)
    return f"{run.repeat + 1}: {run.precision} {run.ranks} rank(s) {name}: {run.tokens_per_second:,.0f} tokens/s"


def write(out: Path, about: dict[str, Any], workload: dict[str, Any], runs: Sequence["Run"]) -> None:
    """Write OUT.json and OUT.md."""
    workload = {k: v for k, v in workload.items() if k not in ("tokens", "precision")}
    content = {"about": about, "workload": workload, "runs": [asdict(run) for run in runs]}
    out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(about, workload, runs))


def markdown(about: dict[str, Any], workload: dict[str, Any], runs: Sequence["Run"]) -> str:
    """The whole report."""
    repeats = 1 + max(run.repeat for run in runs)
    parameters = parameter_count(workload)
    hardware = about.get("gpu") or about["cpu"]
    title = f"# Throughput of a {parameters / 1e6:.1f}M-parameter GPT, {hardware}, {about['date'][:7]}"
    machine = f"{about['cpu']}, {about['cores']} cores ({', '.join(about['instructions']) or 'no vector extensions'})"
    if "gpu" in about:
        machine = f"{about['gpus']} x {about['gpu']}, CUDA {about['cuda']}; {machine}"
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items() if v)
    facts = [
        f"- Machine: {machine}; {about['threads_per_rank']} thread(s) a rank; load before: {about['load_before']}.",
        f"- Software: Python {about['python']}, {versions}, commit {about['commit']}. Date: {about['date']}.",
        f"- Command: `{about['command'].strip()}`",
        f"- Model: {workload['layers']} layers, {workload['hidden_size']} wide, {workload['heads']} heads, "
        f"vocabulary {workload['vocab_size']}; sequence {workload['sequence_length']}, "
        f"{workload['micro_batch_size']} sequences a rank and step.",
        f"- {repeats} interleaved repeats of {workload['measured_steps']} steps after {workload['warmup_steps']} of "
        "warm-up, each in fresh processes. Median (lowest to highest) over the repeats; ratios are medians of the "
        "ratios within a repeat.",
    ]
    parts = [title, "\n".join(facts)]
    for precision in dict.fromkeys(run.precision for run in runs):
        for ranks in dict.fromkeys(run.ranks for run in runs):
            cell = [run for run in runs if (run.precision, run.ranks) == (precision, ranks)]
            parts += [f"## {precision}, {ranks} rank{'s' if ranks > 1 else ''}", table(cell)]
    return "\n\n".join(parts) + "\n"


def parameter_count(workload: dict[str, Any]) -> int:
    """Parameters of the GPT, tied head: embeddings, 12 H^2 + 13 H a layer, final norm."""
    hidden = workload["hidden_size"]
    rows = workload["vocab_size"] + workload["sequence_length"]
    return rows * hidden + workload["layers"] * (12 * hidden**2 + 13 * hidden) + 2 * hidden


def table(runs: Sequence["Run"]) -> str:
    """One precision and number of ranks: a row for each contestant."""
    of = {name: [run for run in runs if run.contestant == name] for name in dict.fromkeys(r.contestant for r in runs)}
    bare, ceiling = of.get("bare", []), of.get("ceiling", [])
    lines = [
        "| | tokens/s | to bare loop | share of ceiling | peak memory, worst rank | to bare loop |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, mine in of.items():
        rates = [run.tokens_per_second for run in mine]
        speed = f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"
        to_bare = paired(mine, bare, lambda run: run.tokens_per_second)
        share = paired(mine, ceiling, lambda run: run.tokens_per_second)
        if name == "ceiling":
            flops = statistics.median(run.flops_per_second or 0.0 for run in mine)
            lines.append(f"| {NAMES[name]} | {speed} | {number(to_bare)} | {flops / 1e12:.3f} TFLOP/s | | |")
            continue
        memory = statistics.median(map(peak_bytes, mine)) / 2**20
        memory_to_bare = paired(mine, bare, peak_bytes)
        cells = [
            NAMES.get(name, name),
            speed,
            number(to_bare),
            percent(share),
            f"{memory:,.0f} MiB",
            number(memory_to_bare),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def peak_bytes(run: "Run") -> float:
    """Device memory where there is a device, else host memory."""
    return run.host_bytes if run.device_bytes is None else run.device_bytes


def paired(mine: Iterable["Run"], others: Iterable["Run"], value: Callable[["Run"], float]) -> float | None:
    """Median over the repeats of mine / other; None without others."""
    by_repeat = {run.repeat: value(run) for run in others}
    ratios = [value(run) / by_repeat[run.repeat] for run in mine if run.repeat in by_repeat]
    return statistics.median(ratios) if ratios else None


def number(ratio: float | None) -> str:
    """A ratio, or a dash."""
    return "-" if ratio is None else f"{ratio:.3f}"


def percent(ratio: float | None) -> str:
    """A share, or a dash."""
    return "-" if ratio is None else f"{100 * ratio:.0f} %"
