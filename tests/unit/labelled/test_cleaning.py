import pytest

from disttrain.config.cleaning import CleaningConfig
from disttrain.config.problems import RefusedInput
from disttrain.labelled.cleaning import clean_splits, cleaning_problems, written
from disttrain.labelled.examples import Sentences, Tagged
from tests.unit.labelled.made import question


def sentences(*texts: str) -> list[Sentences]:
    return [Sentences(text, None, "1") for text in texts]


def texts(cleaned) -> list[str]:
    return [one.text for one in cleaned.examples]


def test_nothing_is_changed_unless_it_is_asked_for():
    rows = [Sentences("", None, None), *sentences("A  b!", "A  b!", "3")]
    assert clean_splits(CleaningConfig(), "classify", {"train": rows})["train"].examples == tuple(rows)


@pytest.mark.parametrize(
    ("settings", "text", "expected"),
    [
        ({"lowercase": True}, "ÀB c", "àb c"),
        ({"numbers": "map"}, "in 1999, 3.5 or 1,000.5% of 66a, a7 and 2.", "in NUM, NUM or NUM% of 66a, a7 and NUM."),
        ({"numbers": "map"}, "12.5a 1.2.3 ٣", "12.5a NUM NUM"),
        ({"punctuation": "apart"}, "it's 5€ (yes).", "it ' s 5 € ( yes ) ."),
        ({"punctuation": "remove"}, "it's 5€ (yes).", "it s 5 yes"),
        ({"punctuation": "apart", "numbers": "map"}, "3.5!", "NUM !"),
        ({"lowercase": True, "numbers": "map"}, "NUM 4", "num NUM"),
    ],
)
def test_a_step(settings, text, expected):
    assert written(CleaningConfig(**settings), text) == expected


def test_rare_words_are_those_of_training():
    splits = {"train": sentences("a a b", "B c"), "dev": sentences("a b c d")}
    cleaned = clean_splits(CleaningConfig(min_count=2, lowercase=True), "classify", splits)
    assert texts(cleaned["train"]) == ["a a b", "b UNK"] and texts(cleaned["dev"]) == ["a b UNK UNK"]


def test_long_texts_and_their_tags_are_cut():
    pair = Sentences("a b  c", "d", "1")
    cleaned = clean_splits(CleaningConfig(max_words=2), "classify", {"train": [pair]})
    assert cleaned["train"].examples == (Sentences("a b", "d", "1"),)
    tagged = Tagged(("A", "7", "x"), ("B-X", "I-X", "O"))
    cleaned = clean_splits(CleaningConfig(max_words=2, lowercase=True, numbers="map"), "tag", {"train": [tagged]})
    assert cleaned["train"].examples == (Tagged(("a", "NUM"), ("B-X", "I-X")),)


def test_rows_are_removed_from_training_only_and_counted():
    rows = [Sentences(" ", None, "1"), Sentences("x", "", "1"), Sentences("x", None, None), Sentences("A", None, "1"),
            Sentences("a", None, "1"), Sentences("a", None, "0"), Sentences("a", "b", "1")]  # fmt: skip
    config = CleaningConfig(missing="remove", duplicates="same_label", lowercase=True)
    cleaned = clean_splits(config, "classify", {"train": rows, "dev": rows})
    assert cleaned["train"].removed == {"missing": (0, 1, 2), "duplicates": (4,)}
    assert [(one.text, one.second, one.label) for one in cleaned["train"].examples] == [
        ("a", None, "1"), ("a", None, "0"), ("a", "b", "1")]  # fmt: skip
    assert len(cleaned["dev"].examples) == len(rows) and not cleaned["dev"].removed
    same_text = clean_splits(CleaningConfig(duplicates="same_text"), "classify", {"train": rows[4:]})
    assert same_text["train"].removed == {"duplicates": (1,)}
    asked = [question("Ann."), question("Ann.", "Ann"), question("Ann.", "Ann")]
    answers = clean_splits(CleaningConfig(missing="remove", duplicates="same_label"), "answer", {"train": asked})
    assert answers["train"].removed == {"missing": (0,), "duplicates": (2,)}


def test_steps_that_do_not_fit_the_set():
    config = CleaningConfig(lowercase=True, punctuation="remove", segment="jieba")
    fits = {kind: [p.settings[0] for p in cleaning_problems(config, kind) if "does not fit" in p.message]
            for kind in ("classify", "tag", "answer")}  # fmt: skip
    assert fits == {"classify": [], "tag": ["segment=jieba", "punctuation=remove"],
                    "answer": ["segment=jieba", "lowercase=True", "punctuation=remove"]}  # fmt: skip
    with pytest.raises(RefusedInput, match="does not fit an? answer set"):
        clean_splits(CleaningConfig(lowercase=True), "answer", {"train": []})


def test_chinese_words():
    pytest.importorskip("jieba")
    assert written(CleaningConfig(segment="jieba"), "我来到北京清华大学, ok") == "我 来到 北京 清华大学 , ok"


def test_without_jieba_it_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (problem,) = cleaning_problems(CleaningConfig(segment="jieba"), "classify")
    assert problem.message == "the package jieba is not installed" and "chinese" in problem.fix
