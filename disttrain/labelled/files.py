"""Files of labelled examples: their lines, and what is wrong with them."""

from collections.abc import Sequence
from pathlib import Path

from disttrain.config.problems import Problem, RefusedInput

_LISTED = 20


def lines_of(path: Path, latin: bool = False) -> list[str]:
    """Lines of a text file in UTF-8, without their ends and without a byte-order mark.

    Only a newline ends a line: other separators of Unicode stay inside texts. latin reads a file that is not UTF-8 as
    Latin-1. Raises RefusedInput when the file cannot be read or decoded.
    """
    content = content_of(path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if not latin:
            line = content.count(b"\n", 0, error.start) + 1
            raise RefusedInput([bad_line(path, line, "this is not UTF-8", "convert the file to UTF-8")]) from error
        text = content.decode("latin-1")
    lines = text.split("\n")
    return [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]


def content_of(path: Path) -> bytes:
    """Bytes of a file. Raises RefusedInput when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        problem = Problem((str(path),), f"the file cannot be read: {error.strerror}", "check the path and its rights")
        raise RefusedInput([problem]) from error


def bad_line(path: Path, line: int, message: str, fix: str) -> Problem:
    """The problem of one line of a file; the first line is 1."""
    return Problem((f"{path}:{line}",), message, fix)


def refuse(problems: Sequence[Problem], path: Path) -> None:
    """Raise RefusedInput when there are problems: the first twenty of a file, and how many more there are."""
    if not problems:
        return
    shown = list(problems[:_LISTED])
    if len(problems) > _LISTED:
        shown.append(Problem((str(path),), f"{len(problems) - _LISTED:,} more lines are wrong",
                             "check that this is the file of this data set"))  # fmt: skip
    raise RefusedInput(shown)
