import pytest

from disttrain.config.problems import RefusedInput
from disttrain.labelled.examples import Sentences, Tagged
from disttrain.scores.official import official
from disttrain.sets import SETS
from tests.unit.labelled.made import question


def sentences(labels) -> list[Sentences]:
    return [Sentences("x", None, label) for label in labels]


@pytest.mark.parametrize("name", SETS)
def test_every_set_has_its_scores_and_right_answers_have_the_best(name):
    chosen = SETS[name]
    if chosen.kind == "tag":
        references = [Tagged(("a", "b"), (chosen.labels[1], "O"))]
        said = [one.tags for one in references]
    elif chosen.kind == "answer":
        references, said = [question("Ann saw Bob", "Bob")], ["the bob"]
    elif chosen.kind == "regress":
        references, said = sentences([1.0, 2.0, 5.0]), [1.0, 2.0, 5.0]
    else:
        references, said = sentences(chosen.labels), list(chosen.labels)
    found = official(name, said, references)
    assert tuple(found) == chosen.scores and found == pytest.approx(dict.fromkeys(chosen.scores, 1.0))


def test_values_by_hand():
    references = sentences(["1", "1", "0", "0"])
    assert official("mrpc", ["1", "0", "0", "0"], references) == pytest.approx({"accuracy": 3 / 4, "f1": 2 / 3})
    assert official("cola", ["1", "0", "0", "0"], references) == pytest.approx({"matthews": 2 / 12**0.5})
    films = sentences(["pos", "neg"])
    assert official("imdb", ["pos", "pos"], films) == pytest.approx(
        {"accuracy": 1 / 2, "precision": 1 / 2, "recall": 1, "f1": 2 / 3}
    )


def test_what_cannot_be_scored():
    with pytest.raises(RefusedInput, match="1 of 2 examples have no label"):
        official("sst2", ["1", "1"], sentences(["1", None]))
    with pytest.raises(RefusedInput, match="no data set of this name"):
        official("sst3", ["1"], sentences(["1"]))
    for references in ([], sentences(["1", "1"])):
        with pytest.raises(ValueError, match="predictions for"):
            official("sst2", ["1"], references)
