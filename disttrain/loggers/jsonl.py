"""metrics.jsonl, the truth of a run: one JSON object a line, written as it happens, cut back on resume."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disttrain.config.problems import Problem, RefusedInput

FILE = "metrics.jsonl"
_CUT_BACK = ("step", "eval")
"""Kinds of record that belong to a step and are made again when that step is done again."""


class TruthFailed(RuntimeError):
    """metrics.jsonl could not be written; the run has to stop, since it would go on unrecorded."""


class JsonlSink:
    """Appends records to metrics.jsonl. A line reaches the operating system before `write` returns, so a killed
    process loses nothing that was written; a power failure may lose the last lines."""

    def __init__(self, path: Path):
        self._path = path
        with self._stops_the_run():
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record. Raises TruthFailed when the file system refuses, TypeError for what is not JSON."""
        line = encode(record)
        with self._stops_the_run():
            while line:
                line = line[os.write(self._file, line) :]

    def close(self) -> None:
        """Close the file, durably."""
        with self._stops_the_run():
            try:
                os.fsync(self._file)
            finally:
                os.close(self._file)

    def _stops_the_run(self) -> "_StopsTheRun":
        return _StopsTheRun(self._path)


class _StopsTheRun:
    """Turns an OSError into TruthFailed."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            raise TruthFailed(f"cannot write {self._path}: {error.strerror or error}; the run stops here") from error


def encode(record: dict[str, Any]) -> bytes:
    """One line. JSON has no NaN or infinity: they become null, and `non_finite` says at which keys and which."""
    found: dict[str, str] = {}
    plain = _finite(record, "", found)
    if found:
        plain["non_finite"] = found
    return (json.dumps(plain, allow_nan=False, ensure_ascii=False) + "\n").encode()


def decode(line: bytes) -> dict[str, Any]:
    """The record of a line, with NaN and infinity back in their top-level keys. Raises ValueError if it is none."""
    record = json.loads(line)
    if not isinstance(record, dict) or "kind" not in record:
        raise ValueError("not a record: a JSON object with a kind is expected")
    for key, text in record.pop("non_finite", {}).items():
        if key in record:
            record[key] = float(text)
    return record


def _finite(value: Any, path: str, found: dict[str, str]) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        found[path] = str(float(value))
        return None
    if isinstance(value, dict):
        return {key: _finite(item, f"{path}.{key}" if path else str(key), found) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item, f"{path}.{i}", found) for i, item in enumerate(value)]
    return value


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(line, record) of a file whose last line may be half-written, which ends the iteration."""
    with path.open("rb") as file:
        broken: tuple[int, Exception] | None = None
        for number, line in enumerate(file, start=1):
            if broken is not None:
                where, error = broken
                message = f"line {where} is not a record: {error}"
                fix = "repair that line, or move the file away; only a half-written last line is repaired by itself"
                raise RefusedInput([Problem((str(path),), message, fix)])
            try:
                record = decode(line)
            except ValueError as error:
                broken = (number, error)
                continue
            yield line if line.endswith(b"\n") else line + b"\n", record


def read_records(path: Path) -> list[dict[str, Any]]:
    """Every record of a metrics.jsonl; a half-written last line is left out.

    Raises RefusedInput when another line is broken or the file is not there.
    """
    if not path.is_file():
        fix = "give the folder of a run that was started"
        raise RefusedInput([Problem((str(path),), "there is no such file", fix)])
    return [record for _, record in _lines(path)]


@dataclass(frozen=True)
class Rewound:
    """What a resume found in metrics.jsonl."""

    dropped: int
    """Step and eval records that were dropped."""
    reached_step: int
    """Largest step that any earlier process recorded, dropped records included."""


def rewind(path: Path, step: int) -> Rewound:
    """Cut metrics.jsonl back to a checkpoint: drop a half-written last line and step and eval records after `step`.

    Everything else stays. The file is replaced at once, so a crash leaves the old or the new one. Raises
    RefusedInput when a line is broken, TruthFailed when the file system refuses.
    """
    if not path.exists():
        return Rewound(0, 0)
    dropped = reached = 0
    temporary = path.with_name(path.name + ".new")
    with _StopsTheRun(temporary):
        with temporary.open("wb") as file:
            for line, record in _lines(path):
                made_again = record["kind"] in _CUT_BACK
                # An earlier rewind may have dropped steps that went further than any record still here.
                earlier = record.get("details", {}).get("reached_step", 0)
                reached = max(reached, record["step"] if made_again else earlier)
                if made_again and record["step"] > step:
                    dropped += 1
                else:
                    file.write(line)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return Rewound(dropped, reached)
