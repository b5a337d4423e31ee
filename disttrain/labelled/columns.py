"""Files of one word and its tag a line, with an empty line after a sentence: CoNLL-2003 and WNUT-17."""

from pathlib import Path

from disttrain.config.problems import Problem
from disttrain.labelled.examples import Labelled, Tagged
from disttrain.labelled.files import bad_line, lines_of, refuse
from disttrain.labelled.tags import split_tag, to_iob2
from disttrain.sets import LabelledSet

DOCUMENT_START = "-DOCSTART-"
DOCUMENT_STARTS = "document starts"
"""Key of `Labelled.left_out`."""


def read_columns(chosen: LabelledSet, path: Path, split: str) -> Labelled:
    """Sentences with IOB2 tags, whichever of IOB1, IOB2 and BIOES the file has.

    The word is the first column and the tag the last one; a tab separates them, or spaces where a line has none. Of
    several tags with commas between them (in some copies of WNUT-17's test file) the first counts. Lines with
    ``-DOCSTART-`` are no sentences and are left out. Raises RefusedInput, with file and line, for a line of one column
    or an unknown tag.
    """
    types = {split_tag(label)[1] for label in chosen.labels}
    sentences: list[Tagged] = []
    problems: list[Problem] = []
    words: list[str] = []
    tags: list[str] = []
    starts = 0
    for number, line in enumerate([*lines_of(path), ""], 1):
        columns = line.split("\t") if "\t" in line else [column for column in line.split(" ") if column]
        if not any(columns):
            if words:
                sentences.append(Tagged(tuple(words), tuple(to_iob2(tags))))
            words, tags = [], []
        elif columns[0] == DOCUMENT_START:
            starts += 1
        else:
            problem = _problem(columns, types)
            if problem is not None:
                problems.append(bad_line(path, number, problem, "write a word, a tab and a tag of the data set"))
                continue
            words.append(columns[0])
            tags.append(_tag(columns))
    refuse(problems, path)
    return Labelled(chosen.name, split, tuple(sentences), {DOCUMENT_STARTS: starts} if starts else {})


def _tag(columns: list[str]) -> str:
    return columns[-1].split(",")[0].strip()


def _problem(columns: list[str], types: set[str]) -> str | None:
    if len(columns) < 2 or not columns[0]:
        return "the line does not hold a word and a tag"
    try:
        _, kind = split_tag(_tag(columns))
    except ValueError as error:
        return str(error)
    return None if kind in types else f"'{_tag(columns)}' has a type that this data set does not have"
