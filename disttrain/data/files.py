"""Files that are either whole or absent: atomic writes, checksums, and one writer at a time."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from disttrain.config.problems import Problem, RefusedInput

TEMPORARY = ".tmp"
"""Suffix of files that are being written; one that is found later was left by a killed process."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is never seen half-written: temporary name, fsync, rename, fsync of the folder.

    Raises RefusedInput when the disk is full, OSError otherwise.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RefusedInput([disk_full(path.parent)]) from error
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def disk_full(folder: Path, needed: int | None = None) -> Problem:
    """The problem of a disk without room; needed is an estimate in bytes."""
    amount = "" if needed is None else f" (about {needed / 2**20:,.0f} MiB are needed)"
    return Problem(
        ("data.cache_dir",),
        f"the disk of {folder} has no room for the prepared data{amount}",
        "free space, give data.cache_dir on another disk, or limit data.max_bytes",
    )


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(value: object) -> str:
    """20 hexadecimal digits that stand for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


@contextlib.contextmanager
def one_writer(folder: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a folder's lock file; a second process waits (on_wait is called once). A killed holder frees it.

    The lock is flock's: it works between processes of one machine and, on most shared file systems, between machines.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as lock:
        waiting = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting and on_wait is not None:
                    on_wait()
                waiting = True
                time.sleep(0.1)
        yield


def remove_temporary(folder: Path) -> None:
    """Delete what killed processes left half-written. Call it with the folder's lock held."""
    for path in folder.glob(f"*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def mapped(path: Path) -> np.ndarray:
    """An array file, mapped and not read; never a pickle. Raises OSError and ValueError for what is none."""
    return np.load(path, mmap_mode="r", allow_pickle=False)
