"""Chunks of a sequence of tags, and the same chunks in another scheme.

Schemes: IOB1 (B only between two adjacent chunks of one type), IOB2 (B at every start) and BIOES (S: a chunk of one
word, E: its last word); Ratinov and Roth 2009, section 3.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Chunk:
    """Words [start, stop) of a sentence, of one type."""

    start: int
    stop: int
    type: str


def split_tag(tag: str) -> tuple[str, str]:
    """Prefix and type: ``B-PER`` gives B and PER, ``O`` gives O and nothing. Raises ValueError for no such tag."""
    if tag == "O":
        return "O", ""
    prefix, hyphen, kind = tag.partition("-")
    if prefix not in ("B", "I", "E", "S") or not hyphen or not kind:
        raise ValueError(f"'{tag}' is no tag: it is neither O nor one of B-, I-, E- or S- and a type")
    return prefix, kind


def chunks(tags: Sequence[str]) -> list[Chunk]:
    """The chunks of a sentence in any of the schemes.

    A chunk starts at B and S, at any tag but O after O, E or S, and where the type changes: so a stray I starts one. It
    ends before such a tag and before O. For B, I and O these are the rules of conlleval (Tjong Kim Sang and Buchholz
    2000), for E and S those of seqeval (Nakayama 2018). Raises ValueError for what is no tag.
    """
    found: list[Chunk] = []
    start, before, kind_before = 0, "O", ""
    for place, tag in enumerate([*tags, "O"]):
        prefix, kind = split_tag(tag)
        starts = prefix in ("B", "S") or (prefix != "O" and (before in ("O", "E", "S") or kind != kind_before))
        if before != "O" and (starts or prefix == "O"):
            found.append(Chunk(start, place, kind_before))
        if starts:
            start = place
        before, kind_before = prefix, kind
    return found


def to_iob1(tags: Sequence[str]) -> list[str]:
    """The same chunks in IOB1."""
    written = ["O"] * len(tags)
    last: Chunk | None = None
    for chunk in chunks(tags):
        adjacent = last is not None and last.stop == chunk.start and last.type == chunk.type
        _write(written, chunk, "B" if adjacent else "I", "I", "I")
        last = chunk
    return written


def to_iob2(tags: Sequence[str]) -> list[str]:
    """The same chunks in IOB2."""
    written = ["O"] * len(tags)
    for chunk in chunks(tags):
        _write(written, chunk, "B", "I", "I")
    return written


def to_bioes(tags: Sequence[str]) -> list[str]:
    """The same chunks in BIOES."""
    written = ["O"] * len(tags)
    for chunk in chunks(tags):
        _write(written, chunk, "S" if chunk.stop - chunk.start == 1 else "B", "I", "E")
    return written


def _write(written: list[str], chunk: Chunk, first: str, inner: str, last: str) -> None:
    written[chunk.start : chunk.stop] = [f"{inner}-{chunk.type}"] * (chunk.stop - chunk.start)
    written[chunk.stop - 1] = f"{last}-{chunk.type}"
    written[chunk.start] = f"{first}-{chunk.type}"
