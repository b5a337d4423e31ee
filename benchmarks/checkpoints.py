"""What checkpoints cost: seconds that training waits for one, and what writing beside training takes from the steps.

python benchmarks/checkpoints.py [--ranks 2] [--every 20] [--saves 3] [--repeats 3] [KEY=VALUE ...]

`disttrain train gpt_10m.yaml` without checkpoints, with `checkpoint.asynchronous`, and without; interleaved. The budget of
a checkpoint is the time of `--every` steps. Writes checkpoints_<hardware>_<yyyymm>.{json,md}.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import report
from throughput import HERE

VARIANTS = {
    "no checkpoints": (),
    "beside training": ("checkpoint.every={every}",),
    "waited for": ("checkpoint.every={every}", "checkpoint.asynchronous=false"),
}
BASE = "no checkpoints"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--saves", type=int, default=3, help="checkpoints of a run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args(arguments)
    typed = shlex.join(sys.argv[1:] if arguments is None else arguments)
    about = report.describe("cpu", 1, f"python benchmarks/checkpoints.py {typed}")
    out = options.out or HERE / report.file_name(about).replace("throughput_", "checkpoints_")
    runs: list[dict] = []
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(options.repeats):
            for name in VARIANTS:
                runs.append({"variant": name, "repeat": repeat, **run(Path(scratch), name, options)})
                print(runs[-1], file=sys.stderr, flush=True)
            out.with_suffix(".json").write_text(json.dumps({"about": about, "runs": runs}, indent=1) + "\n")
            out.with_suffix(".md").write_text(markdown(about, runs, options.every))
    print(out.with_suffix(".md"))


def run(scratch: Path, name: str, options: argparse.Namespace) -> dict:
    """One run: `saves` times `every` steps, and one more so that the last checkpoint is written beside a step too."""
    number = len(list(scratch.glob("run*")))
    steps = options.every * options.saves + 1
    words = [word.format(every=options.every) for word in VARIANTS[name]]
    batch = f"train.global_batch_size={8 * options.ranks}"
    subprocess.run(
        [sys.executable, "-m", "disttrain", "train", str(HERE / "gpt_10m.yaml"), f"run.dir={scratch}",
         f"run.name=run{number}", f"train.steps={steps}", "train.eval_sequences=8", batch, "log.console=none",
         *words, *options.overrides, "--nproc", str(options.ranks)], check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    records = [json.loads(line) for line in (scratch / f"run{number}" / "metrics.jsonl").read_text().splitlines()]
    found = [r for r in records if r["kind"] == "step" and not r["warmup"]]
    summary = next(r for r in records if r["kind"] == "summary")
    saved = [r for r in records if r.get("event") == "checkpoint_saved" and r["step"] < steps]
    last = next(r for r in records if r.get("event") == "checkpoint_saved" and r["step"] == steps)
    at_end = last["details"]["write_seconds"]  # this one is always waited for
    waited = summary["checkpoint_seconds"] - at_end
    return {
        "step_seconds": statistics.mean(r["step_seconds"] for r in found),
        "stall_seconds": waited / len(saved) if saved else 0.0,
        "write_seconds": statistics.mean(r["details"]["write_seconds"] for r in saved) if saved else 0.0,
    }


def markdown(about: dict, runs: Sequence[dict], every: int) -> str:
    """The report: one row a variant."""
    facts = "".join(f"- {key}: {value}\n" for key, value in about.items())
    base = {run["repeat"]: run["step_seconds"] for run in runs if run["variant"] == BASE}
    text = (
        f"# What checkpoints cost\n\n{facts}\nThe budget is {every} steps, one checkpoint's share. The stall is what "
        "training waits for a checkpoint. The last column is the time of all steps and stalls beside that without. "
        "Medians; ratios within a repeat.\n\n"
        "| variant | s/step | stall, s | share of the budget | written in, s | time to none |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
    )
    for name in VARIANTS:
        mine = [run for run in runs if run["variant"] == name]
        share = statistics.median(run["stall_seconds"] / (every * run["step_seconds"]) for run in mine)
        total = statistics.median(
            (run["step_seconds"] + run["stall_seconds"] / every) / base[run["repeat"]] for run in mine
        )
        step, stall, write = (
            statistics.median(run[key] for run in mine) for key in ("step_seconds", "stall_seconds", "write_seconds")
        )
        text += f"| {name} | {step:.3f} | {stall:.3f} | {100 * share:.1f} % | {write:.2f} | {total:.3f} |\n"
    return text


if __name__ == "__main__":
    main()
