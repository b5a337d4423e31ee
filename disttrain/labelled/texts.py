"""Files of a label and a text a line (MR, SUBJ, MPQA, CR, TREC, SST), and IMDb's folders of one text a file."""

import re
from pathlib import Path

from disttrain.config.problems import Problem, RefusedInput
from disttrain.labelled.examples import Labelled, Sentences
from disttrain.labelled.files import bad_line, lines_of, refuse
from disttrain.sets import LabelledSet


def read_label_text(chosen: LabelledSet, path: Path, split: str) -> Labelled:
    """Lines such as ``0 simplistic , silly and tedious .``, in UTF-8 or Latin-1 (Kim 2014).

    Raises RefusedInput, with file and line, for a line without one of the set's labels.
    """
    examples, problems = [], []
    for number, line in enumerate(lines_of(path, latin=True), 1):
        label, space, text = line.partition(" ")
        if label not in chosen.labels or not space:
            problems.append(bad_line(path, number, f"the line does not start with one of {', '.join(chosen.labels)} "
                                     "and a space", "write a label, a space and the text"))  # fmt: skip
        else:
            examples.append(Sentences(text.strip(), None, label))
    refuse(problems, path)
    return Labelled(chosen.name, split, tuple(examples))


def read_folders(chosen: LabelledSet, path: Path, split: str) -> Labelled:
    """One text a file, in a folder for each class, such as ``train/pos/12_9.txt`` (Maas et al. 2011).

    The classes come in the order of the set's labels, the files of each by the number that starts their name. Raises
    RefusedInput when a folder is missing or empty, or a file cannot be read.
    """
    empty = [path / label for label in chosen.labels if not any((path / label).glob("*.txt"))]
    if empty:
        raise RefusedInput([Problem((str(folder),), "there are no .txt files here", f"unpack {chosen.name} there")
                            for folder in empty])  # fmt: skip
    examples = []
    for label in chosen.labels:
        for file in sorted((path / label).glob("*.txt"), key=_number):
            examples.append(Sentences(" ".join(lines_of(file)).strip(), None, label))
    return Labelled(chosen.name, split, tuple(examples))


def _number(file: Path) -> tuple[int, str]:
    digits = re.match(r"\d+", file.name)
    return int(digits.group()) if digits else -1, file.name
