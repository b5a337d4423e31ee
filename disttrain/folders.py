"""A folder that one process writes at a time, and files in it that are replaced at once. Imports no torch."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from disttrain.config.problems import Problem, RefusedInput


@contextmanager
def exclusive(folder: Path, doing: str = "training", other: str = "use another run.name") -> Iterator[None]:
    """Hold a folder; a second process that wants it is refused, and told to wait or to use another one."""
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RefusedInput([Problem((f"run folder {folder}",), f"another process is {doing} in this folder",
                                        f"wait for it, stop it, or {other}")]) from None  # fmt: skip
        yield
    finally:
        os.close(handle)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file at once, so that a crash leaves the old or the new one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)
