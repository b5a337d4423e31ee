"""Checkpoints: distributed (torch DCP), atomic, checked by size and checksum, the newest good one found by itself.

A checkpoint is the folder ``checkpoints/step_00000100``: the shards that DCP wrote, ``trainer.json`` (position of the
run), and ``manifest.json`` with the size and CRC-32 of every other file. It is written as ``step_00000100.writing``
and renamed when every file is on disk, so that a folder with the final name is whole unless it was damaged later.
"""

import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAME = re.compile(r"^step_(\d{8})$")
MANIFEST, TRAINER = "manifest.json", "trainer.json"


class CheckpointFailed(RuntimeError):
    """A checkpoint could not be written or read; the older ones are untouched."""


def save(folder: Path, step: int, tensors: dict[str, Any], trainer: dict[str, Any], keep: int) -> Path:
    """Write checkpoint number `step` below `folder` together with all ranks; drop all but the newest `keep`.

    `tensors` is what DCP shards (model and optimizer), `trainer` what JSON holds. Raises CheckpointFailed.
    """
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    from disttrain.parallel.collectives import gather_objects

    final = folder / f"step_{step:08d}"
    writing = final.with_name(final.name + ".writing")
    first = dist.get_rank() == 0

    def attempt(action: Callable[[], Any]) -> list[Any]:
        """What the action gave on every rank; all ranks raise together if it failed on one."""
        try:
            outcome = action()
        except (Exception, dcp.api.CheckpointException) as error:  # CheckpointException is no Exception
            outcome = CheckpointFailed(f"the checkpoint of step {step} could not be written: {_root_cause(error)}")
        outcomes = gather_objects(outcome)
        failures = [o for o in outcomes if isinstance(o, CheckpointFailed)]
        if failures:
            if first:
                shutil.rmtree(writing, ignore_errors=True)
            raise failures[0]
        return outcomes

    attempt(lambda: _make_empty(writing) if first else None)
    attempt(lambda: dcp.save(tensors, storage_writer=FileSystemWriter(writing, single_file_per_rank=True)) and None)
    checksums = attempt(lambda: _checksums(writing, f"__{dist.get_rank()}_"))
    attempt(lambda: _finish(writing, final, trainer, checksums) if first else None)
    attempt(lambda: prune(folder, keep) if first else None)
    return final


def load(path: Path, tensors: dict[str, Any]) -> dict[str, Any]:
    """Fill `tensors` in place from a checkpoint, together with all ranks, and return the trainer's JSON part.

    Raises CheckpointFailed where the checkpoint does not fit the model.
    """
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    alone = not dist.is_initialized()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # alone on purpose
            dcp.load(tensors, storage_reader=FileSystemReader(path), no_dist=alone)
    except (Exception, dcp.api.CheckpointException) as error:
        raise CheckpointFailed(f"{path} could not be loaded: {_root_cause(error)}") from error
    return json.loads((path / TRAINER).read_text())


def newest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and one line for each newer one that is not. Imports no torch."""
    damaged = []
    for path in sorted(checkpoints(folder), reverse=True):
        reason = damage(path)
        if reason is None:
            return path, damaged
        damaged.append(f"{path.name}: {reason}")
    return None, damaged


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return sorted(p for p in folder.glob("step_*") if NAME.match(p.name) and p.is_dir()) if folder.is_dir() else []


def step_of(path: Path) -> int:
    """The step at which a whole checkpoint was taken, whatever its folder is called."""
    return json.loads((path / TRAINER).read_text())["step"]


def damage(path: Path) -> str | None:
    """Why a checkpoint cannot be used, or None if every file has the size and CRC-32 that the manifest states."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files: dict[str, list[int]] = manifest["files"]
        json.loads((path / TRAINER).read_text())
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its description is unreadable ({type(error).__name__})"
    for name, (size, checksum) in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (path / name).stat().st_size != size:
            return f"{name} has {(path / name).stat().st_size} bytes, not {size}"
        if _crc32(path / name) != checksum:
            return f"{name} has another checksum than when it was written"
    return None


def clean(folder: Path) -> None:
    """Remove what an interrupted save or removal left behind."""
    for left in (*folder.glob("step_*.writing"), *folder.glob("step_*.deleting")):
        shutil.rmtree(left, ignore_errors=True)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; renamed first, so that none is ever half removed."""
    for old in checkpoints(folder)[:-keep]:
        doomed = old.with_name(old.name + ".deleting")
        old.rename(doomed)
        shutil.rmtree(doomed)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _finish(writing: Path, final: Path, trainer: dict[str, Any], checksums: list[dict[str, list[int]]]) -> None:
    files = {name: check for rank in checksums for name, check in rank.items()}
    _write(writing / TRAINER, json.dumps(trainer, indent=1))
    for name in (TRAINER, ".metadata"):
        files |= _checksums(writing, name)
    _write(writing / MANIFEST, json.dumps({"format": 1, "files": files}, indent=1))
    _sync_folder(writing)
    if final.exists():  # the same step again, after a resume from an older checkpoint
        shutil.rmtree(final)
    writing.rename(final)
    _sync_folder(final.parent)


def _checksums(folder: Path, prefix: str) -> dict[str, list[int]]:
    return {p.name: [p.stat().st_size, _crc32(p)] for p in sorted(folder.iterdir()) if p.name.startswith(prefix)}


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _root_cause(error: BaseException) -> str:
    """The message of what went wrong first; DCP wraps every rank's failure in an exception of its own."""
    failures = getattr(error, "failures", None)
    if failures:
        first = failures[sorted(failures)[0]]
        error = first[0] if isinstance(first, tuple) else first
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
