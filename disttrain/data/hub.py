"""Documents of Hugging Face data sets, through the optional package `datasets`."""

import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from disttrain.config.problems import Problem, RefusedInput


def available() -> bool:
    """Whether the package `datasets` is installed."""
    return importlib.util.find_spec("datasets") is not None


def documents(path: str, name: str | None, split: str, text_field: str) -> Iterator[str]:
    """The text of every record, in the data set's order, streamed: nothing is downloaded ahead or held in memory.

    path is a name on the hub, a folder of json, parquet or arrow files, or what `save_to_disk` wrote. Raises
    RefusedInput when the data set cannot be opened or its records hold no text under text_field.
    """
    settings = (f"data.path={path}", f"data.hf_config={name}", f"data.hf_split={split}")
    records = opened(settings, path, name, split)
    for record in records:
        text = record.get(text_field)
        if not isinstance(text, str):
            problem = Problem((settings[0], f"data.text_field={text_field}"),
                              "the records hold no text under this key",
                              f"give data.text_field; the records have: {', '.join(sorted(record))}")  # fmt: skip
            raise RefusedInput([problem])
        yield text


def opened(settings: tuple[str, ...], path: str, name: str | None, split: str) -> Iterable[dict[str, Any]]:
    """The records of a data set as `documents` takes it, streamed. Raises RefusedInput, naming the settings, when it
    cannot be opened."""
    try:
        return _open(path, name, split)
    except Exception as error:  # datasets raises a dozen unrelated types for user mistakes and network failures
        problem = Problem(settings, f"the data set cannot be opened: {type(error).__name__}: {error}",
                          "check name, configuration and split; without network, give a local folder")  # fmt: skip
        raise RefusedInput([problem]) from error


def _open(path: str, name: str | None, split: str) -> Iterable[dict[str, Any]]:
    import datasets

    folder = Path(path).expanduser()
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        saved = datasets.load_from_disk(str(folder))
        return saved[split] if isinstance(saved, datasets.DatasetDict) else saved  # pyright: ignore
    return datasets.load_dataset(str(folder) if folder.exists() else path, name, split=split, streaming=True)  # pyright: ignore
