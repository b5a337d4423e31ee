"""Tokens per second and peak memory of the three engines on the same config, in interleaved repeats.

python benchmarks/engines.py [--steps N] [--repeats N] [--precision fp32 bf16] [--ranks 2] [KEY=VALUE ...]

Each run is `disttrain train gpt_10m.yaml --nproc RANKS` with an engine's settings, measured as throughput.py measures it;
engines that are not installed are left out and said so. Writes engines_<hardware>_<yyyymm>.{json,md}.
"""

import importlib.util
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import report
from throughput import HERE, Run, make_plan, measure, parse

VARIANTS: dict[str, tuple[str, ...]] = {
    "native, DDP": (),
    "native, ZeRO 1": ("parallel.zero=1",),
    "native, ZeRO 2": ("parallel.zero=2",),
    "native, ZeRO 3": ("parallel.zero=3",),
    "deepspeed, ZeRO 0": ("engine=deepspeed",),
    "deepspeed, ZeRO 1": ("engine=deepspeed", "parallel.zero=1"),
    "deepspeed, ZeRO 2": ("engine=deepspeed", "parallel.zero=2"),
    "deepspeed, ZeRO 3": ("engine=deepspeed", "parallel.zero=3"),
    "horovod": ("engine=horovod",),
}
BASE = "native, DDP"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the JSON and Markdown files."""
    options = parse(arguments)
    (ranks,) = {max(options.ranks)}
    variants = {name: words for name, words in VARIANTS.items() if installed(name)}
    about = report.describe(options.device, 1, "python benchmarks/engines.py " + shlex.join(options.typed))
    about["versions"] |= {name: report.version(name) for name in ("deepspeed", "horovod")}
    out = options.out or HERE / report.file_name(about).replace("throughput_", "engines_")
    runs: list[tuple[str, Run]] = []
    with tempfile.TemporaryDirectory() as scratch:
        plan = make_plan(options, 1, Path(scratch))
        for repeat in range(options.repeats):
            for precision in options.precision:
                for number, (name, words) in enumerate(variants.items()):
                    folder = Path(scratch) / str(number)
                    folder.mkdir(exist_ok=True)
                    mine = replace(plan, overrides=(*plan.overrides, *words), folder=folder)
                    runs.append((name, measure(mine, "disttrain", precision, ranks, repeat)))
                    print(f"{name}: {report.line(runs[-1][1])}", file=sys.stderr, flush=True)
            write(out, about | {"warmup_steps": plan.warmup, "measured_steps": options.steps}, runs)
    print(out.with_suffix(".md"))


def write(out: Path, about: dict, runs: list[tuple[str, Run]]) -> None:
    """Both files, after every repeat: what is measured is not lost where the rest is interrupted."""
    rows = [{"engine": name, **asdict(run)} for name, run in runs]
    out.with_suffix(".json").write_text(json.dumps({"about": about, "runs": rows}, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(about, runs))


def installed(name: str) -> bool:
    """Whether the engine of a variant is here; says so when not."""
    engine = name.split(",")[0]
    there = engine == "native" or importlib.util.find_spec(engine) is not None
    if not there:
        print(f"engines: {name} left out: {engine} is not installed", file=sys.stderr)
    return there


def markdown(about: dict, runs: Sequence[tuple[str, Run]]) -> str:
    """The report: a table for each precision."""
    facts = "".join(f"- {key}: {value}\n" for key, value in about.items())
    tables = "".join(
        f"\n## {precision}\n\n{table(runs, precision)}" for precision in dict.fromkeys(r.precision for _, r in runs)
    )
    return f"# Engines side by side\n\n{facts}\nRatios are medians of the ratios to {BASE} within a repeat.\n{tables}"


def table(runs: Sequence[tuple[str, Run]], precision: str) -> str:
    """Tokens per second of all ranks, and resident memory of the worst rank, beside native DDP."""
    mine = [(name, run) for name, run in runs if run.precision == precision]
    base = {run.repeat: run for name, run in mine if name == BASE}
    text = "| engine | tokens/s, median | range | ratio | worst rank, MiB | ratio |\n| --- | --- | --- | --- | --- | --- |\n"
    for name in dict.fromkeys(name for name, _ in mine):
        own = [run for other, run in mine if other == name]
        rates = [run.tokens_per_second for run in own]
        speed = statistics.median(run.tokens_per_second / base[run.repeat].tokens_per_second for run in own)
        memory = statistics.median(run.host_bytes / base[run.repeat].host_bytes for run in own)
        mib = statistics.median(run.host_bytes for run in own) / 2**20
        text += (f"| {name} | {statistics.median(rates):,.0f} | {min(rates):,.0f} to {max(rates):,.0f} | {speed:.2f} "
                 f"| {mib:,.0f} | {memory:.2f} |\n")  # fmt: skip
    return text


if __name__ == "__main__":
    main()
