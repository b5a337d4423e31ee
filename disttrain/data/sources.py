"""The sources of a config: their work items, what identifies them, and how large they are."""

import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disttrain.config.problems import RefusedInput
from disttrain.config.schema import BlendSource, DataConfig
from disttrain.data import hub, python_docs
from disttrain.data.cutting import held_out_pieces
from disttrain.data.items import Item, document_items, expand, pieces, text_items

SAMPLE_BYTES = 32 << 20
"""Text that a vocabulary is trained on, at most."""

_SAMPLED_ITEMS = 64


@dataclass(frozen=True)
class Source:
    """One source of text, with the settings that say how to read it. corpus: python-docs, text or hf."""

    corpus: str
    path: str | list[str] | None
    setting: str
    """Which setting names it, for messages."""
    data: DataConfig

    def items(self, fraction: float, first_number: int = 0) -> Iterator[Item]:
        """Its work items. Raises RefusedInput when files are missing or cannot be read."""
        data = self.data
        if self.corpus == "text":
            files = self.files()
            limit = data.max_bytes if self.setting != "data.held_out_path" else None
            return iter(text_items(files, data.document, data.text_field, limit, fraction, first_number))
        if self.corpus == "hf":
            texts = hub.documents(str(self.path), data.hf_config, data.hf_split, data.text_field)
        else:
            texts = python_docs.documents()
        return document_items(texts, data.max_bytes, fraction, first_number)

    def files(self) -> list[Path]:
        """The files of a text source."""
        files, problems = expand(self.path, self.data.document, self.setting)
        if problems:
            raise RefusedInput(problems)
        return files

    def identity(self) -> list[Any]:
        """A JSON value that changes when the text may have changed: settings, files with sizes and times."""
        data = self.data
        limit = data.max_bytes if self.setting != "data.held_out_path" else None
        if self.corpus == "text":
            return ["text", data.document, data.text_field, limit, [_stat(f) for f in self.files()]]
        if self.corpus == "hf":
            folder = Path(str(self.path)).expanduser()
            local = sorted(_stat(f) for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else []
            return ["hf", str(self.path), data.hf_config, data.hf_split, data.text_field, limit, local]
        return ["python-docs", sys.version, limit, [_stat(f) for f in python_docs.source_files()]]

    def text_bytes(self) -> int | None:
        """Bytes of text, about (files as they are on disk); None when only reading tells."""
        limit = self.data.max_bytes if self.setting != "data.held_out_path" else None
        if self.corpus == "hf":
            return limit
        if self.corpus == "text":
            total = sum(f.stat().st_size for f in self.files())
        else:
            total = sum(map(len, python_docs.topics())) + sum(f.stat().st_size for f in python_docs.source_files())
        return total if limit is None else min(total, limit)


def _stat(file: Path) -> tuple[str, int, int]:
    stat = os.stat(file)
    return str(file.absolute()), stat.st_size, stat.st_mtime_ns


def configured_sources(data: DataConfig) -> list[BlendSource]:
    """The training sources, tokens included; a config without blend has one, of weight 1."""
    if data.blend is not None:
        return data.blend
    return [BlendSource(corpus=data.corpus or "python-docs", path=data.path, weight=1.0)]


def text_source(data: DataConfig, number: int) -> Source:
    """Training source `number`, which must not be tokens."""
    source = configured_sources(data)[number]
    setting = "data.path" if data.blend is None else f"data.blend[{number}].path"
    return Source(source.corpus, source.path, setting, data)


def held_out_source(data: DataConfig) -> Source | None:
    """The source of data.held_out_path, which is text and read whole."""
    return Source("text", data.held_out_path, "data.held_out_path", data) if data.held_out_path is not None else None


def training_sample(source: Source, fraction: float, budget: int) -> list[str]:
    """About `budget` bytes of the source's training text, spread over it, in order; nothing that is held out.

    Files are sampled over their whole length, streams (python-docs, hf) over their first 256 MiB.
    """
    items = source.items(fraction)
    if source.corpus == "text":
        listed = list(items)
        chosen = listed[:: -(-len(listed) // _SAMPLED_ITEMS)] if listed else []
    else:
        chosen = list(itertools.islice(items, _SAMPLED_ITEMS))
    total = sum(item.text_bytes for item in chosen)
    stride = max(1, -(-total // budget))
    texts = []
    for item in chosen:
        found = pieces(item)
        held_out = held_out_pieces(found, item.number, item.text_bytes, fraction)
        training = [piece for piece, held in zip(found, held_out, strict=True) if not held]
        texts += [piece.data.decode() for piece in training[::stride]]
    return texts
