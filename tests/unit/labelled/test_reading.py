import json
from pathlib import Path

import pytest

import disttrain
from disttrain.config.problems import RefusedInput
from disttrain.labelled.examples import Question, Sentences, Tagged
from disttrain.labelled.reading import missing_rows, read
from disttrain.sets import SETS
from tests.unit.labelled.made import CONLL, GLUE, written

SHARED = Path(disttrain.__file__).resolve().parents[2] / "shared" / "data"


def problems(name: str, folder: Path, split: str) -> list[tuple[str, str]]:
    with pytest.raises(RefusedInput) as refused:
        read(name, folder, split)
    return [(problem.settings[0].removeprefix(f"{folder}/"), problem.message) for problem in refused.value.problems]


@pytest.mark.parametrize(
    ("name", "split", "expected"),
    [
        ("cola", "train", [('The "sailors" rode.', None, "1"), ('The box "was broken.', None, "0")]),
        ("cola", "dev", [("Bill sank.", None, "1")]),
        ("cola", "test", [("Bill whistled.", None, None)]),
        ("sst2", "train", [("hide new secretions", None, "0"), ("a charming journey", None, "1")]),
        ("sst2", "test", [("uneasy mishmash .", None, None)]),
        ("mrpc", "train", [("A b.", "B a.", "1"), ("C.", "D.", "0")]),
        ("mrpc", "test", [("PCs", "Computers", None)]),
        ("qqp", "train", [("How?", "Why?", "0"), ("Who?", "Who is it?", "1")]),
        ("qqp", "test", [("What?", "Which?", None)]),
        ("stsb", "train", [("A plane.", "An air plane.", 5.0), ("A man.", "A cat.", 0.25)]),
        ("stsb", "test", [("A girl.", "A boy.", None)]),
        ("mnli", "train", [("One.", "Two.", "neutral"), ("X.", "Y.", "contradiction")]),
        ("mnli", "dev", [("A", "B", "entailment")]),
        ("mnli", "dev_mismatched", [("C", "D", "neutral")]),
        ("mnli", "test", [("E", "F", None)]),
        ("mnli", "test_mismatched", [("G", "H", None)]),
        ("qnli", "train", [("When?", "In 1990.", "entailment"), ("Who?", "No.", "not_entailment")]),
        ("qnli", "test", [("What?", "That.", None)]),
        ("rte", "train", [("No weapons.", "Weapons.", "not_entailment")]),
        ("rte", "test", [("Mangla.", "Shukla.", None)]),
        ("wnli", "train", [("I stuck a pin.", "The pin.", "1"), ("A.", "B.", "0")]),
        ("wnli", "test", [("Maude.", "Dora.", None)]),
    ],
)
def test_glue(tmp_path, name, split, expected):
    found = read(name, written(tmp_path, GLUE[name]), split)
    assert list(found.examples) == [Sentences(*one) for one in expected]
    assert found.left_out == ({"rows with too few columns": 1} if (name, split) == ("qqp", "train") else {})


def test_wrong_rows_of_a_tsv_file_are_all_named(tmp_path):
    text = "sentence\tlabel\nfine\t1\nno label\nbad label\t2\nthree\t1\tcolumns\n"
    written(tmp_path, {"train.tsv": text, "dev.tsv": "text\tlabel\nx\t1\n"})
    assert problems("sst2", tmp_path, "train") == [
        ("train.tsv:3", "the row has 1 columns, the header has 2"),
        ("train.tsv:4", "'2' is no label of sst2, which has 0, 1"),
        ("train.tsv:5", "the row has 3 columns, the header has 2"),
    ]
    assert problems("sst2", tmp_path, "dev") == [("dev.tsv:1", "the header lacks sentence: it has text, label")]
    scores = GLUE["stsb"]["train.tsv"].replace("5.000", "5.1").replace("0.250", "none")
    written(tmp_path, {"train.tsv": scores})
    assert problems("stsb", tmp_path, "train") == [
        ("train.tsv:2", "the score 5.1 is not between 0 and 5"),
        ("train.tsv:3", "'none' is no number"),
    ]


def test_of_many_wrong_lines_twenty_are_named(tmp_path):
    written(tmp_path, {"rt-polarity.all": "no label here\n" * 50})
    found = problems("mr", tmp_path, "all")
    assert len(found) == 21 and found[0][0] == "rt-polarity.all:1" and found[-1][1] == "30 more lines are wrong"


def test_what_is_not_there(tmp_path):
    assert problems("sst", tmp_path, "train") == [("sst", "there is no data set of this name")]
    assert problems("mr", tmp_path, "train") == [("mr", "the data set has no such split")]
    ((_, message),) = problems("conll2003", tmp_path, "train")
    assert message == "the train split of conll2003 is not here: there is no eng.train or train.txt"
    written(tmp_path, {"train.tsv": "sentence\tlabel\n"})
    assert problems("sst2", tmp_path, "train") == [("train.tsv", "there are no examples in it")]
    (tmp_path / "dev.tsv").write_bytes(b"sentence\tlabel\ncaf\xe9\t1\n")
    assert problems("sst2", tmp_path, "dev") == [("dev.tsv:2", "this is not UTF-8")]


def test_label_and_text_in_latin_1_and_utf_8(tmp_path):
    (tmp_path / "rt-polarity.all").write_bytes("0 a caf\xe9 \n1 one\x85line .\n".encode("latin-1"))
    assert read("mr", tmp_path, "all").examples == (
        Sentences("a café", None, "0"),
        Sentences("one\x85line .", None, "1"),
    )
    written(tmp_path, {"stsa.fine.dev": "4 brûlée .\n"})
    assert read("sst_fine", tmp_path, "dev").examples == (Sentences("brûlée .", None, "4"),)
    written(tmp_path, {"TREC.test.all": "5 How far ?\n6 Out of range\n"})
    assert [place for place, _ in problems("trec", tmp_path, "test")] == ["TREC.test.all:2"]


def test_imdb_by_class_and_number(tmp_path):
    files = {"train/pos/10_9.txt": "ten", "train/pos/9_7.txt": "nine<br />", "train/neg/0_1.txt": "zero\nlines\n"}
    written(tmp_path, files)
    assert read("imdb", tmp_path, "train").examples == (
        Sentences("zero lines", None, "neg"),
        Sentences("nine<br />", None, "pos"),
        Sentences("ten", None, "pos"),
    )
    (tmp_path / "test" / "pos").mkdir(parents=True)
    assert [place for place, _ in problems("imdb", tmp_path, "test")] == ["test/neg", "test/pos"]


def test_conll_columns_become_iob2(tmp_path):
    found = read("conll2003", written(tmp_path, {"eng.train": CONLL}), "train")
    assert found.examples == (
        Tagged(("EU", "rejects", "German", "French", "call"), ("B-ORG", "O", "B-MISC", "B-MISC", "O")),
        Tagged(("Peter", "Blackburn"), ("B-PER", "I-PER")),
        Tagged(("BRUSSELS", "1996-08-22"), ("B-LOC", "O")),
    )
    assert found.left_out == {"document starts": 2}


def test_wnut_with_several_tags_a_word_and_tabs_in_empty_lines(tmp_path):
    text = "\ufeffA\tB-location,B-group\n\u00a0\tI-location\n\t\nempire\tO\nstate\tI-person\n"
    found = read("wnut17", written(tmp_path, {"wnut17train.conll": text}), "train")
    assert found.examples == (Tagged(("A", "\u00a0"), ("B-location", "I-location")),
                              Tagged(("empire", "state"), ("O", "B-person")))  # fmt: skip
    written(tmp_path, {"emerging.dev.conll": "alone\nx\tB-person\ny\tB-animal\nz\tQ\n"})
    assert problems("wnut17", tmp_path, "dev") == [
        ("emerging.dev.conll:1", "the line does not hold a word and a tag"),
        ("emerging.dev.conll:3", "'B-animal' has a type that this data set does not have"),
        ("emerging.dev.conll:4", "'Q' is no tag: it is neither O nor one of B-, I-, E- or S- and a type"),
    ]


def squad_file(**changes: object) -> str:
    asked = {"id": "1a", "question": "Who?", "answers": [{"text": "Ann", "answer_start": 0}]} | changes
    paragraphs = [{"context": "Ann saw Bob.", "qas": [asked, {"id": "1b", "question": "Whom?"}]}]
    return json.dumps({"version": "1.1", "data": [{"title": "Meeting", "paragraphs": paragraphs}]})


def test_squad(tmp_path):
    found = read("squad", written(tmp_path, {"train-v1.1.json": squad_file()}), "train")
    assert found.examples == (Question("1a", "Meeting", "Who?", "Ann saw Bob.", (("Ann", 0),)),
                              Question("1b", "Meeting", "Whom?", "Ann saw Bob.", ()))  # fmt: skip


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        (squad_file(answers=[{"text": "Bob", "answer_start": 7}]), ": question 1a", "does not have the answer 'Bob'"),
        (squad_file(is_impossible=True), ": question 1a", "SQuAD 2.0 has no answer"),
        ('{"data":\n[}', ":2", "not JSON"),
        ('{"data": [3]}', "", "does not have SQuAD's form"),
        ("[]", "", "does not have SQuAD's form"),
    ],
)
def test_what_is_not_squad(tmp_path, text, place, message):
    ((found, said),) = problems("squad", written(tmp_path, {"dev-v1.1.json": text}), "dev")
    assert found == f"dev-v1.1.json{place}" and message in said


def test_the_table_is_whole():
    assert len(SETS) == 20
    for name, one in SETS.items():
        assert name == one.name and set(one.rows) == set(one.files) and one.scores
        assert bool(one.labels) == (one.kind in ("classify", "tag")) and (one.layout == "tsv") == (
            one.columns is not None
        )
        assert one.hub is None or set(one.hub.splits) == set(one.files)
    assert SETS["conll2003"].labels[:3] == ("O", "B-PER", "I-PER") and len(SETS["wnut17"].labels) == 13


@pytest.mark.parametrize(
    ("name", "folder", "split"),
    [(name, f"glue/{folder}", split) for name, folder in (("cola", "CoLA"), ("rte", "RTE"), ("sst2", "SST-2"))
     for split in ("dev", "test", "train") if (name, split) != ("sst2", "train")]
    + [("mr", "sentence-polarity", "all"), ("sst_binary", "sentence-polarity", "train"), ("squad", "squad", "dev")]
    + [("wnut17", "wnut17", split) for split in ("train", "dev", "test")],
)  # fmt: skip
def test_real_files_have_the_published_rows(name, folder, split):
    try:
        found = read(name, SHARED / folder, split)
    except RefusedInput as refused:
        if "is not here" in refused.problems[0].message:
            pytest.skip(f"{folder} is not beside the checkout")
        raise
    assert missing_rows(found) == 0 and not found.left_out
    labels = {one.label for one in found.examples if isinstance(one, Sentences)}
    assert labels <= {*SETS[name].labels, None} and (labels != {None} or split == "test")
