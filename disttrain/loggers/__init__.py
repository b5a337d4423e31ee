"""Where records go: metrics.jsonl always, and beside it sinks that may fail without stopping the run."""

import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from disttrain.config.problems import Problem
from disttrain.config.schema import Config
from disttrain.loggers.console import open_console
from disttrain.loggers.jsonl import FILE, JsonlSink, TruthFailed, read_records, rewind
from disttrain.loggers.tensorboard import FOLDER, TensorBoardSink
from disttrain.loggers.wandb import WandbSink

__all__ = ["Loggers", "Sink", "TruthFailed", "open_loggers", "preflight", "read_records"]


class Sink(Protocol):
    """One place that records go to. `write` and `close` may raise anything; the composite copes."""

    name: str

    def write(self, record: dict[str, Any]) -> None:
        """Take one record."""
        ...

    def close(self) -> str | None:
        """Write out what is left and let go; returns a sentence when a person has something to do afterwards."""
        ...


class Loggers:
    """metrics.jsonl and its sinks as one; a context manager that closes all of them, also after an error.

    A record reaches metrics.jsonl first. A sink that raises is closed and left out from then on, reported once: on
    stderr and as the event `sink_failed`.
    """

    def __init__(self, truth: JsonlSink, sinks: Sequence[Sink] = (), clock: Callable[[], float] = time.time):
        self._truth: JsonlSink | None = truth
        self._sinks = list(sinks)
        self._clock = clock
        self._header: dict[str, Any] | None = None

    def add(self, name: str, opens: Callable[[], Sink | None]) -> Sink | None:
        """Open one more sink and give it the header; a failure to open is reported like any other."""
        try:
            sink = opens()
        except Exception as error:
            self._report(name, error)
            return None
        if sink is not None:
            self._sinks.append(sink)
            if self._header is not None:
                self._give(sink, self._header)
        return sink

    def write(self, record: dict[str, Any]) -> None:
        """Give a record, and the time, to every sink. Raises TruthFailed when metrics.jsonl cannot be written."""
        if self._truth is None:
            raise RuntimeError("write after close")
        record = {**record, "time": self._clock()}
        if record["kind"] == "header":
            self._header = record
        self._truth.write(record)
        for sink in list(self._sinks):
            if sink in self._sinks:  # writing the event of one failure may have dropped another sink
                self._give(sink, record)

    def event(self, event: str, message: str, step: int | None = None, **details: Any) -> None:
        """Write an event: its name, a sentence for a person, and details (JSON values) for a program."""
        record: dict[str, Any] = {"kind": "event", "event": event, "step": step, "message": message}
        self.write({**record, "details": details} if details else record)

    def close(self) -> None:
        """Close every sink, metrics.jsonl last. Raises TruthFailed when that one fails. Closing twice is nothing."""
        if self._truth is None:
            return
        try:
            while self._sinks:
                sink = self._sinks.pop(0)  # the console is last and shows what closing the others has to say
                try:
                    self._pass_on(sink.name, sink.close())
                except Exception as error:
                    self._report(sink.name, error)
        finally:
            truth, self._truth = self._truth, None
            truth.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _give(self, sink: Sink, record: dict[str, Any]) -> None:
        try:
            sink.write(record)
        except Exception as error:
            self._drop(sink, error)

    def _drop(self, sink: Sink, error: Exception) -> None:
        self._sinks.remove(sink)
        said = None
        try:
            said = sink.close()
        except Exception as second:
            error.add_note(f"closing it failed as well: {second}")
        self._report(sink.name, error)
        self._pass_on(sink.name, said)

    def _pass_on(self, name: str, said: str | None) -> None:
        if said:
            self.event(name, said)

    def _report(self, name: str, error: Exception) -> None:
        reason = "; ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
        message = f"{name} failed and is left out from now on ({reason})"
        print(f"disttrain: {message}", file=sys.stderr, flush=True)
        self.event("sink_failed", message, sink=name)


def preflight(config: Config) -> list[Problem]:
    """Sinks that are asked for and whose package is not installed. Imports none of them."""
    wanted = {"tensorboard": config.log.tensorboard, "wandb": config.log.wandb}
    return [
        Problem(
            (f"log.{package}=true",),
            f"the package {package} is not installed",
            f"install it (pip install 'disttrain[{package}]') or set log.{package}=false",
        )
        for package, on in wanted.items()
        if on and importlib.util.find_spec(package) is None
    ]


def open_loggers(config: Config, run_dir: Path, header: dict[str, Any], resumed_step: int | None) -> Loggers:
    """Open every sink of a run on its one logging rank and write the header of this process.

    `header` holds the keys that docs/measurement.md lists for it. `resumed_step` is the step of the checkpoint that
    training continues from, None for a new run. Raises
    TruthFailed when metrics.jsonl cannot be written, RefusedInput when the existing one is broken.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / FILE
    if resumed_step is None:
        reached = dropped = 0
    else:
        rewound = rewind(path, resumed_step)
        reached, dropped = max(rewound.reached_step, resumed_step), rewound.dropped
    loggers = Loggers(JsonlSink(path))
    try:
        loggers.write({"kind": "header", **header})
        if config.log.tensorboard:
            loggers.add("tensorboard", lambda: TensorBoardSink(run_dir / FOLDER, resumed_step))
        online = loggers.add("wandb", lambda: WandbSink(config, run_dir, reached)) if config.log.wandb else None
        loggers.add("console", lambda: open_console(config))
        if isinstance(online, WandbSink) and online.url:
            loggers.event("wandb", f"Weights & Biases: {online.url}", url=online.url)
        if dropped:
            message = f"{dropped} records after step {resumed_step} dropped: those steps are done again"
            loggers.event("rewound", message, step=resumed_step, dropped=dropped, reached_step=reached)
    except BaseException:
        loggers.close()
        raise
    return loggers
