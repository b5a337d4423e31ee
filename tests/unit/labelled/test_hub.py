import pytest

from disttrain.config.problems import RefusedInput
from disttrain.labelled.examples import Question, Sentences, Tagged
from disttrain.labelled.hub import examples_of, read_hub
from disttrain.sets import SETS

RECORDS = {
    "cola": {"sentence": "Bill sank.", "label": 1, "idx": 0},
    "mnli": {"premise": "A", "hypothesis": "B", "label": 2, "idx": 0},
    "mrpc": {"sentence1": "A", "sentence2": "B", "label": -1, "idx": 0},
    "stsb": {"sentence1": "A", "sentence2": "B", "label": 2.5, "idx": 0},
    "imdb": {"text": " fine ", "label": 1},
    "conll2003": {"tokens": ["EU", "rejects", "Ann"], "ner_tags": [3, 0, 2]},
    "squad": {"id": "1", "title": "T", "question": "Who?", "context": "Ann.",
              "answers": {"text": ["Ann"], "answer_start": [0]}},
}  # fmt: skip
EXPECTED = {
    "cola": Sentences("Bill sank.", None, "1"),
    "mnli": Sentences("A", "B", "contradiction"),
    "mrpc": Sentences("A", "B", None),
    "stsb": Sentences("A", "B", 2.5),
    "imdb": Sentences("fine", None, "pos"),
    "conll2003": Tagged(("EU", "rejects", "Ann"), ("B-ORG", "O", "B-PER")),
    "squad": Question("1", "T", "Who?", "Ann.", (("Ann", 0),)),
}


def examples(name, record):
    source = SETS[name].hub
    assert source is not None
    return examples_of(SETS[name], source, [record], "here")


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_of_the_hub(name):
    assert examples(name, RECORDS[name]) == (EXPECTED[name],)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("cola", {"label": 2}, "no example of cola"),
        ("cola", {"sentence": None}, "no example of cola"),
        ("conll2003", {"ner_tags": [0]}, "3 words have 1 tags"),
        ("squad", {"answers": {"text": ["Bob"], "answer_start": [0]}}, "does not have the answer 'Bob'"),
    ],
)
def test_a_record_that_is_wrong(name, changes, message):
    with pytest.raises(RefusedInput, match=message):
        examples(name, RECORDS[name] | changes)


def test_a_folder_that_datasets_wrote(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({key: [value] * 3 for key, value in RECORDS["cola"].items()})
    datasets.DatasetDict({"validation": rows}).save_to_disk(str(tmp_path / "saved"))
    found = read_hub("cola", "dev", tmp_path / "saved")
    assert found.examples == (EXPECTED["cola"],) * 3 and (found.name, found.split) == ("cola", "dev")
    with pytest.raises(RefusedInput, match="cannot be opened"):
        read_hub("cola", "train", tmp_path / "saved")


def test_sets_and_splits_that_the_hub_lacks():
    with pytest.raises(RefusedInput, match="no place on the hub"):
        read_hub("mr", "all")
    with pytest.raises(RefusedInput, match="no such split"):
        read_hub("imdb", "dev")
