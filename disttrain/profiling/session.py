"""torch's profiler around some steps of one rank, without a word on the terminal."""

import gzip
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

from disttrain.profiling.activity import MESSAGES, Event, kind_of
from disttrain.ranges import HOST


class Session:
    """One recording. With `memory` it sees this thread's allocations; without, the operators of all threads."""

    def __init__(self, device_type: str, memory: bool, log: Path):
        """What torch's C++ code says of a recording (that it starts, that memory is freed which it has not seen) goes to the
        file `log` instead of the terminal, with `memory` all that is said on stderr until `stop`."""
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device_type == "cuda" else [])]
        threads = _ExperimentalConfig(profile_all_threads=not memory)
        self._profile = profile(
            activities=activities, profile_memory=memory, acc_events=True, experimental_config=threads
        )
        self._log, self._device_type, self._quiet = log, device_type, ExitStack()
        with ExitStack() as quiet:
            quiet.enter_context(stderr_to(log))
            self._profile.start()
            if memory:
                self._quiet = quiet.pop_all()
        self._running = True

    def stop(self) -> None:
        """Record no more; once more is nothing."""
        if not self._running:
            return
        self._running = False
        if self._device_type == "cuda":
            torch.cuda.synchronize()
        with self._quiet, stderr_to(self._log):
            self._profile.stop()

    def trace(self) -> dict[str, Any]:
        """What was recorded, as a Chrome trace, after `stop`."""
        with tempfile.TemporaryDirectory() as folder, stderr_to(self._log):
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            return json.loads(path.read_bytes())


@contextmanager
def stderr_to(log: Path) -> Iterator[None]:
    """Append to a file what this process writes to stderr, whatever wrote it."""
    sys.stderr.flush()
    kept, file = os.dup(2), os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(file, 2)
    os.close(file)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def write(trace: dict[str, Any], path: Path) -> None:
    """Write a trace that chrome://tracing and ui.perfetto.dev read, at once."""
    part = path.with_name(path.name + ".part")
    with gzip.open(part, "wt", compresslevel=4) as file:
        json.dump({**trace, "traceEvents": with_lanes(trace["traceEvents"])}, file, separators=(",", ":"))
    part.replace(path)


def with_lanes(events: list[Event]) -> list[Event]:
    """Give what was on its way between hosts lanes of its own, one for each axis and one for messages: it does not end where
    the thread that began it has gone on to."""
    shown: list[Event] = []
    for number, event in enumerate(events):
        lane, name = _lane(event) if event.get("ph") == "X" else (None, "")
        if lane is None:
            shown.append(event)
            continue
        ends = {"cat": lane, "id": number, "name": name, "pid": event["pid"], "tid": event["tid"]}
        shown.append({**ends, "ph": "b", "ts": event["ts"], "args": event.get("args", {})})
        shown.append({**ends, "ph": "e", "ts": event["ts"] + event["dur"]})
    return shown


def _lane(event: Event) -> tuple[str | None, str]:
    """Where an event is shown, None where it is, and its name there."""
    if event["name"] in MESSAGES:
        return "messages", event["name"]
    if kind_of(event) != "communication" or f" {HOST}:" not in event["name"]:
        return None, ""
    _, axis, operation = event["name"].split(" ", 2)
    return f"communication {axis}", f"{axis} {operation}"
