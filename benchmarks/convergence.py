"""What each way of sending less between the ranks costs in loss: a small GPT and a small BERT on WikiText-2, equal tokens.

python benchmarks/convergence.py [--data FOLDER] [--only NAME ...] [--seeds N ...] [--models gpt bert] [KEY=VALUE ...]

Writes convergence_<hardware>_<yyyymm>.json after every run, the tables as .md, and the two pictures of
docs/compression.md. Runs that the file already holds are not repeated, so that an interrupted study goes on where it
stopped and `--only NAME` adds a contestant to it. See benchmarks/README.md.
"""

import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import report
import typer
import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

BASE = "none"
CONTESTANTS: dict[str, tuple[str, ...]] = {
    BASE: (),
    "bf16": ("compression.codec=bf16",),
    "fp16": ("compression.codec=fp16",),
    "int8": ("compression.codec=int8",),
    "int4": ("compression.codec=int4",),
    "qsgd": ("compression.codec=qsgd",),
    "sign": ("compression.codec=sign",),
    "topk": ("compression.codec=topk",),
    "randomk": ("compression.codec=randomk",),
    "threshold": ("compression.codec=threshold",),
    "powersgd": ("compression.codec=powersgd",),
    "sign, begins whole": ("compression.codec=sign", "compression.warmup_steps=45"),
    "topk, begins whole": ("compression.codec=topk", "compression.warmup_steps=45"),
    "onebit_adam": ("compression.codec=onebit_adam", "compression.warmup_steps=45"),
    "lamb, none": ("optim.name=lamb",),
    "onebit_lamb": ("optim.name=lamb", "compression.codec=onebit_lamb", "compression.warmup_steps=45"),
    "local SGD, 8 steps": ("outer.method=average", "outer.every=8"),
    "DiLoCo, 8 steps": ("outer.method=nesterov", "outer.every=8"),
    "DiLoCo, 8 steps, int4": ("outer.method=nesterov", "outer.every=8", "compression.codec=int4"),
    "DiLoCo, 32 steps, int8": ("outer.method=nesterov", "outer.every=32", "compression.codec=int8"),
    "Adasum": ("outer.method=adasum", "outer.every=1"),
}
"""Name -> what it changes in the config; all else is the same. A new method is a line here and `--only NAME`."""
MODELS = {"gpt": "convergence_gpt.yaml", "bert": "convergence_bert.yaml"}
TITLES = {"gpt": "GPT", "bert": "BERT"}
LOSSES = {"gpt": "nats a token", "bert": "nats a masked token"}
RANKS = 2
FOLDER = "shared/data/wikitext-2"


@dataclass
class Run:
    """One contestant, model and seed."""

    contestant: str
    model: str
    seed: int
    state: str
    """done; diverged: the loss or the gradient was no longer a number; failed: anything else."""
    message: str
    """The last line of what a run printed that is not done."""
    curve: list[tuple[int, int, float | None]]
    """Of every evaluation: steps, tokens and held-out loss in nats; for BERT that of masked tokens alone."""
    accuracy: float | None
    """Masked tokens that were predicted right at the end, a share; BERT only."""
    wire_bytes: float | None
    """Bytes that leave a rank in a step, mean over all steps."""
    seconds: float
    """Of the whole process; the machine may have done other work beside."""
    overrides: list[str]
    commit: str | None

    @property
    def loss(self) -> float | None:
        """Held-out loss at the end; None where the run did not get there."""
        return self.curve[-1][2] if self.state == "done" and self.curve else None

    @property
    def diverged(self) -> bool:
        """Whether it ended in no number, or in a loss above that of its first evaluation."""
        first = self.curve[0][2] if self.curve else None
        return self.state == "diverged" or (self.loss is not None and first is not None and self.loss > first)


def main(
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings of all runs.")] = None,
    data: Annotated[Path, typer.Option(help="Folder with train.txt and valid.txt.")] = ROOT.parent / FOLDER,
    only: Annotated[list[str] | None, typer.Option(help="Contestants to run; all by default.")] = None,
    seeds: Annotated[list[int] | None, typer.Option(help="1, 2 and 3 by default.")] = None,
    models: Annotated[list[str] | None, typer.Option(help="gpt, bert or both.")] = None,
    out: Annotated[Path | None, typer.Option(help="Result files, without suffix.")] = None,
    pictures: Annotated[Path, typer.Option(help="Folder of the pictures.")] = ROOT / "docs" / "pictures",
    again: Annotated[bool, typer.Option("--again", help="Repeat runs that failed.")] = False,
    draw: Annotated[bool, typer.Option("--draw", help="Only write tables and pictures of what is there.")] = False,
) -> None:
    """Train every contestant on every model and seed, and write the tables and pictures."""
    if unknown := {*(only or []), *(models or [])} - {*CONTESTANTS, *MODELS}:
        raise typer.BadParameter(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(CONTESTANTS)}")
    about = report.describe("cpu", 1, shlex.join(["python", "benchmarks/convergence.py", *(words or [])]))
    out = out or existing(report.file_name(about).replace("throughput_", "convergence_"))
    workload = {
        "overrides": words or [],
        **{m: yaml.safe_load((HERE / file).read_text()) for m, file in MODELS.items()},
    }
    kept, runs = read(out)
    if kept.get("workload", workload) != workload:
        raise SystemExit(f"{out}.json was measured with other settings; give another --out")
    about = kept.get("about", about)
    if not draw:
        runs = [run for run in runs if not (again and run.state == "failed")]
        known = {(run.contestant, run.model, run.seed) for run in runs}
        plan = [(name, model, seed) for seed in seeds or (1, 2, 3) for model in models or MODELS
                for name in only or CONTESTANTS if (name, model, seed) not in known]  # fmt: skip
        with tempfile.TemporaryDirectory() as scratch:
            commit = report.commit()
            for number, (name, model, seed) in enumerate(plan, start=1):
                runs.append(train(commit, name, model, seed, data.resolve(), words or [], Path(scratch)))
                print(f"{number}/{len(plan)} {describe(runs[-1])}", file=sys.stderr, flush=True)
                write(out, about, workload, runs)
    write(out, about, workload, runs)
    for picture, figure in (("loss", loss_figure(runs)), ("bytes", bytes_figure(runs))):
        save(figure, pictures / f"convergence_{picture}.svg")
    print(out.with_suffix(".md"))


def existing(name: str) -> Path:
    """The newest results of this hardware, of whatever month; a new file's path where there are none."""
    found = sorted(HERE.glob(f"{name.rpartition('_')[0]}_*.json"))
    return (found[-1] if found else HERE / name).with_suffix("")


def train(commit: str | None, name: str, model: str, seed: int, data: Path, words: Sequence[str], scratch: Path) -> Run:
    """One run in fresh processes. The tokens and the vocabulary are prepared by the first run of a model."""
    label = f"{model}-{name.replace(', ', '-').replace(' ', '_')}-{seed}"
    mine = [*words, *CONTESTANTS[name]]
    command = [sys.executable, "-m", "disttrain", "train", str(HERE / MODELS[model]), "--nproc", str(RANKS),
               f"data.path={data / 'train.txt'}", f"data.held_out_path={data / 'valid.txt'}",
               f"data.cache_dir={scratch / 'cache'}", f"run.dir={scratch}", f"run.name={label}", f"run.seed={seed}",
               *mine]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return result(Run(
        contestant=name, model=model, seed=seed, state="done" if done.returncode == 0 else "failed",
        message="" if done.returncode == 0 else last_line(done.stdout + done.stderr), curve=[], accuracy=None,
        wire_bytes=None, seconds=round(time.monotonic() - began, 1), overrides=mine, commit=commit,
    ), scratch / label)  # fmt: skip


def result(run: Run, folder: Path) -> Run:
    """The run with what its metrics.jsonl says; a run that failed may have none."""
    from disttrain.loggers.jsonl import FILE, read_records

    if not (folder / FILE).exists():
        return run
    records = read_records(folder / FILE)
    steps = [record for record in records if record["kind"] == "step"]
    evals = [record for record in records if record["kind"] == "eval"]
    for record in evals:
        loss = record.get("eval_loss_mlm", record["eval_loss"])
        run.curve.append((record["step"], record["tokens_seen"], loss if math.isfinite(loss) else None))
    if evals:
        run.accuracy = evals[-1].get("mlm_accuracy")
    if steps:
        sent = sum(record["wire_bytes_per_step"] * record["interval_steps"] for record in steps)
        run.wire_bytes = sent / sum(record["interval_steps"] for record in steps)
    if run.state == "failed" and any(record.get("non_finite") for record in records):
        run.state = "diverged"
    return run


def last_line(text: str) -> str:
    """The last line that says something."""
    return next((line.strip()[:300] for line in reversed(text.splitlines()) if line.strip()), "it printed nothing")


def describe(run: Run) -> str:
    """One finished run, for the terminal."""
    loss = f"held-out loss {run.loss:.4f}" if run.loss is not None else f"{run.state}: {run.message}"
    return f"{TITLES[run.model]} {run.contestant}, seed {run.seed}: {loss}, {run.seconds:.0f} s"


def read(out: Path) -> tuple[dict[str, Any], list[Run]]:
    """What the result file holds besides runs, and the runs."""
    path = out.with_suffix(".json")
    if not path.exists():
        return {}, []
    content = json.loads(path.read_text())
    return content, [Run(**run) for run in content.pop("runs")]


def write(out: Path, about: dict[str, Any], workload: dict[str, Any], runs: Sequence[Run]) -> None:
    """Both files; the JSON with a line for each run."""
    order = {name: place for place, name in enumerate(CONTESTANTS)}
    runs = sorted(runs, key=lambda run: (run.seed, run.model != "gpt", order.get(run.contestant, len(order))))
    head = json.dumps({"about": about, "workload": workload}, indent=1).removesuffix("\n}")
    lines = ",\n".join(f"  {json.dumps(asdict(run))}" for run in runs)
    temporary = out.with_suffix(".tmp")
    temporary.write_text(f'{head},\n "runs": [\n{lines}\n ]\n}}\n')
    temporary.replace(out.with_suffix(".json"))
    out.with_suffix(".md").write_text(markdown(about, workload, runs))


@dataclass(frozen=True)
class Row:
    """What one contestant came to on one model, over the seeds."""

    contestant: str
    losses: list[float]
    """Held-out losses at the end of the runs that got there."""
    increases: list[float]
    """Loss over that of the uncompressed run of the same seed, less one, in %."""
    share: float | None
    """Bytes on the wire over those of the uncompressed runs."""
    accuracy: float | None
    runs: int
    diverged: int
    failed: int


def summarise(runs: Iterable[Run], model: str) -> list[Row]:
    """A row for each contestant, in the order of CONTESTANTS."""
    mine = [run for run in runs if run.model == model]
    base = {run.seed: run for run in mine if run.contestant == BASE}
    losses = {seed: run.loss for seed, run in base.items()}
    whole = mean([run.wire_bytes for run in base.values()])
    rows = []
    for name in CONTESTANTS:
        own = sorted((run for run in mine if run.contestant == name), key=lambda run: run.seed)
        if own:
            sent = mean([run.wire_bytes for run in own])
            pairs = [(run.loss, losses.get(run.seed)) for run in own]
            rows.append(Row(
                contestant=name,
                losses=[loss for loss, _ in pairs if loss is not None],
                increases=[100 * (loss / to - 1) for loss, to in pairs if loss is not None and to is not None],
                share=sent / whole if sent is not None and whole else None,
                accuracy=mean([run.accuracy for run in own]),
                runs=len(own),
                diverged=sum(run.diverged for run in own),
                failed=sum(run.state == "failed" for run in own),
            ))  # fmt: skip
    return rows


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the numbers among them; None without any."""
    numbers = [value for value in values if value is not None]
    return statistics.fmean(numbers) if numbers else None


def spread(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation over the seeds (of a sample)."""
    if not values:
        return "-"
    text = format(statistics.fmean(values), form)
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):{form.removeprefix('+')}}"


def markdown(about: dict[str, Any], workload: dict[str, Any], runs: Sequence[Run]) -> str:
    """The report: a table for each model."""
    seeds = sorted({run.seed for run in runs})
    versions = f"Python {about['python']}, torch {about['versions']['torch']}"
    commits = ", ".join(sorted({run.commit or "unknown" for run in runs}))
    lines = [
        f"# Gradient compression and loss, {about['cpu']}, {about['date'][:7]}",
        "",
        f"- Machine: {about['cpu']}, {about['cores']} cores; {RANKS} ranks of one thread. {versions}, commit {commits}.",
        f"- Command: `{about['command'].strip()}`",
        *(f"- {TITLES[model]}: {shape(workload[model])}." for model in MODELS),
        f"- Changed in all runs: {', '.join(workload['overrides']) or 'nothing'}. Seeds: {', '.join(map(str, seeds))}.",
        "",
        "Held-out loss at the end, mean ± standard deviation over the seeds; beside it the difference to the uncompressed "
        "run of the same seed (same weights at the start, same data in the same order), mean ± standard deviation. Bytes: "
        "`wire_bytes_per_step` over that of the uncompressed run. Diverged: the loss was no longer a number, or higher at "
        "the end than at the first evaluation.",
    ]
    for model in MODELS:
        if rows := summarise(runs, model):
            lines += ["", f"## {TITLES[model]}, {LOSSES[model]}", "", table(rows)]
    troubles = [run for run in runs if run.state != "done"]
    if troubles:
        lines += ["", "## Runs that did not end", "", *(f"- {describe(run)}" for run in troubles)]
    return "\n".join(lines) + "\n"


def shape(config: dict[str, Any]) -> str:
    """A config in a few words."""
    model, data, steps, optim = (config[name] for name in ("model", "data", "train", "optim"))
    return (f"{model['layers']} layers, {model['hidden_size']} wide, {data['tokenizer']} vocabulary of "
            f"{data['tokenizer_vocab_size']}; {steps['steps']} steps of {steps['global_batch_size']} sequences of "
            f"{data['sequence_length']} tokens; AdamW, learning rate {optim['lr']}")  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """One model's."""
    accuracy = any(row.accuracy is not None for row in rows)
    head = ["", "held-out loss", "difference, %", "bytes", *(["masked tokens right"] if accuracy else []), "diverged"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        troubles = f"{row.diverged} of {row.runs}" if row.diverged else "no"
        lines.append([
            row.contestant,
            spread(row.losses, ".4f"),
            "" if row.contestant == BASE else spread(row.increases, "+.2f"),
            "-" if row.share is None else f"{row.share:.4f}",
            *([] if not accuracy else ["-" if row.accuracy is None else f"{100 * row.accuracy:.1f} %"]),
            troubles + (f", {row.failed} failed" if row.failed else ""),
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


COLOURS = ("#1f5a94", "#c8502d", "#2e8b57", "#8e5bb5", "#b8860b", "#3aa6b9", "#d6478b", "#6b7f3a", "#7a4b2a", "#909090")
"""Of the contestants but the uncompressed one, which is black, in their order; they repeat, with dotted lines."""


def colour(name: str) -> str:
    """A contestant's colour, the same in all pictures."""
    return "#000000" if name == BASE else COLOURS[(list(CONTESTANTS).index(name) - 1) % len(COLOURS)]


def panels(rows: int, height: float) -> tuple[Any, dict[str, list[Any]]]:
    """A figure with a column of panels for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, height), layout="constrained")
    grid = figure.subplots(rows, len(MODELS), sharex="col", squeeze=False)
    axes = {model: list(grid[:, column]) for column, model in enumerate(MODELS)}
    for model, column in axes.items():
        column[0].set_title(TITLES[model], loc="left")
        for panel in column:
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def percent_axis(axis: Any, ticks: Sequence[float], times: float) -> None:
    """These ticks and no others, `times` their value in %."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{times * value:g} %")


def increase_axis(panel: Any) -> None:
    """Increase in %, straight up to 1 % and in powers above."""
    panel.set_yscale("symlog", linthresh=1.0, linscale=0.6)
    percent_axis(panel.yaxis, [-2, -1, -0.5, 0, 0.5, 1, 2, 5, 10, 20, 50], 1)
    panel.axhline(0, color="#000000", linewidth=0.8)


def loss_figure(runs: Sequence[Run]) -> Any:
    """Held-out loss against tokens, and its increase over the uncompressed run's: means over the seeds that ended."""
    figure, axes = panels(2, 7)
    for model, (upper, lower) in axes.items():
        done = [run for run in runs if run.model == model and run.loss is not None]
        base = {run.seed: run for run in done if run.contestant == BASE}
        for name in CONTESTANTS:
            own = [run for run in done if run.contestant == name and run.seed in base]
            if not own:
                continue
            tokens = points(own, lambda run: [point[1] / 1000 for point in run.curve])
            losses = points(own, lambda run: [point[2] for point in run.curve])
            repeated = list(CONTESTANTS).index(name) > len(COLOURS)
            style = {"color": colour(name), "linewidth": 1.3, "linestyle": ":" if repeated else "-",
                     "label": f"{losses[-1]:.3f}  {name}"}  # fmt: skip
            if name == BASE:
                style |= {"linewidth": 2.2, "linestyle": "--", "zorder": 3}
            upper.plot(tokens, losses, **style)
            if name != BASE:
                lower.plot(tokens, points(own, partial(increases, bases=base)), **style)
        increase_axis(lower)
        lower.set_xlabel("thousands of training tokens")
        upper.set_ylabel(f"held-out loss, {LOSSES[model]}")
        lower.set_ylabel("increase over uncompressed")
        lines = sorted(upper.get_lines(), key=lambda line: line.get_ydata()[-1], reverse=True)
        upper.legend(handles=lines, frameon=False, fontsize=8, title="at the end", title_fontsize=8,
                     loc="upper left", bbox_to_anchor=(1.0, 1.0))  # fmt: skip
    return figure


def points(runs: Sequence[Run], of: Callable[[Run], Sequence[float | None]]) -> list[float]:
    """Means over the runs, evaluation by evaluation."""
    return [statistics.fmean(math.nan if v is None else v for v in at) for at in zip(*map(of, runs), strict=True)]


def increases(run: Run, bases: dict[int, Run]) -> list[float | None]:
    """Loss over that of its seed's uncompressed run, less one, in %, at every evaluation."""
    pairs = [(mine[2], other[2]) for mine, other in zip(run.curve, bases[run.seed].curve, strict=True)]
    return [100 * (mine / other - 1) if mine is not None and other else None for mine, other in pairs]


def bytes_figure(runs: Sequence[Run]) -> Any:
    """Increase of the final loss against bytes on the wire: means and standard deviations over the seeds."""
    figure, axes = panels(1, 4.5)
    for model, (panel,) in axes.items():
        names = []
        for row in summarise(runs, model):
            if row.contestant == BASE or not row.increases or row.share is None:
                continue
            at = statistics.fmean(row.increases)
            error = statistics.stdev(row.increases) if len(row.increases) > 1 else 0.0
            panel.errorbar(row.share, at, error, color=colour(row.contestant), marker="o", markersize=5, capsize=3)
            names.append((row.contestant, (row.share, at)))
        panel.set_xscale("log")
        panel.margins(0.2, 0.1)
        percent_axis(panel.xaxis, [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1], 100)
        increase_axis(panel)
        panel.set_xlabel("bytes on the wire a step, of the uncompressed run's")
        panel.set_ylabel("increase of the held-out loss at the end")
        figure.draw_without_rendering()  # so that places are known
        write_names(panel, names)
    return figure


def write_names(panel: Any, names: Sequence[tuple[str, tuple[float, float]]]) -> None:
    """Each name beside its point, where it covers no point and no other name."""
    from matplotlib.transforms import Bbox

    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in (panel.transData.transform(at) for _, at in names)]
    for name, at in names:
        for shift, side in (((8, 4), "left"), ((8, -12), "left"), ((-8, 4), "right"), ((-8, -12), "right")):
            text = panel.annotate(name, at, shift, textcoords="offset points", fontsize=9, ha=side, color=colour(name))
            box = text.get_window_extent()
            inside = panel.bbox.x0 < box.x0 and box.x1 < panel.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:
            text = panel.annotate(name, at, (8, -24), textcoords="offset points", fontsize=9, color=colour(name))
        taken.append(text.get_window_extent())


def save(figure: Any, path: Path) -> None:
    """As SVG whose texts stay texts, the same bytes for the same figure."""
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "convergence", "font.family": "sans-serif"}):
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    typer.run(main)
