import json

import numpy as np
import pytest

from disttrain.config.problems import RefusedInput
from disttrain.labelled.words import (
    Vocabulary,
    build_vocabulary,
    encode_characters,
    load_vocabulary,
    padded,
    read_vectors,
    save_vocabulary,
)

TEXTS = [["b", "a", "b"], ["c", "a", "d", "UNK"]]


def test_most_frequent_first_then_by_code_point():
    assert build_vocabulary(TEXTS).words == ("PAD", "UNK", "a", "b", "c", "d")
    assert build_vocabulary(reversed(TEXTS)) == build_vocabulary(TEXTS)
    assert build_vocabulary(TEXTS, min_count=2).words == ("PAD", "UNK", "a", "b")
    assert build_vocabulary(TEXTS, max_size=3).words == ("PAD", "UNK", "a")
    assert build_vocabulary([]).words == ("PAD", "UNK")


def test_ids_of_words_and_characters():
    vocabulary = build_vocabulary(TEXTS)
    found = vocabulary.encode(["d", "UNK", "never seen", "a"])
    assert found.tolist() == [5, 1, 1, 2] and found.dtype == np.int64 and len(vocabulary) == 6
    characters = build_vocabulary(["hello", "l"])
    assert characters.words[2:] == ("l", "e", "h", "o")
    assert encode_characters(["hole", "", "lx"], characters, 3).tolist() == [[4, 5, 2], [0, 0, 0], [2, 1, 0]]
    assert padded([np.array([1, 2, 3]), np.array([4])], longest=2).tolist() == [[1, 2], [4, 0]]
    assert padded([], 4).shape == (0, 0)


def test_saved_and_loaded(tmp_path):
    vocabulary = Vocabulary(("PAD", "UNK", "é", '"', "\u2028"))
    save_vocabulary(tmp_path / "words.json", vocabulary)
    assert load_vocabulary(tmp_path / "words.json") == vocabulary
    assert json.loads((tmp_path / "words.json").read_text())["words"][2] == "é"
    for wrong in ("{}", "[1", '{"words": ["UNK", "PAD"]}', '{"words": ["PAD", "UNK", "a", "a"]}'):
        (tmp_path / "wrong.json").write_text(wrong)
        with pytest.raises(RefusedInput, match="is not a vocabulary"):
            load_vocabulary(tmp_path / "wrong.json")
    with pytest.raises(RefusedInput, match="cannot be read"):
        load_vocabulary(tmp_path / "none.json")


@pytest.mark.parametrize("header", ["", "4 3\n"])
def test_vectors_of_a_file(tmp_path, header):
    path = tmp_path / "vectors.txt"
    path.write_text(header + "cat 1 2 3\nat a . 4 5 6\nPAD 7 7 7\nb 1e-1 0 -1 \n", encoding="utf-8")
    vocabulary = Vocabulary(("PAD", "UNK", "Cat", "at a .", "b", "unheard"))
    vectors = read_vectors(path, vocabulary, seed=3)
    assert vectors.matrix.shape == (6, 3) and vectors.matrix.dtype == np.float32 and vectors.found == 3
    assert vectors.matrix[[0, 2, 3, 4]].tolist() == np.float32([[0, 0, 0], [1, 2, 3], [4, 5, 6], [0.1, 0, -1]]).tolist()
    assert (np.abs(vectors.matrix[[1, 5]]) <= 0.25).all() and vectors.matrix[5].any()
    assert np.array_equal(read_vectors(path, vocabulary, seed=3).matrix, vectors.matrix)


def test_wrong_vectors_have_their_line(tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_text("a 1 2\nb 1\nc x 2\n")
    with pytest.raises(RefusedInput) as refused:
        read_vectors(path, Vocabulary(("PAD", "UNK", "c")), seed=0)
    assert [problem.settings[0] for problem in refused.value.problems] == [f"{path}:2", f"{path}:3"]
    path.write_text("2 3\n")
    with pytest.raises(RefusedInput, match="no vectors"):
        read_vectors(path, Vocabulary(("PAD", "UNK")), seed=0)
