"""Data sets of the Hugging Face hub, or folders that `save_to_disk` wrote, as labelled examples."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from disttrain.config.problems import Problem, RefusedInput
from disttrain.data import hub
from disttrain.labelled.examples import Example, Labelled, Question, Sentences, Tagged
from disttrain.labelled.reading import known_set
from disttrain.labelled.squad import answer_problems
from disttrain.labelled.tags import to_iob2
from disttrain.sets import Hub, LabelledSet

Record = Mapping[str, Any]


def read_hub(name: str, split: str, path: str | Path | None = None) -> Labelled:
    """One split of a set, through the package `datasets`; path is another name on the hub, or a folder.

    Raises RefusedInput for a set that the hub does not have, an unknown split, a data set that cannot be opened, and
    records that lack a key or have a label out of range.
    """
    chosen = known_set(name)
    source = chosen.hub
    if source is None:
        problem = Problem((name,), "no place on the hub is known for this data set", "give a folder with its files")
        raise RefusedInput([problem])
    if split not in source.splits:
        problem = Problem((name, split), "the data set has no such split", f"give {' or '.join(source.splits)}")
        raise RefusedInput([problem])
    place = str(path) if path is not None else source.path
    config = source.config if path is None else None
    records = hub.opened((name, place, split), place, config, source.splits[split])
    return Labelled(name, split, examples_of(chosen, source, records, place))


def examples_of(chosen: LabelledSet, source: Hub, records: Iterable[Record], where: str) -> tuple[Example, ...]:
    """The examples of records; where names them in messages. Raises RefusedInput for the first record that is wrong."""
    examples: list[Example] = []
    for number, record in enumerate(records):
        try:
            examples.append(_example(chosen, source, record))
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            problem = Problem((f"{where}: record {number}",), f"this is no example of {chosen.name}: {error!r}",
                              f"the record has {', '.join(sorted(record))}")  # fmt: skip
            raise RefusedInput([problem]) from error
        example = examples[-1]
        wrong = answer_problems(example, where) if isinstance(example, Question) else []
        if wrong:
            raise RefusedInput(wrong)
    return tuple(examples)


def _example(chosen: LabelledSet, source: Hub, record: Record) -> Example:
    if chosen.kind == "answer":
        answers = record[source.label]
        pairs = tuple(zip(answers["text"], map(int, answers["answer_start"]), strict=True))
        return Question(record["id"], record["title"], record["question"], record["context"], pairs)
    if chosen.kind == "tag":
        words, tags = record[source.texts[0]], [_named(chosen, tag) for tag in record[source.label]]
        if len(words) != len(tags):
            raise ValueError(f"{len(words)} words have {len(tags)} tags")
        return Tagged(tuple(words), tuple(to_iob2(tags)))
    texts = [record[key].strip() for key in source.texts]
    label = record.get(source.label)
    if chosen.kind == "classify":
        label = None if label is None or label == -1 else _named(chosen, label)
    else:
        label = None if label is None or label == -1 else float(label)
    return Sentences(texts[0], texts[1] if len(texts) > 1 else None, label)


def _named(chosen: LabelledSet, label: int | str) -> str:
    """The label's name; records have its number or its name."""
    name = label if isinstance(label, str) else chosen.labels[label] if label >= 0 else None
    if name not in chosen.labels:
        raise ValueError(f"'{label}' is no label of {chosen.name}")
    return name
