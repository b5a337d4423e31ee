"""Reads back what Weights & Biases wrote offline: its own transaction log, without a server."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Written:
    """What one process logged."""

    run: Any = None
    """W&B's record of the run: id, name, project, group, tags."""
    rows: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    """(step, values) of every logged row."""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[tuple[str, str, dict[str, Path]]] = field(default_factory=list)
    """(name, type, copies of its files by their names)."""
    alerts: list[tuple[str, str]] = field(default_factory=list)
    """(title, text)."""
    exit_code: int | None = None


def written(run_dir: Path) -> list[Written]:
    """What every process of a run logged, oldest first."""
    return [_written(path) for path in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))]


def _written(path: Path) -> Written:
    found = Written()
    for record in _records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            found.config.update({item.key: json.loads(item.value_json) for item in record.run.config.update})
        elif kind == "config":
            found.config.update({item.key: json.loads(item.value_json) for item in record.config.update})
        elif kind == "summary":
            items = {"".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.summary.update}
            found.summary.update(items)
        elif kind == "history":
            items = {"".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            values = {key: value for key, value in items.items() if not key.startswith("_")}
            found.rows.append((record.history.step.num, values))
        elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            artifact = record.request.log_artifact.artifact
            files = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
            found.artifacts.append((artifact.name, artifact.type, files))
        elif kind == "artifact":
            files = {entry.path: Path(entry.local_path) for entry in record.artifact.manifest.contents}
            found.artifacts.append((record.artifact.name, record.artifact.type, files))
        elif kind == "alert":
            found.alerts.append((record.alert.title, record.alert.text))
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def _records(path: Path) -> Iterator[Any]:
    """LevelDB's log format (blocks of 32 KiB; crc, length, type) of protobuf messages."""
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2  # protobuf makes its classes when the module is loaded
    content, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = messages.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""
