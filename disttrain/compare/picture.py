"""The comparison as one picture, for a page or a paper: throughput, memory, and loss against tokens and time. No torch."""

from pathlib import Path
from typing import Any

from disttrain.compare.comparison import Comparison
from disttrain.compare.labels import Side
from disttrain.compare.plots import front_line, placed, styles, thinned
from disttrain.loggers import readable

LINES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
MARKERS = {"circle": "o", "diamond": "D", "square": "s", "cross": "P"}
PANEL_PX = (520, 380)
"""Size of the panel with names in it."""
OFFSETS: dict[Side, tuple[tuple[int, int], Any, Any]] = {
    "top": ((0, 6), "center", "bottom"),
    "bottom": ((0, -6), "center", "top"),
    "right": ((6, 0), "left", "center"),
    "left": ((-6, 0), "right", "center"),
}
"""Sides of a point in matplotlib's words: distance in points, alignment."""


def draw(comparison: Comparison, path_png: Path) -> None:
    """Draw it into a PNG, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = len(comparison.strategies)
    figure = Figure(figsize=(13, 5.2 + 0.24 * rows), dpi=100, layout="constrained")
    axes = figure.subplots(2, 2, height_ratios=[2.6 + 0.24 * rows, 4.0])
    _throughput(axes[0, 0], comparison)
    _memory(axes[0, 1], comparison)
    _loss(axes[1, 0], comparison, "tokens")
    _loss(axes[1, 1], comparison, "seconds")
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False, fontsize=8)
    figure.suptitle(f"Comparison: {comparison.name}", fontsize=13)
    FigureCanvasAgg(figure)
    figure.savefig(path_png)


def _throughput(axes: Any, comparison: Comparison) -> None:
    looks = styles(comparison)
    known = [s for s in comparison.strategies if s.values["tokens_per_second"] is not None]
    order = sorted(known, key=lambda s: s.values["tokens_per_second"] or 0.0)
    rates = [s.values["tokens_per_second"] or 0.0 for s in order]
    axes.barh(range(len(order)), rates, color=[looks[s.name].colour for s in order], alpha=0.85)
    for row, s in enumerate(order):
        each = [rate for values in s.each if (rate := values["tokens_per_second"]) is not None]
        axes.plot(each, [row] * len(each), "o", color="#333333", markersize=3.5)
    axes.set_yticks(range(len(order)), [s.name for s in order], fontsize=8)
    base = comparison.strategy(comparison.baseline).values["tokens_per_second"]
    if base is not None:
        axes.axvline(base, color="#888888", linestyle=":", linewidth=1.2)
    axes.set_xlabel(f"tokens per second; dots are runs, the line is {comparison.baseline}")
    axes.set_title("Throughput", fontsize=11)
    _plain(axes)


def _memory(axes: Any, comparison: Comparison) -> None:
    looks, line = styles(comparison), front_line(comparison)
    axes.step([m / readable.MIB for m, _ in line], [r for _, r in line], where="post", color="#888888", linestyle=":",
              linewidth=1.2)  # fmt: skip
    for s, memory, rate, side in reversed(placed(comparison, *PANEL_PX)):
        on_front = s.name in comparison.front
        marker = "*" if on_front else MARKERS[looks[s.name].symbol]
        axes.plot(memory / readable.MIB, rate, marker, color=looks[s.name].colour, markersize=13 if on_front else 6)
        if side:
            shift, across, up = OFFSETS[side]
            axes.annotate(s.name, (memory / readable.MIB, rate), xytext=shift, textcoords="offset points", ha=across, va=up,
                          fontsize=7)  # fmt: skip
    what = "reserved device memory" if comparison.on_device else "resident host memory"
    axes.set_xlabel(f"{what} of the worst rank, MiB")
    axes.set_ylabel("tokens per second")
    axes.set_title("Throughput and memory; stars are on the Pareto front", fontsize=11)
    _plain(axes)


def _loss(axes: Any, comparison: Comparison, over: str) -> None:
    looks = styles(comparison)
    for s in comparison.strategies:
        x, y = thinned(s.curve.tokens if over == "tokens" else s.curve.seconds, s.curve.loss)
        look = looks[s.name]
        shown = [float("nan") if loss is None else loss for loss in y]
        axes.plot(x, shown, color=look.colour, linestyle=LINES[look.dash], linewidth=1.3, label=s.name)
    axes.axvline(comparison.equal_tokens if over == "tokens" else comparison.equal_seconds, color="#888888",
                 linestyle=":", linewidth=1.2)  # fmt: skip
    if over == "tokens":
        axes.xaxis.set_major_formatter(lambda value, _: readable.count(value))
    axes.set_xlim(left=0)
    axes.set_xlabel("tokens seen" if over == "tokens" else "seconds inside steps")
    axes.set_ylabel("training loss, nats")
    axes.set_title("Loss against tokens" if over == "tokens" else "Loss against time", fontsize=11)
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
