"""The interactive plots of a comparison, as plain plotly figures (data and layout). Imports no torch and no plotly."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from disttrain.compare.comparison import Comparison, Measured
from disttrain.compare.labels import Side, sides
from disttrain.loggers import readable

COLOURS = ("#3b82c4", "#e8833a", "#3fa66b", "#d64f5c", "#8d6cc4", "#a0703f", "#d973b5", "#7f8a99", "#b5ab2e", "#31b1bd")
"""Of strategies, in their order; readable on white and on black."""
DASHES = ("solid", "dash", "dot", "dashdot")
"""Of lines, when the colours begin again."""
SYMBOLS = ("circle", "diamond", "square", "cross")
POINTS = 150
"""Points of a loss curve at the most; each is a mean of as many records as that takes."""
FRONT_PX = (1000, 450)
"""Width and height that the plot of the front has at least on a screen."""
POSITIONS = {"top": "top center", "bottom": "bottom center", "right": "middle right", "left": "middle left"}
"""Sides in plotly's words."""
ROW_PX, FRAME_PX = 26, 110
"""Height of a bar, and of what is around the bars."""


@dataclass(frozen=True)
class Plot:
    """One figure and what to see in it."""

    key: str
    title: str
    caption: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]

    @property
    def of_learning(self) -> bool:
        """Whether it is about speed, memory and loss, or about what the hardware does."""
        return self.key in ("front", "throughput", "loss_tokens", "loss_seconds")


@dataclass(frozen=True)
class Style:
    """How a strategy looks in every plot."""

    colour: str
    dash: str
    symbol: str


def styles(comparison: Comparison) -> dict[str, Style]:
    """A look for every strategy."""
    n = len(COLOURS)
    return {
        s.name: Style(COLOURS[i % n], DASHES[i // n % len(DASHES)], SYMBOLS[i // n % len(SYMBOLS)])
        for i, s in enumerate(comparison.strategies)
    }


def plots(comparison: Comparison) -> list[Plot]:
    """Every plot that has something to show."""
    made = [_front(comparison), _throughput(comparison), _loss(comparison, "tokens"), _loss(comparison, "seconds"),
            _communication(comparison), _bubble(comparison), _mfu(comparison)]  # fmt: skip
    return [plot for plot in made if plot is not None]


def front_line(comparison: Comparison) -> list[tuple[float, float]]:
    """(memory bytes, tokens/s) of the strategies on the front, from the least memory to the most."""
    points = [(s.values["memory_bytes"], s.values["tokens_per_second"]) for s in comparison.strategies
              if s.name in comparison.front]  # fmt: skip
    return sorted((memory, rate) for memory, rate in points if memory is not None and rate is not None)


def placed(
    comparison: Comparison, width_px: float, height_px: float
) -> list[tuple[Measured, float, float, Side | None]]:
    """(strategy, memory in bytes, tokens/s, side of its name), those on the front first, in a plot of this size."""
    known = [(s, memory, rate) for s in comparison.strategies if (memory := s.values["memory_bytes"]) is not None
             and (rate := s.values["tokens_per_second"]) is not None]  # fmt: skip
    known.sort(key=lambda each: each[0].name not in comparison.front)
    where = sides([(memory, rate) for _, memory, rate in known], [s.name for s, _, _ in known], width_px, height_px)
    return [(*each, side) for each, side in zip(known, where, strict=True)]


def thinned(points: Sequence[float], losses: Sequence[float]) -> tuple[list[float], list[float | None]]:
    """A curve of at most POINTS points: each the last point and the mean loss of its records; None where that is nan."""
    size = max(1, -(-len(points) // POINTS))
    ends, means = [], []
    for start in range(0, len(points), size):
        part = losses[start : start + size]
        mean = sum(part) / len(part)
        ends.append(points[min(start + size, len(points)) - 1])
        means.append(mean if math.isfinite(mean) else None)
    return ends, means


def _front(comparison: Comparison) -> Plot:
    looks, data = styles(comparison), []
    line = front_line(comparison)
    data.append({"type": "scatter", "mode": "lines", "x": [m / readable.MIB for m, _ in line], "y": [r for _, r in line],
                 "line": {"shape": "hv", "width": 1.5, "dash": "dot", "color": "#888888"}, "hoverinfo": "skip",
                 "name": "Pareto front", "showlegend": False})  # fmt: skip
    for s, memory, rate, side in reversed(placed(comparison, *FRONT_PX)):
        on_front, look = s.name in comparison.front, looks[s.name]
        marker = {"color": look.colour, "symbol": "star" if on_front else look.symbol, "size": 15 if on_front else 10,
                  "line": {"width": 1, "color": "rgba(128,128,128,0.6)"}}  # fmt: skip
        data.append({"type": "scatter", "mode": "markers+text", "x": [memory / readable.MIB], "y": [rate], "name": s.name,
                     "text": [s.name if side else ""], "textposition": POSITIONS[side or "top"], "textfont": {"size": 10},
                     "marker": marker, "error_y": _error(s), "hovertext": [_hover(s)], "hoverinfo": "text"})  # fmt: skip
    what = "reserved device memory" if comparison.on_device else "resident host memory"
    layout = {"xaxis": {"title": {"text": f"{what} of the worst rank, MiB"}},
              "yaxis": {"title": {"text": "tokens per second"}}, "showlegend": False,
              "height": FRONT_PX[1] + FRAME_PX}  # fmt: skip
    caption = ("Up is faster, left needs less memory. Stars are on the Pareto front: nothing else is as fast with as little "
               "memory. Bars go from the slowest to the fastest repeat.")  # fmt: skip
    return Plot("front", "Throughput and memory", caption, data, layout)


def _throughput(comparison: Comparison) -> Plot:
    looks = styles(comparison)
    known = [s for s in comparison.strategies if s.values["tokens_per_second"] is not None]
    order = sorted(known, key=lambda s: s.values["tokens_per_second"] or 0.0)
    names = [s.name for s in order]
    bars = {"type": "bar", "orientation": "h", "y": names, "x": [s.values["tokens_per_second"] for s in order],
            "marker": {"color": [looks[s.name].colour for s in order], "opacity": 0.85}, "name": "median",
            "hovertext": [_hover(s) for s in order], "hoverinfo": "text",
            "text": [f"{readable.count(s.values['tokens_per_second'])}  x{s.values['ratio']:.2f}"
                     if s.values["ratio"] else "" for s in order],
            "textposition": "inside", "insidetextanchor": "start"}  # fmt: skip
    each = [(s.name, values["tokens_per_second"], i) for s in order for i, values in enumerate(s.each, start=1)]
    dots = {"type": "scatter", "mode": "markers", "y": [name for name, _, _ in each], "x": [rate for _, rate, _ in each],
            "marker": {"color": "#444444", "size": 6, "line": {"width": 1, "color": "#ffffff"}}, "name": "each repeat",
            "hovertext": [f"{name}, run {i}: {readable.count(rate)} tokens/s" for name, rate, i in each],
            "hoverinfo": "text"}  # fmt: skip
    base = comparison.strategy(comparison.baseline).values["tokens_per_second"]
    layout: dict[str, Any] = {"xaxis": {"title": {"text": "tokens per second"}, "rangemode": "tozero"},
                              "yaxis": {"automargin": True}, **_bars(len(order))}  # fmt: skip
    if base is not None:
        layout["shapes"] = [{"type": "line", "x0": base, "x1": base, "yref": "paper", "y0": 0, "y1": 1,
                             "line": {"dash": "dot", "width": 1.5, "color": "#888888"}}]  # fmt: skip
    caption = f"Bars are medians, dots the single runs; the dotted line is the baseline, {comparison.baseline}."
    return Plot("throughput", "Throughput", caption, [bars, dots], layout)


def _loss(comparison: Comparison, over: str) -> Plot:
    looks, data = styles(comparison), []
    for s in comparison.strategies:
        points = s.curve.tokens if over == "tokens" else s.curve.seconds
        x, y = thinned(points, s.curve.loss)
        data.append({"type": "scatter", "mode": "lines", "x": x, "y": y, "name": s.name,
                     "line": {"color": looks[s.name].colour, "dash": looks[s.name].dash, "width": 1.8},
                     "hovertemplate": f"{s.name}<br>%{{x:.4~s}} {over}<br>loss %{{y:.4f}}<extra></extra>"})  # fmt: skip
    end = comparison.equal_tokens if over == "tokens" else comparison.equal_seconds
    label = "tokens seen" if over == "tokens" else "seconds inside steps"
    layout = {"xaxis": {"title": {"text": label}, "rangemode": "tozero"},
              "yaxis": {"title": {"text": "training loss, nats"}}, "height": 520, "hovermode": "closest",
              "shapes": [{"type": "line", "x0": end, "x1": end, "yref": "paper", "y0": 0, "y1": 1,
                          "line": {"dash": "dot", "width": 1.5, "color": "#888888"}}]}  # fmt: skip
    what = "the same text" if over == "tokens" else "the same time"
    caption = (f"Who learns most from {what}. At the dotted line every run has come as far; the table compares there. Click "
               "a name to hide it, twice to see it alone.")  # fmt: skip
    return Plot(f"loss_{over}", f"Loss against {'tokens' if over == 'tokens' else 'time'}", caption, data, layout)


def _communication(comparison: Comparison) -> Plot | None:
    kinds = {"comm_bytes_uncompressed_per_step": ("without a codec", "#c3c9d1"),
             "comm_bytes_per_step": ("handed to collectives", "#3b82c4"),
             "wire_bytes_per_step": ("on the wire, estimated", "#e8833a")}  # fmt: skip
    sending = [s for s in reversed(comparison.strategies) if any(s.values[key] for key in kinds)]
    if not sending:
        return None
    data = [
        {"type": "bar", "orientation": "h", "y": [s.name for s in sending], "name": label, "marker": {"color": colour},
         "x": [None if (v := s.values[key]) is None else v / readable.MIB for s in sending],
         "hovertemplate": "%{y}: %{x:.3f} MiB a step, " + label + "<extra></extra>"}
        for key, (label, colour) in kinds.items()
    ]  # fmt: skip
    layout = {"xaxis": {"title": {"text": "MiB a step, of the rank with the most"}}, "barmode": "group",
              "yaxis": {"automargin": True}, **_bars(1.4 * len(sending)), "legend": _LEGEND}  # fmt: skip
    return Plot("communication", "Communication", "What ranks send each other in a step; a single process sends nothing.",
                data, layout)  # fmt: skip


def _bubble(comparison: Comparison) -> Plot | None:
    staged = [s for s in reversed(comparison.strategies) if s.values["pipeline_bubble_fraction"] is not None]
    if not staged:
        return None
    kinds = {"pipeline_bubble_fraction_theory": ("in theory", "#c3c9d1"),
             "pipeline_bubble_fraction": ("measured", "#d64f5c")}  # fmt: skip
    data = [
        {"type": "bar", "orientation": "h", "y": [s.name for s in staged], "name": label, "marker": {"color": colour},
         "x": [s.values[key] for s in staged], "hovertemplate": "%{y}: %{x:.1%} " + label + "<extra></extra>"}
        for key, (label, colour) in kinds.items()
    ]  # fmt: skip
    layout = {"xaxis": {"title": {"text": "share of the schedule without work"}, "tickformat": ".0%", "rangemode": "tozero"},
              "yaxis": {"automargin": True}, "barmode": "group", **_bars(2 * len(staged)), "legend": _LEGEND}  # fmt: skip
    return Plot("bubble", "Pipeline bubble", "Time in which pipeline ranks wait for each other; sending counts as waiting.",
                data, layout)  # fmt: skip


def _mfu(comparison: Comparison) -> Plot | None:
    known = [s for s in reversed(comparison.strategies) if s.values["mfu_causal"] is not None]
    if not known:
        return None
    kinds = {"hfu": ("HFU, executed", "#c3c9d1"), "mfu_full": ("MFU, full attention", "#e8833a"),
             "mfu_causal": ("MFU, causal", "#3b82c4")}  # fmt: skip
    data = [
        {"type": "bar", "orientation": "h", "y": [s.name for s in known], "name": label, "marker": {"color": colour},
         "x": [s.values[key] for s in known], "hovertemplate": "%{y}: %{x:.1%} " + label + "<extra></extra>"}
        for key, (label, colour) in kinds.items()
    ]  # fmt: skip
    layout = {"xaxis": {"title": {"text": "share of the device's peak"}, "tickformat": ".0%", "rangemode": "tozero"},
              "yaxis": {"automargin": True}, "barmode": "group", **_bars(3 * len(known)), "legend": _LEGEND}  # fmt: skip
    caption = "The same speed by three conventions: never compare one with another."
    return Plot("mfu", "Use of the hardware", caption, data, layout)


_LEGEND = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "traceorder": "reversed"}


def _bars(rows: float) -> dict[str, Any]:
    return {"height": round(ROW_PX * rows + FRAME_PX)}


def _error(s: Measured) -> dict[str, Any]:
    v = s.values
    low, high, mid = v["tokens_per_second_min"], v["tokens_per_second_max"], v["tokens_per_second"]
    if low is None or high is None or mid is None:
        return {"visible": False}
    return {"type": "data", "symmetric": False, "array": [high - mid], "arrayminus": [mid - low], "thickness": 1,
            "width": 3, "color": "#888888"}  # fmt: skip


def _hover(s: Measured) -> str:
    v = s.values
    low, high = readable.count(v["tokens_per_second_min"]), readable.count(v["tokens_per_second_max"])
    lines = [f"<b>{s.name}</b>", s.group.about or "",
             f"{readable.count(v['tokens_per_second'])} tokens/s ({low} to {high})",
             f"{readable.step_time(v['median_step_seconds'])} a step on {v['ranks']:g} rank{'s' if v['ranks'] != 1 else ''}",
             f"{readable.size(v['memory_bytes'])} on the worst rank",
             f"loss {readable.loss(v['loss_at_equal_tokens'])} at equal tokens"]  # fmt: skip
    return "<br>".join(line for line in lines if line)
