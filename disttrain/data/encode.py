"""One work item -> one shard. Runs in a worker process."""

import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from disttrain.data.cutting import Piece, held_out_pieces
from disttrain.data.files import write_atomically
from disttrain.data.items import Item, pieces
from disttrain.data.shards import ARRAYS, SPLITS, TOKENIZER, Split, Unit, pack, shard_name
from disttrain.data.tokenizer import Tokenizer, load_tokenizer

_BATCH_BYTES = 64 << 10
# a sentence ends at . ! or ? with closing quotes or brackets before white space, and at every line end
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]\u201d\u2019]*\s+|\n\s*")


def sentences(text: str) -> list[str]:
    """The sentences of a text, without white space around them."""
    found, start = [], 0
    for match in _SENTENCE_END.finditer(text):
        found.append(text[start : match.end()].strip())
        start = match.end()
    found.append(text[start:].strip())
    return [sentence for sentence in found if sentence]


_load = functools.lru_cache(maxsize=1)(load_tokenizer)


def encode_item(item: Item, key: str, folder: Path, unit: Unit, dtype: str) -> dict[str, Any]:
    """Tokenize an item with the folder's tokenizer.json, write its shard and sidecar, and return the sidecar.

    key stands for all that determines the shard and is kept in the sidecar (`complete_sidecar`). The shard is complete
    once its sidecar is there. Raises RefusedInput for text that is not what the settings say.
    """
    tokenizer = _load(folder / TOKENIZER)
    found = pieces(item)
    held_out = held_out_pieces(found, item.number, item.text_bytes, item.held_out_fraction)
    build = _sentence_arrays if unit == "sentence" else _document_arrays
    arrays = build(found, held_out, tokenizer)
    content = pack(arrays, dtype)
    name = shard_name(item.number)
    sidecar = {
        "file": name,
        "key": key,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "text_bytes": item.text_bytes,
        **{split: {name: len(arrays[split][name]) for name in ARRAYS} for split in SPLITS},
    }
    write_atomically(folder / name, content)
    write_atomically((folder / name).with_suffix(".json"), json.dumps(sidecar).encode())
    return sidecar


def complete_sidecar(number: int, key: str, folder: Path) -> dict[str, Any] | None:
    """The sidecar of a shard that was already made under this key, or None."""
    path = folder / shard_name(number)
    try:
        sidecar = json.loads(path.with_suffix(".json").read_bytes())
        return sidecar if sidecar["key"] == key and path.stat().st_size == sidecar["bytes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class _Arrays:
    """The growing arrays of one split."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []
        self.tokens = 0
        self.documents: list[int] = []
        self.sentences: list[int] = []
        self.open = False

    def add(self, ids: np.ndarray) -> None:
        if len(ids):
            if not self.open:
                self.documents.append(self.tokens)
                self.open = True
            self.parts.append(ids.astype(np.uint32))
            self.tokens += len(ids)

    def close(self, document_end: int | None) -> None:
        """End the document, if one is open."""
        if self.open and document_end is not None:
            self.add(np.array([document_end]))
        self.open = False

    def finished(self) -> dict[str, np.ndarray]:
        tokens = np.concatenate(self.parts) if self.parts else np.empty(0, np.uint32)
        return {"tokens": tokens, "documents": np.array(self.documents), "sentences": np.array(self.sentences)}


def _batches(found: list[Piece]) -> list[range]:
    """Consecutive pieces of about 64 KiB together: encodings take many times the memory of their text."""
    batches, start, filled = [], 0, 0
    for number, piece in enumerate(found):
        filled += len(piece.data)
        if filled >= _BATCH_BYTES:
            batches.append(range(start, number + 1))
            start, filled = number + 1, 0
    return [*batches, range(start, len(found))]


def _document_arrays(found: list[Piece], held_out: list[bool], tokenizer: Tokenizer) -> dict[Split, Any]:
    """Tokens with document_end after each document. A document also ends where its next piece is in the other split:
    no sequence continues over text that was taken out."""
    arrays: dict[Split, _Arrays] = {split: _Arrays() for split in SPLITS}
    end = tokenizer.document_end
    for batch in _batches(found):
        encoded = tokenizer.encode_batch([found[i].data.decode() for i in batch])
        for i, ids in zip(batch, encoded, strict=True):
            here, other = (SPLITS[1], SPLITS[0]) if held_out[i] else SPLITS
            arrays[other].close(end)
            arrays[here].add(ids)
            if found[i].ends_document:
                arrays[here].close(end)
    return {split: arrays[split].finished() for split in SPLITS}


def _sentence_arrays(found: list[Piece], held_out: list[bool], tokenizer: Tokenizer) -> dict[Split, Any]:
    """Tokens of the sentences, with where each starts; nothing stands between them."""
    arrays: dict[Split, _Arrays] = {split: _Arrays() for split in SPLITS}
    for batch in _batches(found):
        texts = [sentences(found[i].data.decode()) for i in batch]
        encoded = iter(tokenizer.encode_batch([sentence for piece in texts for sentence in piece]))
        for i, piece in zip(batch, texts, strict=True):
            here, other = (SPLITS[1], SPLITS[0]) if held_out[i] else SPLITS
            arrays[other].close(None)
            for ids in (next(encoded) for _ in piece):
                if len(ids):
                    arrays[here].sentences.append(arrays[here].tokens)
                arrays[here].add(ids)
            if found[i].ends_document:
                arrays[here].close(None)
    return {split: arrays[split].finished() for split in SPLITS}
