"""Work items: what one worker turns into one shard. Listing text files, cutting them, reading them back."""

import glob
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from disttrain.config.problems import Problem, RefusedInput
from disttrain.data.cutting import Piece, cut_point, pieces_of, section_bytes
from disttrain.data.files import fingerprint

Document: TypeAlias = Literal["file", "line", "blank_line", "jsonl"]

ITEM_BYTES = 4 << 20
"""Text of one work item, about; a document that cannot be cut (a json line) may be longer."""

FOLDER_SUFFIXES = {"jsonl": (".jsonl",), "text": (".txt", ".text", ".md", ".rst")}
"""What is taken from a folder, with its subfolders, when data.document is jsonl and otherwise."""

_BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")
_WINDOW = 64 << 10


@dataclass(frozen=True)
class FileRange:
    """Bytes start..stop of a file; end is where reading the file ends (its size, or less under data.max_bytes)."""

    path: str
    start: int
    stop: int
    end: int


@dataclass(frozen=True)
class Item:
    """About ITEM_BYTES of text: ranges of files, or documents already in memory (python-docs, hf)."""

    number: int
    text_bytes: int
    held_out_fraction: float
    """1.0: everything is held out."""
    input: str
    """Stands for the content: a shard made from another input is made again."""
    ranges: tuple[FileRange, ...] = ()
    document: Document = "file"
    text_field: str = "text"
    documents: tuple[bytes, ...] = ()


def expand(path: str | list[str] | None, document: Document, setting: str) -> tuple[list[Path], list[Problem]]:
    """The text files that a setting names, and what is wrong with it.

    A list keeps its order; a folder or a glob gives its files sorted by path; a file named twice counts once. Hidden
    files in folders are skipped.
    """
    found: dict[Path, None] = {}
    problems = []
    for word in [path] if isinstance(path, str) else path or []:
        place = Path(word).expanduser()
        if place.is_dir():
            files = _folder(place, FOLDER_SUFFIXES["jsonl" if document == "jsonl" else "text"])
            if not files:
                wanted = ", ".join("*" + s for s in FOLDER_SUFFIXES["jsonl" if document == "jsonl" else "text"])
                problems.append(Problem((f"{setting}={word}",), f"the folder holds no {wanted}",
                                        f"give a glob for other names, for example '{place}/**/*.py'"))  # fmt: skip
        elif glob.has_magic(word) and not place.exists():
            files = sorted(p for p in map(Path, glob.glob(str(place), recursive=True)) if p.is_file())
            if not files:
                problems.append(Problem((f"{setting}={word}",), "no file matches", "check the pattern"))
        else:
            files = [place]
            problems += _unusable(place, f"{setting}={word}")
        found.update(dict.fromkeys(files))
    files = list(found)
    if files and not problems:
        bad = [p for file in files if (p := _unreadable(file, setting))]
        problems += bad[:5] if bad else []
        if not bad and all(file.stat().st_size == 0 for file in files):
            problems.append(Problem((setting,), "all files are empty", "give files with text"))
    return files, problems


def _folder(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    files = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(place, name) for name in names if name.endswith(suffixes) and not name.startswith(".")]
    return sorted(files)


def _unusable(path: Path, setting: str) -> list[Problem]:
    if not path.exists():
        near = sorted(p.name for p in path.parent.iterdir())[:5] if path.parent.is_dir() else []
        hint = f"the folder holds {', '.join(near)}" if near else "its folder does not exist either"
        return [Problem((setting,), "the file does not exist", f"check the path: {hint}")]
    if path.stat().st_size == 0:
        return [Problem((setting,), "the file is empty", "give a file with text")]
    return []


def _unreadable(path: Path, setting: str) -> Problem | None:
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError as error:
        return Problem((f"{setting}: {path}",), f"the file cannot be read: {error.strerror}", "check its rights")
    try:
        head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:
            return _not_utf8(str(path), error.start)
    return None


def _not_utf8(path: str, at: int) -> Problem:
    return Problem((path,), f"the file is not UTF-8 text (byte {at:,})", "convert it, for example with iconv -t utf-8")


def text_items(files: list[Path], document: Document, text_field: str, max_bytes: int | None, fraction: float,
               first_number: int = 0) -> list[Item]:  # fmt: skip
    """Cut and group files into items of 2 to 4 MiB (the last may be shorter); empty files are left out.

    Files are cut between documents, or, where the file is the document, at a line end. Reads only a few kilobytes
    around each cut.
    """
    groups: list[list[FileRange]] = [[]]
    filled, left = 0, max_bytes
    for path in files:
        size = path.stat().st_size
        end = size if left is None or size <= left else _boundary(path, left, size, document)
        start = 0
        while start < end:
            room = ITEM_BYTES - filled
            if end - start > room and filled >= ITEM_BYTES // 2:
                groups.append([])
                filled = 0
                continue
            stop = end if end - start <= room else min(end, _boundary(path, start + room, size, document))
            groups[-1].append(FileRange(str(path), start, stop, end))
            filled += stop - start
            start = stop
            if filled >= ITEM_BYTES:
                groups.append([])
                filled = 0
        if left is not None:
            left -= end
            if left <= 0:
                break
    return [_text_item(number, tuple(group), document, text_field, fraction)
            for number, group in enumerate((g for g in groups if g), first_number)]  # fmt: skip


def _text_item(number: int, ranges: tuple[FileRange, ...], document: Document, field: str, fraction: float) -> Item:
    stats = [(r.path, r.start, r.stop, r.end, os.stat(r.path).st_mtime_ns) for r in ranges]
    total = sum(r.stop - r.start for r in ranges)
    return Item(number, total, fraction, fingerprint([stats, document, field, fraction]), ranges, document, field)


def _boundary(path: Path, target: int, size: int, document: Document) -> int:
    """A place to cut near byte `target` of a longer file: before it in a document, after it between documents."""
    with open(path, "rb") as file:
        if document == "file":
            start = max(0, target - _WINDOW)
            file.seek(start)
            return start + cut_point(file.read(target - start + 4), target - start)
        separator = _BLANK_LINES if document == "blank_line" else re.compile(rb"\n")
        at, tail = target - 1, b""
        file.seek(at)
        while block := file.read(_WINDOW):
            text = tail + block
            match = separator.search(text)
            # a separator of blank lines that touches the block's end may go on in the next block
            if match and (match.end() < len(text) or at + len(text) >= size):
                return at + match.end()
            tail, at = (text, at) if match else (text[-_WINDOW:], at + len(text) - len(text[-_WINDOW:]))
    return size


def pieces(item: Item) -> list[Piece]:
    """The item's text in order, cut to sections. Raises RefusedInput for text that is not what the settings say."""
    longest = section_bytes(item.text_bytes, item.held_out_fraction)
    if item.documents:
        return [piece for document in item.documents for piece in pieces_of(document, longest)]
    found: list[Piece] = []
    for part in item.ranges:
        with open(part.path, "rb") as file:
            file.seek(part.start)
            data = file.read(part.stop - part.start)
        if len(data) < part.stop - part.start:
            raise RefusedInput([Problem((part.path,), "the file became shorter while it was read", "start again")])
        try:
            data.decode()
        except UnicodeDecodeError as error:
            raise RefusedInput([_not_utf8(part.path, part.start + error.start)]) from error
        if part.start == 0:
            data = data.removeprefix(b"\xef\xbb\xbf")
        if item.document == "file":
            found += pieces_of(data, longest, part.start == 0, part.stop == part.end)
        else:
            for document in _documents(data, item, part):
                found += pieces_of(document, longest)
    return found


def _documents(data: bytes, item: Item, part: FileRange) -> Iterator[bytes]:
    if item.document == "line":
        lines = (line.removesuffix(b"\r") for line in data.split(b"\n"))
        yield from (line for line in lines if line.strip())
    elif item.document == "blank_line":
        yield from (block.strip(b"\r\n") for block in _BLANK_LINES.split(data) if block.strip())
    else:
        at = part.start
        for line in data.split(b"\n"):
            if line.strip():
                yield _json_text(line, item.text_field, f"{part.path} at byte {at:,}")
            at += len(line) + 1


def _json_text(line: bytes, text_field: str, where: str) -> bytes:
    try:
        record = json.loads(line)
    except ValueError as error:
        problem = Problem((where, "data.document=jsonl"), f"the line is not JSON: {error}", "correct the line")
        raise RefusedInput([problem]) from error
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(sorted(record)) if isinstance(record, dict) else "no keys"
        problem = Problem((where, f"data.text_field={text_field}"), "the record holds no text under this key",
                          f"give data.text_field; the record has: {keys}")  # fmt: skip
        raise RefusedInput([problem])
    return text.encode("utf-8", "replace")  # a lone surrogate, which JSON can spell, has no UTF-8


def document_items(documents: Iterable[str], max_bytes: int | None, fraction: float,
                   first_number: int = 0) -> Iterator[Item]:  # fmt: skip
    """Group documents that come one by one into items, in memory; under max_bytes the last document is cut."""
    number, group, filled = first_number, [], 0
    left = sys.maxsize if max_bytes is None else max_bytes
    for text in documents:
        data = text.encode("utf-8", "replace")
        last = len(data) >= left
        if len(data) > left:
            data = data[: cut_point(data, left)]
        if data:
            group.append(data)
            filled += len(data)
            left -= len(data)
        if filled >= ITEM_BYTES:
            yield _document_item(number, group, fraction)
            number, group, filled = number + 1, [], 0
        if last:
            break
    if group:
        yield _document_item(number, group, fraction)


def _document_item(number: int, group: list[bytes], fraction: float) -> Item:
    content = fingerprint([[d.decode() for d in group], fraction])
    return Item(number, sum(map(len, group)), fraction, content, documents=tuple(group))
