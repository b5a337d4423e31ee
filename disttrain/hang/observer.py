"""A thread in every rank that notices when nothing moves, and leaves what the rank knows in the run folder."""

import linecache
import logging
import os
import pickle
import shutil
import socket
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from disttrain.config.problems import RefusedInput
from disttrain.failures import lost_a_peer, unwrapped
from disttrain.hang import files
from disttrain.hang.explanation import explain
from disttrain.hang.files import Call, Frame, RankState
from disttrain.hang.reading import evidence_of
from disttrain.launch import RankInfo

SUSPICIOUS, LATE = 0.75, 0.9
"""Share of the time-out after which a rank writes what it knows, and after which one of them says why."""
OTHERS_SPEAK_S = 3.0
"""How long a rank that has failed waits for what the others know."""
CALLS, FRAMES = 50, 60
"""Newest collectives of a group, and innermost frames of a stack, that are kept."""
ROOTS = [(f"{Path(torch.__file__).parent}{os.sep}", "torch/"), (f"{Path(__file__).parent.parent}{os.sep}", "disttrain/"),
         (f"{sysconfig.get_path('purelib')}{os.sep}", "site-packages/"),
         (f"{sysconfig.get_path('stdlib')}{os.sep}", "python/")]  # fmt: skip
"""How `disttrain.hang.stacks` wants files to be named."""


class Unanswered(RuntimeError):
    """Other ranks did not answer: they are late or gone. Showing it says which ones, and why."""

    exit_code = 1

    def __init__(self, message: str, folder: Path, world_size: int):
        super().__init__(message)
        self._folder, self._world_size = folder, world_size

    def show(self) -> None:
        """Wait a little for the files of the others; on each host the first rank that is done explains them, or says where
        to look."""
        deadline = time.monotonic() + OTHERS_SPEAK_S
        while len(files.read(self._folder)) < self._world_size and time.monotonic() < deadline:
            time.sleep(0.1)
        if _claim(self._folder, f"ended_{socket.gethostname()}") and not say_why(self._folder):
            again = f"`disttrain explain {self._folder}` says again why"
            print(f"disttrain: the other ranks did not answer in time; {again}", file=sys.stderr)


def say_why(folder: Path) -> bool:
    """Print the paragraph, once a run: the first rank that comes does. Whether this one did."""
    if not _claim(folder, "explained"):
        return False
    print(f"disttrain: {explain(evidence_of(folder))}", file=sys.stderr, flush=True)
    return True


def _claim(folder: Path, name: str) -> bool:
    """Whether this process is the first to make a file of this name beside those of the ranks."""
    try:
        os.close(os.open(folder / files.FOLDER / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except OSError:
        return False
    return True


class Observer:
    """Looks at one rank from a thread of its own. `step` gives the last step that ended; None before the first."""

    def __init__(self, folder: Path, rank: RankInfo, timeout_s: float):
        self.step: Callable[[], int | None] = lambda: None
        self._folder, self._rank, self._timeout_s = folder, rank, timeout_s
        self._main, self._ended = threading.get_ident(), threading.Event()
        self._written: RankState | None = None
        self._thread = threading.Thread(target=self._look, name="hang observer", daemon=True)

    def start(self) -> None:
        """Begin to look. The first rank removes what an earlier attempt has left; it has not met the others yet."""
        if self._rank.rank == 0:
            shutil.rmtree(self._folder / files.FOLDER, ignore_errors=True)
        if self._rank.world_size > 1:
            self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(OTHERS_SPEAK_S)

    def failed(self, error: BaseException) -> None:
        """Leave what the rank knows when it fails, unless it was seen while it still waited, which tells more."""
        self.stop()
        of_peers = lost_a_peer(error)
        if of_peers and self._written is not None:
            return
        calls = ledger()
        if of_peers and calls and all(call.completed for call in calls):  # torch counts one that has failed among these
            calls = (*calls[:-1], Call(**{**vars(calls[-1]), "completed": False}))
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        self._write(raised_at(error)[:FRAMES], calls, text, of_peers)

    def _look(self) -> None:
        interval = min(1.0, self._timeout_s / 16)
        step, moved = self.step(), time.monotonic()
        while not self._ended.wait(interval):
            now = self.step()
            if now != step or not dist.is_initialized():  # the ranks have not met: nobody can wait for another
                step, moved = now, time.monotonic()
                self._take_back()
            still = time.monotonic() - moved
            called = still > interval and (self._folder / files.FOLDER).exists()  # by a rank that has seen something
            with suppress(OSError):
                if self._written is None and (called or still > SUSPICIOUS * self._timeout_s):
                    self._write(self._stack(), ledger(), None, False)
                if self._written and time.time() - _oldest(self._written) > LATE * self._timeout_s:
                    say_why(self._folder)

    def _take_back(self) -> None:
        """It moves again: nothing hung."""
        if self._written is not None:
            self._written = None
            files.path_of(self._folder, self._rank.rank).unlink(missing_ok=True)
            (self._folder / files.FOLDER / "explained").unlink(missing_ok=True)
            with suppress(OSError):
                (self._folder / files.FOLDER).rmdir()  # the last one out

    def _stack(self) -> tuple[Frame, ...]:
        frame, found = sys._current_frames().get(self._main), []
        while frame is not None and len(found) < FRAMES:
            found.append(frame_of(frame))
            frame = frame.f_back
        return tuple(found)

    def _write(self, stack: tuple[Frame, ...], calls: tuple[Call, ...], error: str | None, of_peers: bool) -> None:
        rank = self._rank
        self._written = RankState(rank.rank, rank.world_size, socket.gethostname(), os.getpid(), self.step(), time.time(),
                                  self._timeout_s, stack, calls, error, of_peers)  # fmt: skip
        files.write(self._folder, self._written)


@contextmanager
def observing(folder: Path, rank: RankInfo, timeout_s: float) -> Iterator[Observer]:
    """Observe what this rank does in the block. Raises Unanswered where it fails because other ranks are late or gone."""
    observer = Observer(folder, rank, timeout_s)
    observer.start()
    try:
        yield observer
    except RefusedInput:
        raise
    except Exception as error:
        if rank.world_size == 1:
            raise
        try:
            observer.failed(unwrapped(error))
        except Exception as another:  # which must not hide the first one
            logging.getLogger("disttrain").error("nothing was written for explain", exc_info=another)
        if lost_a_peer(error):
            logging.getLogger("disttrain").error("other ranks did not answer", exc_info=error)
            raise Unanswered(str(unwrapped(error)), folder, rank.world_size) from error
        raise
    finally:
        observer.stop()


def ledger() -> tuple[Call, ...]:
    """The newest collectives of every group by torch's flight recorder, without the stacks it has kept: to look up their
    lines it would load torch's compiler (docs/decisions/0009)."""
    dump = torch._C._distributed_c10d._dump_fr_trace(includeStackTraces=False)  # pyright: ignore
    groups = dist.distributed_c10d._world
    members = {name: tuple(groups.pg_group_ranks[group]) for group, name in groups.pg_names.items()}
    found: dict[str, list[tuple[int, Call]]] = {}
    for order, entry in enumerate(pickle.loads(dump).get("entries", ())):  # this process has just made these bytes
        backend, _, operation = entry["profiling_name"].partition(":")
        name, axis = entry["process_group"]
        if entry["is_p2p"] or name not in members:
            continue
        shapes, types = tuple(tuple(shape) for shape in entry["input_sizes"]), entry["input_dtypes"]
        call = Call(f"{backend} {name}", axis, members[name], entry["collective_seq_id"], operation, shapes,
                    types[0] if types else "", bool(entry["retired"]), entry["time_created_ns"] / 1e9)  # fmt: skip
        found.setdefault(call.group, []).append((order, call))
    kept = [pair for calls in found.values() for pair in calls[-CALLS:]]
    return tuple(call for _, call in sorted(kept, key=lambda pair: pair[0]))


def _oldest(state: RankState) -> float:
    """When the oldest collective began that has not completed, seconds since 1970; now where there is none."""
    return min((call.since for call in state.calls if not call.completed), default=time.time())


def raised_at(error: BaseException) -> tuple[Frame, ...]:
    """The stack in which an error was raised, innermost frame first."""
    last = traceback.StackSummary.extract(traceback.walk_tb(error.__traceback__), limit=None)
    return tuple(Frame(_short(f.filename), f.lineno or 0, f.name, (f.line or "").strip()) for f in reversed(last))


def frame_of(frame: FrameType) -> Frame:
    """A frame, its file named as `disttrain.hang.stacks` wants it."""
    code = frame.f_code
    text = linecache.getline(code.co_filename, frame.f_lineno).strip()
    return Frame(_short(code.co_filename), frame.f_lineno, code.co_name, text)


def _short(file: str) -> str:
    return next((name + file.removeprefix(root) for root, name in ROOTS if file.startswith(root)), file)
