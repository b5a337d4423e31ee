"""What a rank did in each step, from the events of torch's profiler: a list of dictionaries as in a Chrome trace.

On a CPU the thread of the training loop computes where it is in a phase, save where it waits: between two operators, up to
the moment at which something that is on its way arrives. On a GPU its kernels say when it computes, and the host's thread in
which phase, or for which axis, they were launched.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import Any

from disttrain.profiling.intervals import Interval, Intervals, common, union, without
from disttrain.profiling.seconds import AXES, Activity
from disttrain.ranges import HOST, PREFIX

Event = dict[str, Any]

RESUMES_S = 50e-6
"""How soon after an arrival the thread that waited goes on."""
NOT_COMPUTING = ("c10d", "_c10d_functional", "autograd", "torch::autograd", "profiler")
"""Namespaces of operators that hand over, or contain others and what these wait for."""
COMPILED = ("Torch-Compiled Region", "CompiledFunction", "## Call CompiledFxGraph")
"""Ranges of torch.compile's, whose kernels on a CPU are no operators."""
MESSAGES = ("gloo:send", "gloo:recv")
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")


def activities(events: list[Event], device_type: str) -> list[Activity]:
    """One for each step in the trace, in order; none where there is no step. Raises RuntimeError for a GPU's trace without
    any kernel, which would look idle."""
    complete = [event for event in events if event.get("ph") == "X"]
    steps = sorted(_ranges(complete, "step"), key=lambda event: event["ts"])
    if not steps:
        return []
    thread = steps[0]["tid"]
    phases = _phases([event for event in complete if event["tid"] == thread])
    if device_type != "cpu" and not any(event.get("cat") == "kernel" for event in complete):
        raise RuntimeError("no kernel was seen: the GPU's driver may show its counters to administrators only")
    of = _on_host if device_type == "cpu" else _on_device
    return [of(moment(step), thread, phases, complete) for step in steps]


def moment(event: Event) -> Interval:
    """(start, end) in seconds."""
    return event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6


def kind_of(event: Event) -> str:
    """The kind of one of our ranges; empty for other events."""
    name = event["name"]
    return name[len(PREFIX) :].split(" ", 1)[0] if name.startswith(PREFIX) else ""


def _ranges(events: Iterable[Event], *kinds: str) -> list[Event]:
    return [event for event in events if kind_of(event) in kinds]


def _moments(events: Iterable[Event]) -> Intervals:
    return union(moment(event) for event in events)


def _phases(of_thread: list[Event]) -> dict[str, Intervals]:
    """Of the training loop's thread: passes, what the engine does before the first and after the last, waiting for data."""
    found = {kind: _moments(_ranges(of_thread, kind)) for kind in ("forward", "backward")}
    passes = union(found["forward"], found["backward"])
    before, after = [], []
    for start, end in _moments(_ranges(of_thread, "engine")):
        inside = common(passes, [(start, end)])
        if inside:
            before.append((start, inside[0][0]))
            after.append((inside[-1][1], end))
    found["backward"] = without(found["backward"], found["forward"])
    data = _moments(_ranges(of_thread, "data"))
    return {**found, "optimizer": union(after), "prepare": union(before), "loading": union(before, data)}


def _on_host(step: Interval, thread: int, phases: dict[str, Intervals], events: list[Event]) -> Activity:
    """Where operators on the host are what computes."""
    window = [step]
    here = [e for e in events if e["ts"] / 1e6 < step[1] and (e["ts"] + e["dur"]) / 1e6 > step[0]]
    operators = _moments(event for event in here if event["tid"] == thread and _computes(event))
    travelling = _travelling(here, thread, operators)
    inside = common(window, union(*(phases[kind] for kind in ("forward", "backward", "optimizer", "prepare"))))
    waiting = _waiting(without(inside, operators), travelling)
    computing = {kind: without(phases[kind], waiting) for kind in ("forward", "backward", "optimizer")}
    computing["other"] = without(operators, inside)
    return Activity(*step, computing, travelling, without(phases["loading"], waiting))


def _computes(event: Event) -> bool:
    name = event["name"]
    if name.startswith(COMPILED):
        return True
    namespace, colons, _ = name.partition("::")
    return (
        event.get("cat") == "cpu_op"
        and bool(colons)
        and not name.startswith(NOT_COMPUTING)
        and namespace.isidentifier()
    )


def _waiting(gaps: Intervals, travelling: dict[str, Intervals]) -> Intervals:
    """The parts of gaps between operators that end because something has arrived."""
    starts = [start for start, _ in gaps]
    found: Intervals = []
    for sent, arrived in (interval for intervals in travelling.values() for interval in intervals):
        first = bisect_left(starts, arrived - RESUMES_S) - 1
        for start, end in gaps[max(first, 0) : bisect_right(starts, arrived)]:
            if sent < end and start <= arrived <= end + RESUMES_S:
                found.append((max(start, sent), min(arrived, end)))
    return union(found)


def _travelling(events: list[Event], thread: int, operators: Intervals) -> dict[str, Intervals]:
    """By axis, what was on its way between hosts' memories. A message counts until it is waited for."""
    ranges = sorted((e for e in _ranges(events, "communication") if f" {HOST}:" in e["name"]), key=lambda e: e["ts"])
    found: dict[str, list[Interval]] = {axis: [] for axis in AXES}
    for event in ranges:
        if not event["name"].endswith(":send_and_receive"):  # which only starts them
            found[_axis(event)].append(moment(event))
    for event in events:
        if event["name"] in MESSAGES:
            around = [r for r in ranges if r["tid"] == event["tid"] and r["ts"] <= event["ts"] <= r["ts"] + r["dur"]]
            found[_axis(around[-1]) if around else "pipeline"].append(moment(event))
    found["data"] += _unnamed(events, thread, ranges, operators)
    return {axis: union(intervals) for axis, intervals in found.items()}


def _unnamed(events: list[Event], thread: int, ranges: list[Event], operators: Intervals) -> Iterator[Interval]:
    """Collectives that torch itself calls, and waits for: FSDP2 between replicas. They last until the next operator."""
    calls = sorted(
        (e for e in events if e["tid"] == thread and e["name"].startswith("c10d::") and "send" not in e["name"]
         and "recv" not in e["name"]),
        key=lambda e: e["ts"],
    )  # fmt: skip
    at = [call["ts"] for call in calls]
    named = {bisect_left(at, event["ts"]) for event in ranges if event["tid"] == thread}
    starts = [start for start, _ in operators]
    for number, call in enumerate(calls):
        start, end = moment(call)
        if number not in named:
            following = bisect_left(starts, end)
            yield start, starts[following] if following < len(starts) else end


def _axis(event: Event) -> str:
    axis = event["name"].split(" ")[1]
    return axis if axis in AXES else "world"


def _on_device(step: Interval, thread: int, phases: dict[str, Intervals], events: list[Event]) -> Activity:
    """Where kernels are what computes; what the host waits for is the loading of data, and votes over the hosts."""
    launches = {
        e["args"]["correlation"]: e for e in events if e.get("cat") in LAUNCHES and "correlation" in e.get("args", {})
    }
    ranges = _ranges(events, "communication")
    calls = _Calls(ranges)
    computing: dict[str, list[Interval]] = {kind: [] for kind in ("forward", "backward", "optimizer", "other")}
    travelling: dict[str, list[Interval]] = {axis: [] for axis in AXES}
    for event in events:
        if event.get("cat") not in KERNELS or not step[0] <= event["ts"] / 1e6 < step[1]:
            continue
        launch = launches.get(event.get("args", {}).get("correlation"))
        if event["name"].startswith("nccl"):
            travelling[_axis_of_kernel(event, launch and calls.around(launch))].append(moment(event))
        else:
            at = moment(launch or event)[0]
            inside = (kind for kind in ("forward", "backward", "optimizer") if _covers(phases[kind], at))
            computing[next(inside, "other")].append(moment(event))
    for event in ranges:
        if f" {HOST}:" in event["name"] and event["tid"] == thread:
            travelling[_axis(event)].append(moment(event))
    return Activity(*step, {kind: union(found) for kind, found in computing.items()},
                    {axis: union(found) for axis, found in travelling.items()}, phases["loading"])  # fmt: skip


def _covers(moments: Intervals, at: float) -> bool:
    place = bisect_right(moments, (at, float("inf"))) - 1
    return place >= 0 and moments[place][0] <= at < moments[place][1]


class _Calls:
    """Our ranges around collectives, by thread; those of a thread are apart on a GPU, where they only launch."""

    def __init__(self, ranges: Iterable[Event]):
        self._of: dict[Any, list[Event]] = {}
        for event in sorted(ranges, key=lambda event: event["ts"]):
            self._of.setdefault(event["tid"], []).append(event)
        self._starts = {tid: [event["ts"] for event in found] for tid, found in self._of.items()}

    def around(self, launch: Event) -> Event | None:
        """The range in which something was launched."""
        place = bisect_right(self._starts.get(launch["tid"], []), launch["ts"]) - 1
        found = self._of[launch["tid"]][place] if place >= 0 else None
        return found if found and launch["ts"] <= found["ts"] + found["dur"] else None


def _axis_of_kernel(event: Event, call: Event | None) -> str:
    """The axis of the range in which NCCL was called; else what the group is called; else that of the pipeline's messages or
    of FSDP2's sums between replicas, which torch calls by itself."""
    if call is not None:
        return _axis(call)
    group = str(event.get("args", {}).get("Process Group Description", ""))
    if group in ("tensor", "context", "pipeline"):
        return group
    return "pipeline" if group == "tie" or "SendRecv" in event["name"] else "data"
