import random
import warnings

import pytest

from disttrain.labelled.tags import to_bioes, to_iob1
from disttrain.scores.entities import entity_scores, entity_scores_by_type, surface_scores

TYPES = ("PER", "LOC", "creative-work")


def scores(said: str, truth: str) -> tuple[float, float, float]:
    return tuple(entity_scores([said.split()], [truth.split()]).values())  # pyright: ignore


@pytest.mark.parametrize(
    ("said", "truth", "precision", "recall"),
    [
        ("B-X I-X O B-Y", "B-X I-X O B-Y", 1, 1),
        ("B-X O O B-Y", "B-X I-X O B-Y", 1 / 2, 1 / 2),  # an end that is wrong
        ("B-X I-X O B-X", "B-X I-X O B-Y", 1 / 2, 1 / 2),  # a type that is wrong
        ("O I-X I-X O", "O B-X I-X O", 1, 1),  # a stray I starts an entity
        ("B-X I-Y O O", "B-X I-X O O", 0, 0),  # a change of type ends one and starts another
        ("B-X B-X O O", "B-X I-X O O", 0, 0),
        ("I-X I-X B-X O", "B-X I-X B-X O", 1, 1),  # IOB1 beside IOB2
        ("B-X E-X O S-Y", "B-X I-X O B-Y", 1, 1),  # BIOES beside IOB2
        ("O O O O", "B-X O O O", 0, 0),
        ("O O O O", "O O O O", 0, 0),
        ("B-X B-Y B-X O", "B-X O O O", 1 / 3, 1),
    ],
)
def test_cases_by_hand(said, truth, precision, recall):
    f1 = 2 * precision * recall / (precision + recall) if precision else 0
    assert scores(said, truth) == pytest.approx((precision, recall, f1), abs=1e-12)


def random_tags(rng: random.Random, prefixes: str) -> list[str]:
    tags = ["O", *(f"{prefix}-{kind}" for prefix in prefixes for kind in TYPES)]
    return [rng.choice(tags) for _ in range(rng.randint(1, 12))]


def changed(rng: random.Random, tags: list[str], other: list[str]) -> list[str]:
    return [rng.choice(other) if rng.random() < 0.2 else tag for tag in tags]


@pytest.mark.parametrize("prefixes", ["BI", "BIES", "I"])
def test_equal_to_conlleval_with_regular_and_stray_tags(prefixes):
    conlleval = pytest.importorskip("conlleval")
    rng = random.Random(prefixes)
    for _ in range(6):
        truth = [random_tags(rng, prefixes) for _ in range(30)]
        said = [changed(rng, tags, random_tags(rng, prefixes)) for tags in truth]
        lines = []
        for right, wrong in zip(truth, said, strict=True):
            lines += [f"word {gold} {guess}" for gold, guess in zip(right, wrong, strict=True)] + [""]
        theirs = conlleval.evaluate(lines)
        chosen = {"overall": entity_scores(said, truth)} | entity_scores_by_type(said, truth)
        for kind, three in chosen.items():
            evals = (theirs["overall"]["chunks"] if kind == "overall" else theirs["slots"]["chunks"][kind])["evals"]
            assert list(three.values()) == pytest.approx([evals[name] for name in ("prec", "rec", "f1")], abs=1e-12)


@pytest.mark.parametrize("prefixes", ["BI", "BIES", "I"])
def test_equal_to_seqeval_with_regular_and_stray_tags(prefixes):
    metrics = pytest.importorskip("seqeval.metrics")
    rng = random.Random(prefixes)
    for _ in range(6):
        truth = [random_tags(rng, prefixes) for _ in range(30)]
        said = [changed(rng, tags, random_tags(rng, prefixes)) for tags in truth]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = [getattr(metrics, f"{name}_score")(truth, said) for name in ("precision", "recall", "f1")]
            report = metrics.classification_report(truth, said, output_dict=True)
        assert list(entity_scores(said, truth).values()) == pytest.approx(theirs, abs=1e-12)
        for kind, three in entity_scores_by_type(said, truth).items():
            expected = [report[kind][name] for name in ("precision", "recall", "f1-score")]
            assert list(three.values()) == pytest.approx(expected, abs=1e-12)


def test_the_scheme_does_not_change_the_scores():
    rng = random.Random(3)
    truth = [random_tags(rng, "BI") for _ in range(50)]
    said = [changed(rng, tags, random_tags(rng, "BI")) for tags in truth]
    expected = entity_scores(said, truth)
    assert 0 < expected["f1"] < 1
    for change in (to_iob1, to_bioes):
        assert entity_scores([change(tags) for tags in said], [change(tags) for tags in truth]) == expected


def test_surface_forms_count_once():
    words = [words.split() for words in ("Ann saw Ann Lee", "Ann saw Paris")]
    truth = [tags.split() for tags in ("B-PER O B-PER I-PER", "B-PER O B-LOC")]
    said = [tags.split() for tags in ("B-PER O O B-PER", "O O B-PER")]
    # found: (Ann, PER), (Lee, PER), (Paris, PER). true: (Ann, PER), (Ann Lee, PER), (Paris, LOC). correct: (Ann, PER)
    expected = {"surface_precision": 1 / 3, "surface_recall": 1 / 3, "surface_f1": 1 / 3}
    assert surface_scores(words, said, truth) == pytest.approx(expected, abs=1e-12)
    assert surface_scores(words, [["O"] * 4, ["O"] * 3], truth)["surface_f1"] == 0


def test_a_form_that_is_found_elsewhere_only_is_not_correct():
    words, truth, said = [["Ann", "Ann"]], [["B-PER", "O"]], [["O", "B-PER"]]
    assert surface_scores(words, said, truth)["surface_f1"] == 0


def test_sentences_of_different_lengths():
    with pytest.raises(ValueError, match="a sentence of 2 tags has 1"):
        entity_scores([["O"]], [["O", "O"]])
    with pytest.raises(ValueError):
        entity_scores([], [["O"]])
