"""What is read from a text: the vocabulary, the numbers, the lines; and what is refused."""

from pathlib import Path

import pytest

from disttrain.config.problems import RefusedInput
from disttrain.vectors.schema import load_vectors
from tests.unit.vectors.made import config_of, corpus_of

TEXT = "b a a <unk> c\n\n a B rare b\nd c\n"


def test_vocabulary_and_numbers(tmp_path: Path) -> None:
    _, corpus = corpus_of(tmp_path, TEXT, min_count=2, unknown="<unk>")
    assert corpus.words == ("a", "b", "c")
    assert corpus.counts.tolist() == [3, 2, 2]
    assert [corpus.words[number] for number in corpus.tokens] == ["b", "a", "a", "c", "a", "b", "c"]
    assert corpus.lines.tolist() == [0, 0, 0, 0, 2, 2, 3]
    assert corpus.read == 11


def test_lower_case_joins_words(tmp_path: Path) -> None:
    _, corpus = corpus_of(tmp_path, TEXT, min_count=3, lowercase=True)
    assert corpus.words == ("a", "b")
    assert corpus.counts.tolist() == [3, 3]


def test_several_files_go_on_in_order(tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("z z\n")
    config = config_of(tmp_path, "y y")
    both = config.model_copy(update={"path": [str(tmp_path / "text.txt"), str(tmp_path / "more.txt")]})
    from disttrain.vectors.corpus import read_corpus

    corpus = read_corpus(both)
    assert [corpus.words[number] for number in corpus.tokens] == ["y", "y", "z", "z"]
    assert corpus.lines.tolist() == [0, 0, 1, 1]


def test_what_is_refused(tmp_path: Path) -> None:
    from disttrain.vectors.corpus import read_corpus

    with pytest.raises(RefusedInput, match="1 of the 7 different words"):
        corpus_of(tmp_path, TEXT, min_count=3)
    with pytest.raises(RefusedInput, match="does not exist"):
        read_corpus(config_of(tmp_path, TEXT).model_copy(update={"path": str(tmp_path / "nothing.txt")}))


@pytest.mark.parametrize(
    ("words", "settings", "fix"),
    [
        (["windw=3"], "windw", "did you mean 'window'?"),
        (["size=0"], "size=0", "greater than 0"),
        (["lr"], "lr", "for example lr=0.05"),
        (["x_max=10"], "x_max=10.0", "use method=glove"),
        (["method=glove", "negatives=7"], "negatives=7", "use method=skipgram or method=cbow"),
        (["method=glove", "subsample=0.0"], "subsample=0.0", "use method=skipgram or method=cbow"),
        (["objective=hierarchical_softmax", "negatives=7"], "negatives=7", "use objective=negative_sampling"),
        (["method=[}"], "method=[}", "quote it"),
    ],
)
def test_wrong_settings(tmp_path: Path, words: list[str], settings: str, fix: str) -> None:
    path = tmp_path / "words.yaml"
    path.write_text("path: text.txt\n")
    with pytest.raises(RefusedInput) as refused:
        load_vectors(path, words)
    (problem,) = refused.value.problems
    assert problem.settings[0] == settings
    assert fix in problem.fix


def test_every_problem_at_once_and_the_name_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "words.yaml"
    path.write_text("path: text.txt\nsize: 5\n")
    assert load_vectors(path, ["size=7"]).name == "words"
    assert load_vectors(path, ["size=7"]).size == 7
    with pytest.raises(RefusedInput) as refused:
        load_vectors(path, ["size=x", "widow=3", "nothing"])
    assert len(refused.value.problems) == 3
