"""One split of a data set: from the official files of a folder, or from the hub."""

from collections.abc import Callable
from pathlib import Path

from disttrain.config.load import nearest
from disttrain.config.problems import Problem, RefusedInput
from disttrain.labelled.columns import read_columns
from disttrain.labelled.examples import Labelled
from disttrain.labelled.squad import read_squad
from disttrain.labelled.texts import read_folders, read_label_text
from disttrain.labelled.tsv import read_tsv
from disttrain.sets import SETS, LabelledSet, Layout

_READERS: dict[Layout, Callable[[LabelledSet, Path, str], Labelled]] = {
    "tsv": read_tsv,
    "folders": read_folders,
    "label_text": read_label_text,
    "columns": read_columns,
    "squad": read_squad,
}


def read(name: str, folder: str | Path, split: str) -> Labelled:
    """One split of a set of `SETS`, from a folder with its official files.

    Raises RefusedInput for an unknown set or split, a missing file and, with file and line, for what a file has wrong.
    """
    chosen = known_set(name)
    path = file_of(chosen, Path(folder).expanduser(), split)
    found = _READERS[chosen.layout](chosen, path, split)
    if not found.examples:
        raise RefusedInput([Problem((str(path),), "there are no examples in it", f"give the files of {name}")])
    return found


def known_set(name: str) -> LabelledSet:
    """The set of this name. Raises RefusedInput when there is none, with the nearest name."""
    if name in SETS:
        return SETS[name]
    guess = nearest(name, list(SETS))
    fix = f"did you mean '{guess}'?" if guess else f"give one of {', '.join(SETS)}"
    raise RefusedInput([Problem((name,), "there is no data set of this name", fix)])


def file_of(chosen: LabelledSet, folder: Path, split: str) -> Path:
    """The file, or folder, of a split. Raises RefusedInput when the set or the folder lacks it."""
    if split not in chosen.files:
        problem = Problem((chosen.name, split), "the data set has no such split", f"give {' or '.join(chosen.files)}")
        raise RefusedInput([problem])
    for name in chosen.files[split]:
        if (folder / name).exists():
            return folder / name
    wanted = " or ".join(chosen.files[split])
    raise RefusedInput([Problem((str(folder),), f"the {split} split of {chosen.name} is not here: there is no {wanted}",
                                f"put {wanted} there, or give its folder")])  # fmt: skip


def missing_rows(found: Labelled) -> int:
    """How many examples the split has fewer than was published: 0 for a whole set, negative for more."""
    return SETS[found.name].rows[found.split] - len(found.examples)
