"""Where long texts are cut: into pieces that are encoded at once, and which pieces are held out."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt

SECTION_BYTES = 32 << 10
"""Longest piece of text that is encoded, and held out, at once."""

_SHORTEST_SECTION = 128
_SPACE = frozenset(b" \t\n\r\v\f")


@dataclass(frozen=True)
class Piece:
    """Part of a document."""

    data: bytes
    """UTF-8."""
    starts_document: bool
    ends_document: bool


def cut_point(data: bytes, limit: int) -> int:
    """Where to cut UTF-8 text of more than limit bytes: a position in 1..limit (beyond it only inside a character).

    Looks in the last half of data[:limit] for, in this order: a line end between two visible characters (tokenizers
    that split at white space give the same tokens on both sides as on the whole), any line end, any white space; else
    cuts between two characters.
    """
    low = limit // 2
    at = last_line_end = data.rfind(b"\n", low, limit)
    while at > 0:
        if data[at - 1] not in _SPACE and data[at + 1] not in _SPACE:
            return at + 1
        at = data.rfind(b"\n", low, at)
    if last_line_end >= 0:
        return last_line_end + 1
    for at in range(limit - 1, max(low, 1) - 1, -1):
        if data[at] in _SPACE:
            return at  # the space belongs to the following word
    at = limit
    while at > 0 and _inside_character(data, at):
        at -= 1
    if at == 0:  # limit is shorter than the first character
        at = limit
        while _inside_character(data, at):
            at += 1
    return at


def _inside_character(data: bytes, at: int) -> bool:
    return at < len(data) and data[at] & 0xC0 == 0x80


def pieces_of(data: bytes, longest: int, starts: bool = True, ends: bool = True) -> Iterator[Piece]:
    """A document (or a part of one that does not start or end it) in pieces of at most `longest` bytes."""
    start = 0
    while len(data) - start > longest:
        stop = start + cut_point(data[start : start + longest + 4], longest)
        if stop == len(data):  # the last character alone is longer
            break
        yield Piece(data[start:stop], starts and start == 0, False)
        start = stop
    if start < len(data):
        yield Piece(data[start:], starts and start == 0, ends)


def section_bytes(item_bytes: int, held_out_fraction: float) -> int:
    """Length of the pieces of a work item: shorter where the item is so small that nothing would be held out."""
    if held_out_fraction in (0.0, 1.0):
        return SECTION_BYTES
    return min(SECTION_BYTES, max(_SHORTEST_SECTION, int(held_out_fraction * item_bytes / 4)))


def held_out_pieces(pieces: list[Piece], item_number: int, item_bytes: int, fraction: float) -> list[bool]:
    """Which pieces of a work item are held out, by error diffusion: a piece is, when the share so far lags behind.

    No shuffle and no chance: a decision depends on the item's number and on the lengths of the pieces before. The
    first debt differs between items (golden ratio), so that rounding to whole pieces evens out over them. Pieces at
    an item's edge inside a document are never held out: no held-out run is then left open across two items.
    """
    if fraction in (0.0, 1.0):
        return [fraction == 1.0] * len(pieces)
    debt = -((0.5 + item_number * (sqrt(5) - 1) / 2) % 1.0) * section_bytes(item_bytes, fraction)
    held_out = []
    for number, piece in enumerate(pieces):
        debt += fraction * len(piece.data)
        at_edge = (number == 0 and not piece.starts_document) or (number == len(pieces) - 1 and not piece.ends_document)
        held_out.append(debt > 0 and not at_edge)
        if held_out[-1]:
            debt -= len(piece.data)
    return held_out
