"""Small sets of labelled examples in their official files, which a model can learn: a word says what the label is."""

import json
import random
from pathlib import Path

from disttrain.sets import SETS, LabelledSet

FILLERS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "it",
    "was",
    "for",
    "on",
    "that",
    "by",
    "this",
    "with",
    "he",
    "as",
    "at",
]
MARKS = {"0": "awful", "1": "great", "2": "fine", "3": "odd", "4": "late", "5": "warm"}


def write_set(name: str, folder: Path, examples: int = 80) -> Path:
    """The official files of every split."""
    chosen, dice = SETS[name], random.Random(name)
    folder.mkdir(parents=True, exist_ok=True)
    for split, files in chosen.files.items():
        path = folder / files[0]
        if chosen.layout == "folders":
            for number in range(examples):
                label = chosen.labels[number % 2]
                (path / label).mkdir(parents=True, exist_ok=True)
                (path / label / f"{number}_7.txt").write_text(_sentence(dice, MARKS[str(number % 2)]))
        elif chosen.layout == "squad":
            path.write_text(json.dumps(_squad(dice, examples)))
        else:
            path.write_text("".join(_lines(chosen, split, dice, examples)))
    return folder


def _sentence(dice: random.Random, mark: str) -> str:
    words = dice.choices(FILLERS, k=dice.randint(3, 7))
    words.insert(dice.randrange(len(words)), mark)
    return " ".join(words)


def _lines(chosen: LabelledSet, split: str, dice: random.Random, examples: int) -> list[str]:
    if chosen.kind == "tag":
        return _tagged(chosen, dice, examples)
    if chosen.layout == "label_text":
        labels = [chosen.labels[i % len(chosen.labels)] for i in range(examples)]
        return [f"{label} {_sentence(dice, MARKS[label])}\n" for label in labels]
    assert chosen.columns is not None
    columns, lines = chosen.columns, []
    names = list(columns.without_header.get(split, ()))
    if not names:
        names = ["index", *columns.texts, *([] if split.startswith("test") else [columns.label])]
        lines.append("\t".join(names) + "\n")
    for i in range(examples):
        label = f"{5 * dice.random():.3f}" if chosen.kind == "regress" else chosen.labels[i % len(chosen.labels)]
        mark = MARKS[str(i % len(chosen.labels))] if chosen.labels else str(round(float(label)))
        row = {columns.label: label, columns.texts[0]: _sentence(dice, mark)}
        row |= {text: _sentence(dice, "so") for text in columns.texts[1:]}
        lines.append("\t".join(row.get(name, str(i)) for name in names) + "\n")
    return lines


def _tagged(chosen: LabelledSet, dice: random.Random, examples: int) -> list[str]:
    types = [label[2:] for label in chosen.labels if label.startswith("B-")]
    between, lines = " " if chosen.name == "conll2003" else "\t", []
    for number in range(examples):
        kind = types[number % 2]
        words = [(word, "O") for word in dice.choices(FILLERS, k=dice.randint(2, 5))]
        place = dice.randrange(len(words))
        words[place:place] = [(f"Ab{number % 3}{kind[:3]}", f"B-{kind}"), (f"Cd{kind[:3]}", f"I-{kind}")]
        middle = ["NN", "I-NP"] if chosen.name == "conll2003" else []
        lines += [between.join([word, *middle, tag]) + "\n" for word, tag in words] + ["\n"]
    return lines


def _squad(dice: random.Random, examples: int) -> dict:
    articles = []
    for number in range(examples // 4):
        context = _sentence(dice, "great") + ". " + _sentence(dice, "awful") + "."
        answer = "great" if number % 2 else "awful"
        asked = [{"id": f"q{number}_{i}", "question": f"what is {answer}?",
                  "answers": [{"text": answer, "answer_start": context.index(answer)}]} for i in range(4)]  # fmt: skip
        articles.append({"title": f"article {number}", "paragraphs": [{"context": context, "qas": asked}]})
    return {"version": "1.1", "data": articles}
