"""Token shards on disk: one file of arrays per work item, a sidecar beside it, and an index written last.

A folder holds `shard_00000.bin` and `shard_00000.json` per work item, `tokenizer.json` and `index.json`. A shard file
is six arrays, each starting at a multiple of 8 bytes: tokens (uint16, or uint32 for vocabularies above 65,536),
documents and sentences (uint32: where each starts, in tokens from the array's beginning) of the training split, then
the same three of the held-out split. Sentences are empty unless the unit is "sentence" (BERT).
"""

import json
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from disttrain.config.problems import Problem, RefusedInput
from disttrain.data.files import sha256_file

FORMAT = "disttrain-tokens"
VERSION = 1
INDEX = "index.json"
TOKENIZER = "tokenizer.json"

Split: TypeAlias = Literal["train", "held_out"]
Unit: TypeAlias = Literal["document", "sentence"]
SPLITS: tuple[Split, ...] = ("train", "held_out")
ARRAYS = ("tokens", "documents", "sentences")

_OPEN_SHARDS = 256


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard_{number:05d}.bin"


def token_dtype(vocab_size: int) -> str:
    """Name of the smallest type that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def pack(arrays: dict[Split, dict[str, np.ndarray]], dtype: str) -> bytes:
    """A shard file's content."""
    parts = []
    for split in SPLITS:
        for name in ARRAYS:
            data = arrays[split][name].astype(dtype if name == "tokens" else np.uint32).tobytes()
            parts += [data, bytes(-len(data) % 8)]
    return b"".join(parts)


def _layout(shard: dict[str, Any], dtype: str) -> dict[tuple[Split, str], tuple[int, int, np.dtype]]:
    """Offset in bytes, number of elements and type of each array."""
    place, at = {}, 0
    for split in SPLITS:
        for name in ARRAYS:
            kind = np.dtype(dtype if name == "tokens" else np.uint32)
            count = shard[split][name]
            place[split, name] = (at, count, kind)
            at += -(-count * kind.itemsize // 8) * 8
    return place


@dataclass(frozen=True)
class Index:
    """What index.json says."""

    folder: Path
    fingerprint: str
    dtype: str
    unit: Unit
    tokenizer: str
    """Name of the tokenizer, as in data.tokenizer."""
    tokenizer_sha256: str
    vocab_size: int
    shards: tuple[dict[str, Any], ...]
    """Sidecars: file, bytes, sha256, text_bytes, and per split the number of tokens, documents, sentences."""

    def tokens(self, split: Split) -> int:
        """Tokens of a split."""
        return sum(shard[split]["tokens"] for shard in self.shards)

    def to_json(self) -> bytes:
        """The file's content."""
        fields = {k: v for k, v in self.__dict__.items() if k != "folder"}
        totals = {s: {a: sum(shard[s][a] for shard in self.shards) for a in ARRAYS} for s in SPLITS}
        return json.dumps({"format": FORMAT, "version": VERSION, **fields, **totals}, indent=1).encode()


def read_index(folder: Path) -> Index:
    """Read index.json. Raises RefusedInput when it is missing, damaged or of another version."""
    path = folder / INDEX

    def refused(message: str, fix: str) -> RefusedInput:
        return RefusedInput([Problem((f"data.path={folder}",), message, fix)])

    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise refused(f"the folder holds no {INDEX}: it is no prepared data, or its preparation never finished",
                      "make it with `disttrain data prepare CONFIG --out FOLDER`") from None  # fmt: skip
    except (OSError, ValueError) as error:
        raise refused(f"{INDEX} cannot be read: {error}", "prepare the data again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise refused(f"{INDEX} is no index of prepared tokens", "prepare the data again")
    if content.get("version") != VERSION:
        raise refused(f"the tokens have format version {content.get('version')}, this disttrain reads {VERSION}",
                      "prepare the data again")  # fmt: skip
    try:
        index = Index(folder, **{k: content[k] for k in Index.__dataclass_fields__ if k != "folder"})
        for shard in index.shards:
            if shard["bytes"] < sum(count * kind.itemsize for _, count, kind in _layout(shard, index.dtype).values()):
                raise ValueError(f"{shard['file']} is too small for its own counts")
    except (KeyError, TypeError, ValueError) as error:
        raise refused(f"{INDEX} is damaged: {error!r}", "prepare the data again") from error
    return index


def shard_problems(index: Index, checksums: bool) -> list[Problem]:
    """Shards that are missing or have another size; with checksums, also those whose content changed (reads all)."""
    problems = []
    for shard in index.shards:
        path = index.folder / shard["file"]
        try:
            size = path.stat().st_size
        except OSError:
            problems.append(_damaged(path, "the token shard is missing"))
            continue
        if size != shard["bytes"]:
            problems.append(_damaged(path, f"the token shard has {size:,} bytes instead of {shard['bytes']:,}"))
        elif checksums and sha256_file(path) != shard["sha256"]:
            problems.append(_damaged(path, "the token shard's content does not match its checksum (sha256)"))
    return problems


def _damaged(path: Path, message: str) -> Problem:
    return Problem((f"data.path={path}",), message, "copy the folder again, or prepare the data again")


@dataclass(frozen=True)
class ShardView:
    """The arrays of one shard and split, memory-mapped."""

    tokens: np.ndarray
    documents: np.ndarray
    sentences: np.ndarray


class TokenSet:
    """One split of a folder: its shards in order, as one long array of tokens that is read from disk when asked."""

    def __init__(self, index: Index, split: Split):
        self.index = index
        self.split: Split = split
        self.shards = [shard for shard in index.shards if shard[split]["tokens"]]
        self.token_starts = self._starts("tokens")
        self.document_starts = self._starts("documents")
        self._open: OrderedDict[int, ShardView] = OrderedDict()

    def _starts(self, name: str) -> np.ndarray:
        return np.cumsum([0, *(shard[self.split][name] for shard in self.shards)], dtype=np.int64)

    @property
    def tokens(self) -> int:
        """Tokens of the split."""
        return int(self.token_starts[-1])

    @property
    def documents(self) -> int:
        """Documents of the split; a document that is cut at a held-out piece or between shards counts once a part."""
        return int(self.document_starts[-1])

    def shard(self, number: int) -> ShardView:
        """A shard's arrays; the last 256 that were used stay mapped."""
        if number not in self._open:
            shard = self.shards[number]
            mapped = np.asarray(np.memmap(self.index.folder / shard["file"], dtype=np.uint8, mode="r"))
            arrays = {}
            for (split, name), (at, count, kind) in _layout(shard, self.index.dtype).items():
                if split == self.split:
                    arrays[name] = mapped[at : at + count * kind.itemsize].view(kind)
            self._open[number] = ShardView(**arrays)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def find(self, token: int) -> tuple[int, int]:
        """Shard number and position in it of a token of the split."""
        number = int(np.searchsorted(self.token_starts, token, side="right")) - 1
        return number, token - int(self.token_starts[number])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop of the split, int64."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start}..{stop} of {self.tokens}")
        parts = []
        while start < stop:
            number, at = self.find(start)
            part = self.shard(number).tokens[at : at + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)
