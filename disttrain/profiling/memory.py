"""Live bytes by category over one step, from what torch's profiler tells of allocations, and their picture."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from disttrain.profiling.activity import Event, kind_of, moment

CATEGORIES = ("weights", "optimizer", "gradients", "gathered weights", "activations", "other")
"""gathered weights: what FSDP2 gathers of sharded ones. activations: allocated in a forward pass and there when it ends.
other: what comes and goes within a pass, and what no other category explains."""
COLOURS = ("#1f5a94", "#6f9bc8", "#c8502d", "#8a6fb0", "#e3a44c", "#bdbdbd")
POINTS = 2000
"""Of the picture's time axis."""
DEVICE_TYPES = {"cpu": 0, "cuda": 1}
"""How torch numbers kinds of devices."""


@dataclass(frozen=True)
class Kept:
    """Memory of an engine's tensors at one moment: category -> {address: bytes}, each piece of memory once."""

    pieces: Mapping[str, Mapping[int, int]]

    @classmethod
    def of(cls, tensors: Mapping[str, Sequence[Tensor]], device_type: str) -> "Kept":
        """Of those on devices of this type; what comes in two categories belongs to the first."""
        seen: set[int] = set()
        pieces: dict[str, dict[int, int]] = {}
        for category in ("weights", "gradients", "optimizer"):
            found = pieces.setdefault(category, {})
            for tensor in tensors.get(category, ()):
                memory = tensor.untyped_storage()
                if tensor.device.type == device_type and memory.nbytes() and memory.data_ptr() not in seen:
                    seen.add(memory.data_ptr())
                    found[memory.data_ptr()] = memory.nbytes()
        return cls(pieces)


@dataclass(frozen=True)
class Timeline:
    """Live bytes of a step by category, after each change."""

    seconds: list[float]
    """Since the step began."""
    live: dict[str, list[int]]
    phases: list[tuple[str, float, float]]
    """(forward, backward or optimizer; start; end)."""

    @property
    def total(self) -> list[int]:
        """Bytes of all categories."""
        return [sum(values) for values in zip(*self.live.values(), strict=True)]

    @property
    def peak(self) -> int:
        """Index of the moment with the most bytes, the first of equals."""
        total = self.total
        return total.index(max(total))

    def at_peak(self) -> dict[str, Any]:
        """Bytes by category at the peak, when that was, and in which phase."""
        at = self.peak
        phase = next((name for name, start, end in self.phases if start <= self.seconds[at] <= end), "between passes")
        return {"bytes": {category: values[at] for category, values in self.live.items()}, "total_bytes": self.total[at],
                "seconds": self.seconds[at], "phase": phase}  # fmt: skip


@dataclass
class _Piece:
    """Memory that was allocated in the step."""

    address: int
    size: int
    began: float
    ended: float


def timeline(events: list[Event], device_type: str, before: Kept, reduced: Kept, after: Kept) -> Timeline | None:
    """The timeline of the one step in a trace with allocations; None where it holds no step.

    `before`, `reduced` and `after` say where the engine's tensors are as the step begins, when its gradients are complete
    (the range `reduced` marks that moment) and as it ends. What was there before and is not the engine's is not known on a
    CPU, and counts as other on a GPU, whose allocator tells all it has given.
    """
    steps = [event for event in events if event.get("ph") == "X" and kind_of(event) == "step"]
    if not steps:
        return None
    step = steps[0]
    ranges = [e for e in events if e.get("ph") == "X" and e["tid"] == step["tid"]]
    told = [
        e for e in events
        if e["name"] == "[memory]" and e["args"].get("Device Type") == DEVICE_TYPES[device_type]
        and step["ts"] <= e["ts"] <= step["ts"] + step["dur"]
    ]  # fmt: skip
    told.sort(key=lambda event: event["ts"])
    start, end = moment(step)
    pieces = _pieces(told, end)
    marks = [moment(e)[0] for e in ranges if kind_of(e) == "reduced"]
    sorted_by = _Sorter(ranges, reduced, after, marks[0] if marks else None, end)
    changes: list[tuple[float, str, int]] = []
    for piece in pieces:
        category = sorted_by.category(piece)
        changes.append((piece.began, category, piece.size))
        if piece.ended < end:
            changes.append((piece.ended, category, -piece.size))
    held = _held(told, device_type, before, reduced, {piece.address for piece in pieces})
    return _added_up(held, changes, start, _phases_of(ranges, start, end))


def _pieces(told: list[Event], end: float) -> list[_Piece]:
    """What was allocated, until it was freed or the step ended."""
    live: dict[int, _Piece] = {}
    pieces = []
    for event in told:
        address, size, at = int(event["args"]["Addr"]), int(event["args"]["Bytes"]), event["ts"] / 1e6
        if size > 0:
            live[address] = _Piece(address, size, at, end)
            pieces.append(live[address])
        elif address in live:
            live.pop(address).ended = at
    return pieces


class _Sorter:
    """Says what a piece of memory is for."""

    def __init__(self, ranges: list[Event], reduced: Kept, after: Kept, mark: float | None, end: float):
        self._gradients, self._mark, self._end = reduced.pieces["gradients"], mark, end
        self._kept = [(name, after.pieces[name]) for name in ("weights", "optimizer")]
        self._forwards = sorted(moment(e) for e in ranges if kind_of(e) == "forward")
        self._gathers = sorted(moment(e) for e in ranges if e["name"].startswith("FSDP::all_gather"))

    def category(self, piece: _Piece) -> str:
        """One of `CATEGORIES`."""
        for name, addresses in self._kept:
            if piece.address in addresses and piece.ended >= self._end:
                return name
        if self._mark and piece.address in self._gradients and piece.began <= self._mark < piece.ended:
            return "gradients"
        if _around(self._gathers, piece.began):
            return "gathered weights"
        forward = _around(self._forwards, piece.began)
        return "activations" if forward and piece.ended > forward[1] else "other"


def _around(ranges: list[tuple[float, float]], at: float) -> tuple[float, float] | None:
    """The last range to begin before a moment, if it holds it."""
    place = bisect_right(ranges, (at, float("inf"))) - 1
    return ranges[place] if place >= 0 and at <= ranges[place][1] else None


def _held(told: list[Event], device_type: str, before: Kept, reduced: Kept, allocated: set[int]) -> dict[str, int]:
    """Bytes by category as the step begins. Gradients that it does not allocate are in memory that stays: DDP's buckets."""
    held: dict[str, int] = dict.fromkeys(CATEGORIES, 0)
    for category in ("weights", "optimizer"):
        held[category] = sum(before.pieces[category].values())
    known = {address for pieces in before.pieces.values() for address in pieces}
    stays = {address: size for address, size in reduced.pieces["gradients"].items() if address not in allocated | known}
    held["gradients"] = sum(stays.values()) + sum(before.pieces["gradients"].values())
    if device_type == "cuda" and told:  # after the first change
        first = int(told[0]["args"]["Total Allocated"]) - int(told[0]["args"]["Bytes"])
        held["other"] = max(0, first - sum(held.values()))
    return held


def _added_up(
    held: dict[str, int], changes: list[tuple[float, str, int]], start: float, phases: list[tuple[str, float, float]]
) -> Timeline:
    seconds, live = [0.0], {category: [held[category]] for category in CATEGORIES}
    for at, category, size in sorted(changes, key=lambda change: change[0]):
        seconds.append(at - start)
        for name, values in live.items():
            values.append(values[-1] + (size if name == category else 0))
    return Timeline(seconds, live, phases)


def _phases_of(ranges: list[Event], start: float, end: float) -> list[tuple[str, float, float]]:
    """Passes in order, and the update after them."""
    passes = sorted(
        (*moment(e), kind) for e in ranges if (kind := kind_of(e)) in ("forward", "backward") and moment(e)[0] >= start
    )
    found = [(kind, began - start, ended - start) for began, ended, kind in passes]
    engines = [moment(e)[1] for e in ranges if kind_of(e) == "engine"]
    if found and engines:
        found.append(("optimizer", max(ended for _, _, ended in found), min(engines[-1], end) - start))
    return found


def draw(line: Timeline, title: str, path: Path) -> None:
    """The picture: 1200 x 720 pixels, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    milliseconds, live = _thinned(line)
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = [(name, colour) for name, colour in zip(CATEGORIES, COLOURS, strict=True) if max(live[name])]
    axes.stackplot(
        milliseconds, *([value / 2**20 for value in live[name]] for name, _ in shown), step="post",
        labels=[name for name, _ in shown], colors=[colour for _, colour in shown], linewidth=0,
    )  # fmt: skip
    peak = line.total[line.peak] / 2**20
    axes.axhline(peak, color="#333333", linewidth=0.8, linestyle="--")
    axes.annotate(f"peak {peak:,.1f} MiB", (milliseconds[-1], peak), ha="right", va="bottom", fontsize=8)
    axes.set_xlim(0, milliseconds[-1])
    axes.set_ylim(0, peak * 1.16)
    for kind, began, ended in line.phases:
        _mark(axes, kind, began * 1e3, ended * 1e3)
    axes.set_xlabel("milliseconds of the step")
    axes.set_ylabel("live MiB")
    axes.spines[["right", "top"]].set_visible(False)
    axes.legend(*(found[::-1] for found in axes.get_legend_handles_labels()), frameon=False, fontsize=8,
                loc="center left", bbox_to_anchor=(1.0, 0.5))  # fmt: skip
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)


def _mark(axes: Any, kind: str, began: float, ended: float) -> None:
    """A strip above the picture; its name where there is room for it."""
    colour = {"forward": "#9bb8d3", "backward": "#e6a58f", "optimizer": "#a9c98f"}[kind]
    axes.axvspan(began, ended, ymin=0.94, ymax=1.0, color=colour, linewidth=0)
    width = axes.get_xlim()[1]
    if ended - began > 0.012 * len(kind) * width:
        axes.text((began + ended) / 2, 0.968, kind, transform=axes.get_xaxis_transform(), ha="center", va="center",
                  fontsize=7)  # fmt: skip


def _thinned(line: Timeline) -> tuple[list[float], dict[str, list[int]]]:
    """Milliseconds and bytes, of each small stretch of time the moment with the most bytes."""
    last = max(line.seconds[-1], *(ended for _, _, ended in line.phases), 1e-9)
    total, best = line.total, {}
    for index, at in enumerate(line.seconds):
        stretch = int(at / last * POINTS)
        if stretch not in best or total[index] > total[best[stretch]]:
            best[stretch] = index
    chosen = [*sorted(best.values()), len(line.seconds) - 1]
    times = [line.seconds[i] * 1e3 for i in chosen[:-1]] + [last * 1e3]
    return times, {name: [values[i] for i in chosen] for name, values in line.live.items()}
