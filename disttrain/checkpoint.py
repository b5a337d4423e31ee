"""Checkpoints: distributed (torch DCP), atomic, checked by size and checksum, the newest good one found by itself.

A checkpoint is the folder ``checkpoints/step_00000100``: safetensors files that DCP wrote, each rank's own, with the
place of every shard in its tensor; ``trainer.json`` (position of the run); and ``manifest.json`` with the size and
CRC-32 of every other file. It is written as ``step_00000100.writing`` and renamed when every file is on disk, so that
a folder with the final name is whole unless it was damaged later. Nothing in it is a pickle (decision 0006).
"""

import json
import math
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from disttrain import checkpoint_contents

if TYPE_CHECKING:
    from torch import Tensor

NAME = re.compile(r"^step_(\d{8})$")
FILE_NAME = re.compile(r"^[A-Za-z0-9_-][A-Za-z0-9._-]*\Z")
MANIFEST, TRAINER = "manifest.json", "trainer.json"
FORMAT = 2


class CheckpointFailed(RuntimeError):
    """A checkpoint could not be written or read; the older ones are untouched."""


def save(
    folder: Path, step: int, tensors: dict[str, Any], trainer: dict[str, Any], keep: int, every: int = 0, best: int = 0,
    group: Any = None,
) -> Path:  # fmt: skip
    """Write checkpoint number `step` below `folder` together with all ranks; drop those that `prune` does.

    `tensors` is what DCP shards (model and optimizer), `trainer` what JSON holds. `group` is a process group of all ranks
    of its own, for a thread beside training. Raises CheckpointFailed.
    """
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    final = path_of(folder, step)
    writing = final.with_name(final.name + ".writing")
    first = dist.get_rank() == 0

    def attempt(action: Callable[[], Any]) -> list[Any]:
        try:
            return _together(action, f"the checkpoint of step {step} could not be written", group)
        except CheckpointFailed:
            if first:
                shutil.rmtree(writing, ignore_errors=True)
            raise

    attempt(lambda: _make_empty(writing) if first else None)
    sizes = attempt(lambda: _sizes(tensors))
    writer = dcp.HuggingFaceStorageWriter(str(writing), _file_of_each(sizes), save_distributed=True)
    attempt(lambda: dcp.save(tensors, storage_writer=writer, process_group=group) and None)
    checksums = attempt(lambda: checksums_of(writing, f"shard-{dist.get_rank() + 1:05d}-"))
    attempt(lambda: _finish(writing, final, trainer, checksums) if first else None)
    attempt(lambda: prune(folder, step, keep, every, best) if first else None)
    return final


def load(path: Path, tensors: dict[str, Any]) -> dict[str, Any]:
    """Fill `tensors` in place from a checkpoint, together with all ranks, and return the trainer's JSON part.

    Raises CheckpointFailed where the checkpoint does not fit the model.
    """
    _together(lambda: _read_into(tensors, path), f"{path} could not be loaded")
    return json.loads((path / TRAINER).read_text())


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a checkpoint."""
    return {name: entry.shape for name, entry in checkpoint_contents.entries(path).items()}


def read(path: Path) -> "dict[str, Tensor]":
    """Every tensor of a checkpoint, whole, by name, as this process alone reads the files; NaN where they hold nothing."""
    with checkpoint_contents.Reader() as reader:
        found = checkpoint_contents.entries(path).items()
        return {name: checkpoint_contents.tensor(entry, reader) for name, entry in found}


def newest_good(folder: Path, before: int | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, of those before a step if one is given, and one line for each newer one that is
    not. Imports no torch."""
    damaged = []
    older = [p for p in checkpoints(folder) if before is None or int(p.name.removeprefix("step_")) < before]
    for path in sorted(older, reverse=True):
        reason = damage(path)
        if reason is None:
            return path, damaged
        damaged.append(f"{path.name}: {reason}")
    return None, damaged


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, below the folder of a run's checkpoints."""
    return folder / f"step_{step:08d}"


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return sorted(p for p in folder.glob("step_*") if NAME.match(p.name) and p.is_dir()) if folder.is_dir() else []


def step_of(path: Path) -> int:
    """The step at which a whole checkpoint was taken, whatever its folder is called. Raises OSError or ValueError."""
    step = _described(path / TRAINER).get("step")
    if type(step) is not int:
        raise ValueError(f"{TRAINER} says no step")
    return step


def held_out_loss(path: Path) -> float | None:
    """The loss at which a checkpoint was taken; None where it is not known or no number."""
    try:
        loss = _described(path / TRAINER).get("eval_loss")
    except (OSError, ValueError):
        return None
    return loss if isinstance(loss, float) and math.isfinite(loss) else None


def damage(path: Path) -> str | None:
    """Why a checkpoint cannot be used, or None if every file has the size and CRC-32 that the manifest states. One line."""
    try:
        manifest = _described(path / MANIFEST)
        if manifest.get("format") != FORMAT:
            return f"it has format {manifest.get('format')!r}, and this version reads format {FORMAT}"
        files = manifest.get("files")
        if not _names_files(files):
            return "its manifest is no list of files with their sizes and checksums"
        step_of(path)
        return _wrong(path, files)
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except OSError as error:
        return f"{Path(str(error.filename)).name} cannot be read ({error.strerror})"
    except ValueError as error:
        return f"its description is unreadable ({error})"


def _wrong(path: Path, files: dict[str, list[int]]) -> str | None:
    """The first file that is not what the manifest says. Raises OSError."""
    for name in sorted({TRAINER, *(file.name for file in path.glob("*.safetensors"))} - files.keys()):
        return f"{name} is not in its manifest"
    for name, (size, checksum) in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (path / name).stat().st_size != size:
            return f"{name} has {(path / name).stat().st_size} bytes, not {size}"
        if _crc32(path / name) != checksum:
            return f"{name} has another checksum than when it was written"
    return None


def _described(path: Path) -> dict[str, Any]:
    """What a JSON file says. Raises OSError, and ValueError where it is no JSON object."""
    try:
        found = json.loads(path.read_text())
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return found


def _names_files(files: Any) -> TypeGuard[dict[str, list[int]]]:
    """Whether a manifest's list is one: names without folders, so that nothing outside is ever opened, and whole numbers."""
    return isinstance(files, dict) and all(
        FILE_NAME.match(name) and isinstance(check, list) and [type(number) for number in check] == [int, int]
        for name, check in files.items()
    )


def clean(folder: Path) -> None:
    """Remove what an interrupted save or removal left behind."""
    for left in (*folder.glob("step_*.writing"), *folder.glob("step_*.deleting")):
        shutil.rmtree(left, ignore_errors=True)


def prune(folder: Path, step: int, keep: int, every: int = 0, best: int = 0) -> None:
    """Remove all but the newest `keep` checkpoints, those of steps that are multiples of `every`, and the `best` ones by
    held-out loss; renamed first, so that none is ever half removed.

    Those after `step`, which has just been saved, are damaged, or the run would have gone on from them: they are left, and
    must not push out those that are good.
    """
    there = [p for p in checkpoints(folder) if p.name <= path_of(folder, step).name]
    kept = {*there[-keep:], *(p for p in there if every and int(p.name.removeprefix("step_")) % every == 0)}
    if best:
        losses = {path: loss for path in there if (loss := held_out_loss(path)) is not None}
        kept |= set(sorted(losses, key=lambda path: losses[path])[:best])
    for old in there:
        if old in kept:
            continue
        doomed = old.with_name(old.name + ".deleting")
        old.rename(doomed)
        shutil.rmtree(doomed)


def _together(action: Callable[[], Any], failed: str, group: Any = None) -> list[Any]:
    """What the action gave on every rank; all ranks raise CheckpointFailed together if it failed on one."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    from disttrain.parallel.collectives import gather_objects

    try:
        outcome = action()
    except (Exception, dcp.api.CheckpointException) as error:  # CheckpointException is no Exception
        outcome = CheckpointFailed(f"{failed}: {_root_cause(error)}")
    outcomes = gather_objects(outcome, group) if dist.is_initialized() else [outcome]
    if failures := [o for o in outcomes if isinstance(o, CheckpointFailed)]:
        raise failures[0]
    return outcomes


def _read_into(tensors: dict[str, Any], path: Path) -> None:
    """Each rank by itself: its plan needs nobody else's, and the files that it opens tell all."""
    import torch
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)


def _sizes(tensors: dict[str, Any], prefix: str = "") -> dict[str, int]:
    """Bytes of this rank's part of each tensor, by the name that DCP gives it."""
    from disttrain.parallel.sharding import local

    found: dict[str, int] = {}
    for name, value in tensors.items():
        found |= _sizes(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: local(value).nbytes}
    return found


def _file_of_each(sizes: list[dict[str, int]]) -> dict[str, int]:
    """In which of its files, from 1, a rank writes a tensor: the same on all ranks, each file about FILE_BYTES."""
    largest: dict[str, int] = {}
    for of_rank in sizes:
        for name, size in of_rank.items():
            largest[name] = max(largest.get(name, 0), size)
    before, files = 0, {}
    for name, size in largest.items():
        files[name] = 1 + before // checkpoint_contents.FILE_BYTES
        before += size
    return files


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def describe(writing: Path, trainer: dict[str, Any], checksums: list[dict[str, list[int]]]) -> None:
    """Write what is beside the tensors: the trainer's part, and the sizes and checksums of all files."""
    files = {name: check for rank in checksums for name, check in rank.items()}
    _write(writing / TRAINER, json.dumps(trainer, indent=1))
    files |= checksums_of(writing, TRAINER)
    _write(writing / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1))
    _sync_folder(writing)


def _finish(writing: Path, final: Path, trainer: dict[str, Any], checksums: list[dict[str, list[int]]]) -> None:
    describe(writing, trainer, checksums)
    if final.exists():  # the same step again, after a resume from an older checkpoint
        shutil.rmtree(final)
    writing.rename(final)
    _sync_folder(final.parent)


def checksums_of(folder: Path, prefix: str) -> dict[str, list[int]]:
    """Size and CRC-32 of the files whose names begin so."""
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
