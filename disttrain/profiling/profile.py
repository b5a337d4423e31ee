"""Takes the profile of a run: when it begins and ends, and what it leaves in the run folder."""

import json
import logging
import platform
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disttrain import ranges
from disttrain.config.profile import SHOWN_RANKS, ProfileConfig
from disttrain.engines import Engine
from disttrain.parallel import world
from disttrain.parallel.collectives import gather_objects
from disttrain.profiling import memory, session, table
from disttrain.profiling.activity import activities
from disttrain.profiling.seconds import on_the_way, step_rows

DEFAULT_STEPS = 3
WARMUP_STEPS = 3
"""Steps of a process that are left alone before, as `disttrain.metrics` leaves them out of averages."""


@dataclass(frozen=True)
class Place:
    """What a profile has to know of the run."""

    rank: int
    device_type: str
    engine_name: str
    folder: Path
    """Of the run."""
    total_steps: int


@dataclass(frozen=True)
class Told:
    """What there is to say of a profile."""

    event: str
    message: str
    details: dict[str, Any]


def window(settings: ProfileConfig, begins: int, total: int) -> tuple[int, int] | None:
    """First and last step whose seconds are taken, in a process whose first step is `begins` of a run of `total`. The step
    before them belongs to it too. None where none is left."""
    earliest = begins + 1
    if settings.steps is not None:
        first, last = max(settings.steps[0], earliest), min(settings.steps[1], total)
    else:
        last = min(begins + WARMUP_STEPS + DEFAULT_STEPS, total)
        first = max(earliest, last - DEFAULT_STEPS + 1)
    return (first, last) if first <= last else None


class Profile:
    """One rank's; all ranks call each method together. One profile a process."""

    def __init__(self, settings: ProfileConfig, place: Place, engine: Callable[[], Engine]):
        self._settings, self._place, self._engine = settings, place, engine
        chosen = range(SHOWN_RANKS) if settings.ranks is None else settings.ranks
        self._shown = place.rank in chosen
        self._begins: int | None = None
        """The first step of this process."""
        self._asked: tuple[int, int] | None = None
        self._over = False
        self._steps: list[int] = []
        self._session: session.Session | None = None
        self._kept: list[memory.Kept] = []
        self._open = ExitStack()
        self._memory: memory.Timeline | None = None
        self._wrong: list[str] = []

    def looks_at(self, step: int) -> bool:
        """Whether a step is looked at, for its memory or its seconds."""
        return not self._over and self._asked is not None and self._asked[0] - 1 <= step <= self._asked[1]

    def wants_record_of(self, step: int) -> bool:
        """Whether a step must have a record of its own, so that no interval holds both kinds of steps."""
        return self.looks_at(step) or self.looks_at(step + 1)

    def prepare(self, step: int) -> None:
        """Before a step, outside its clock."""
        if self._begins is None:
            self._begins = step
            self._asked = window(self._settings, step, self._place.total_steps)
        if not self.looks_at(step) or self._asked is None:
            return
        if step < self._asked[0]:
            if self._place.rank == 0:
                shutil.rmtree(self._place.folder / table.FOLDER, ignore_errors=True)
            self._begin_memory()
        elif step == self._asked[0]:
            self._record(memory=False)
            world.wait_for_all()  # no rank is late in the first step because it was in its preparation
        self._open.enter_context(ranges.named("step", step))

    def ended(self, step: int) -> None:
        """At the end of a step, when the device is done."""
        if not self.looks_at(step) or self._asked is None:
            return
        self._open.close()
        if step >= self._asked[0]:
            self._steps.append(step)

    def recorded(self, step: int) -> Told | None:
        """After a step's record, outside its clock: what there is to say, once."""
        if self._asked is None:
            return self.finish()
        if not self.looks_at(step):
            return None
        if step < self._asked[0]:
            self._end_memory(step)
        return self.finish() if step == self._asked[1] else None

    def finish(self, because: str = "training ended") -> Told | None:
        """End the profile and write what there is of it; at the end of training too, and before a rollback."""
        if self._over:
            return None
        self._over = True
        self.abandon()
        if not self._steps or self._asked is None:
            return Told("not_profiled", f"no profile: {self._why_none(because)}", {})
        mine = self._results()
        gathered: list[tuple[table.RankSeconds | None, list[str]]] = gather_objects((mine, self._wrong))
        ranks = [found for found, _ in gathered if found is not None]
        if ranks and self._place.rank == 0:
            self._write(table.summarised(self._steps, self._place.device_type, ranks, self._asked))
            gathered[0] = mine, self._wrong
        if wrong := [f"rank {number}: {text}" for number, (_, texts) in enumerate(gathered) for text in texts]:
            return Told("profile_failed", f"the profile is not whole: {'; '.join(wrong[:3])}", {"errors": len(wrong)})
        first, last = self._steps[0], self._steps[-1]
        return Told("profiled", f"profiled steps {first} to {last}: {self._folder}", {"steps": self._steps})

    def _why_none(self, because: str) -> str:
        if self._asked is not None:
            return f"{because} before step {self._asked[0]} was over"
        if self._settings.steps is not None and self._begins is not None:
            return f"steps {self._settings.steps[0]} to {self._settings.steps[1]} are not of this process, which began later"
        return "the run had too few steps left"

    def abandon(self) -> None:
        """Stop recording, also after an error."""
        self._open.close()
        self._engine().watch = None
        if self._session is not None:
            self._session.stop()

    def _begin_memory(self) -> None:
        world.wait_for_all()  # the first rank has cleared the folder
        if not self._shown:
            return
        engine = self._engine()

        def note(moment: str) -> None:
            if moment == "reduced":
                self._kept.append(memory.Kept.of(engine.kept(), self._place.device_type))
                with ranges.named("reduced"):
                    pass

        self._kept = [memory.Kept.of(engine.kept(), self._place.device_type)]
        engine.watch = note
        self._record(memory=True)

    def _record(self, memory: bool) -> None:
        try:
            self._session = session.Session(self._place.device_type, memory, self._log)
        except Exception as error:  # another profiler is at work, say: no reason to end the training
            self._note(error)

    def _end_memory(self, step: int) -> None:
        engine, recorded = self._engine(), self._session
        engine.watch, self._session = None, None
        if recorded is None:
            return
        recorded.stop()
        kept = [*self._kept, memory.Kept.of(engine.kept(), self._place.device_type)]
        try:
            line = memory.timeline(recorded.trace()["traceEvents"], self._place.device_type, kept[0], kept[1], kept[-1])
            if line is not None:
                self._memory = line
                self._folder.mkdir(parents=True, exist_ok=True)
                title = f"memory of rank {self._place.rank} in step {step}"
                memory.draw(line, title, self._folder / f"memory_rank_{self._place.rank:04d}.png")
        except Exception as error:  # a picture that cannot be made is no reason to end the training
            self._note(error)

    def _results(self) -> table.RankSeconds | None:
        """This rank's seconds; None where something went wrong."""
        if self._session is None:
            return None
        try:
            trace = self._session.trace()
            if self._shown:
                self._folder.mkdir(parents=True, exist_ok=True)
                session.write(trace, self._folder / f"rank_{self._place.rank:04d}.json.gz")
            did = activities(trace["traceEvents"], self._place.device_type)
            rows, ways = [step_rows(step) for step in did], [on_the_way(step) for step in did]
            known: dict[str, float | None] = {axis: sum(way[axis] for way in ways) / len(ways) for axis in ways[0]}
            if self._place.engine_name == "horovod":
                known["data"] = None  # it travels in threads of Horovod's, which torch does not see
            return table.RankSeconds(
                self._place.rank, platform.node(), sum(step.end - step.start for step in did) / len(did),
                {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}, known,
                self._memory.at_peak() if self._memory else None,
            )  # fmt: skip
        except Exception as error:
            self._note(error)
            return None

    def _write(self, summary: dict[str, Any]) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / table.FILE).write_text(json.dumps(summary, indent=1))
        except OSError as error:
            self._note(error)

    @property
    def _log(self) -> Path:
        return self._place.folder / "logs" / f"rank_{self._place.rank:04d}.log"

    @property
    def _folder(self) -> Path:
        return self._place.folder / table.FOLDER

    def _note(self, error: Exception) -> None:
        logging.getLogger("disttrain.profiling").error("a part of the profile failed", exc_info=error)
        self._wrong.append(f"{type(error).__name__}: {error}")
