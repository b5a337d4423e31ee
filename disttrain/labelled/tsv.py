"""Tab-separated files of GLUE (Wang et al. 2019): no quoting, columns by the names of the header."""

from collections.abc import Sequence
from pathlib import Path

from disttrain.config.problems import Problem, RefusedInput
from disttrain.labelled.examples import Labelled, Sentences
from disttrain.labelled.files import bad_line, lines_of, refuse
from disttrain.sets import Columns, LabelledSet

SHORT_ROWS = "rows with too few columns"
"""Key of `Labelled.left_out`."""


def read_tsv(chosen: LabelledSet, path: Path, split: str) -> Labelled:
    """The examples of one file; a test file need have no column of labels.

    Raises RefusedInput, with file and line, for a header without the set's columns, a row with another number of
    columns than the header, and a label that the set does not have.
    """
    columns = chosen.columns
    assert columns is not None
    lines = lines_of(path)
    header, first = _header(columns, lines, path, split)
    places = [header.index(name) for name in columns.texts]
    label_place = header.index(columns.label) if columns.label in header else None
    examples: list[Sentences] = []
    problems: list[Problem] = []
    short = 0
    for number, line in enumerate(lines[first:], first + 1):
        row = line.split("\t")
        if len(row) < len(header) and columns.drops_short_rows:
            short += 1
            continue
        if len(row) != len(header):
            problems.append(bad_line(path, number, f"the row has {len(row)} columns, the header has {len(header)}",
                                     "correct the row, or copy the file again"))  # fmt: skip
            continue
        try:
            label = None if label_place is None else label_of(chosen, row[label_place].strip())
        except ValueError as error:
            problems.append(bad_line(path, number, str(error), f"correct the column {columns.label}"))
            continue
        texts = [row[place].strip() for place in places]
        examples.append(Sentences(texts[0], texts[1] if len(texts) > 1 else None, label))
    refuse(problems, path)
    return Labelled(chosen.name, split, tuple(examples), {SHORT_ROWS: short} if short else {})


def label_of(chosen: LabelledSet, text: str) -> str | float:
    """The label that a file spells: one of the set's classes, or a score. Raises ValueError for any other."""
    if chosen.kind == "classify":
        if text not in chosen.labels:
            raise ValueError(f"'{text}' is no label of {chosen.name}, which has {', '.join(chosen.labels)}")
        return text
    low, high = chosen.bounds or (float("-inf"), float("inf"))
    try:
        score = float(text)
    except ValueError:
        raise ValueError(f"'{text}' is no number") from None
    if not low <= score <= high:
        raise ValueError(f"the score {text} is not between {low:g} and {high:g}")
    return score


def _header(columns: Columns, lines: Sequence[str], path: Path, split: str) -> tuple[tuple[str, ...], int]:
    """Names of the columns, and how many lines come before the first row."""
    named = columns.without_header.get(split)
    if named is not None:
        return named, 0
    header = tuple(name.strip() for name in lines[0].split("\t")) if lines else ()
    wanted = columns.texts if split.startswith("test") else (*columns.texts, columns.label)
    missing = [name for name in wanted if name not in header]
    if missing:
        raise RefusedInput([bad_line(path, 1, f"the header lacks {', '.join(missing)}: it has {', '.join(header)}",
                                     "give the official file of this data set")])  # fmt: skip
    return header, 1
