import numpy as np
import pytest

from disttrain.data.tokenizer import byte_tokenizer
from disttrain.labelled.examples import Sentences, Tagged
from disttrain.labelled.subwords import encode_sentences, encode_tagged, longest_first, subword_problems, word_tags
from tests.unit.labelled.made import ids, wordpiece, wordpiece_json


@pytest.fixture
def tokenizer(tmp_path):
    return wordpiece(tmp_path)


def test_longest_first_takes_one_token_after_the_other():
    for first in range(9):
        for second in range(9):
            for room in range(2, 18):
                a, b = first, second
                while a + b > room:
                    a, b = (a - 1, b) if a > b else (a, b - 1)
                assert longest_first(first, second, room) == (a, b)


def test_a_sentence_and_a_pair(tokenizer):
    examples = [Sentences("The cat sat", None, "1"), Sentences("unhappily a", "dog ?", "0"), Sentences("", "", "0")]
    one, two, empty = encode_sentences(tokenizer, examples, 16)
    assert one.ids.tolist() == ids("[CLS] the cat sat [SEP]") and one.token_types.tolist() == [0] * 5
    assert two.ids.tolist() == ids("[CLS] [UNK] a [SEP] dog ? [SEP]") and two.token_types.tolist() == [0] * 4 + [1] * 3
    assert empty.ids.tolist() == ids("[CLS] [SEP] [SEP]") and empty.ids.dtype == empty.token_types.dtype == np.int64


def test_cut_to_the_length(tokenizer):
    single, pair = Sentences("a b c d e f", None, None), Sentences("a b c d", "e f", None)
    one, two = encode_sentences(tokenizer, [single, pair], 6)
    assert one.ids.tolist() == ids("[CLS] a b c d [SEP]")
    assert two.ids.tolist() == ids("[CLS] a b [SEP] e [SEP]") and two.token_types.tolist() == [0, 0, 0, 0, 1, 1]


def test_pairs_are_those_of_the_library(tmp_path):
    from tokenizers import Tokenizer, processors

    library = Tokenizer.from_str(wordpiece_json(tmp_path).decode())
    library.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = wordpiece(tmp_path)
    pairs = [("the cat sat on the mat .", "a dog ?"), ("a", "the cat sat on a mat . a b c"), ("a b c d e", "f e d c b")]
    for length in (7, 9, 11, 30):
        library.enable_truncation(length)
        encoded = encode_sentences(tokenizer, [Sentences(*pair, None) for pair in pairs], length)
        for pair, ours in zip(pairs, encoded, strict=True):
            theirs = library.encode(*pair)
            assert (ours.ids.tolist(), ours.token_types.tolist()) == (theirs.ids, theirs.type_ids)


def test_the_form_of_gpt():
    tokenizer = byte_tokenizer()
    end = tokenizer.end_of_text
    one, two = encode_sentences(tokenizer, [Sentences("ab", None, "1"), Sentences("abc", "d", "1")], 5, "gpt")
    assert one.ids.tolist() == [97, 98, end] and two.ids.tolist() == [97, 98, end, 100, end]
    assert two.token_types.tolist() == [0] * 5


TAGS = ("O", "B-X", "I-X")


def test_labels_stand_at_first_subwords(tokenizer):
    sentence = Tagged(("The", "unhappyly", "\u0007", "dog"), ("O", "B-X", "I-X", "B-X"))
    (found,) = encode_tagged(tokenizer, [sentence], TAGS, 16)
    assert found.ids.tolist() == ids("[CLS] the un ##happy ##ly [UNK] dog [SEP]")
    assert found.labels.tolist() == [-100, 0, 1, -100, -100, 2, 1, -100] and found.first.tolist() == [1, 2, 5, 6]
    assert word_tags(np.array([0, 0, 1, 2, 2, 2, 1, 0]), found, TAGS) == ["O", "B-X", "I-X", "B-X"]


def test_words_that_are_cut_off_are_outside(tokenizer):
    sentence = Tagged(("The", "unhappyly", "dog"), ("B-X", "I-X", "B-X"))
    (found,) = encode_tagged(tokenizer, [sentence], TAGS, 5)
    assert found.ids.tolist() == ids("[CLS] the un ##happy [SEP]") and found.first.tolist() == [1, 2, -1]
    assert found.labels.tolist() == [-100, 1, 2, -100, -100]
    assert word_tags(np.array([0, 1, 2, 2, 2]), found, TAGS) == ["B-X", "I-X", "O"]


def test_words_of_a_byte_level_vocabulary_have_their_spaces():
    tokenizer = byte_tokenizer()
    (found,) = encode_tagged(tokenizer, [Tagged(("ab", "c"), ("B-X", "O"))], TAGS, 9, "gpt")
    assert tokenizer.decode(found.ids[:-1]) == "ab c" and found.first.tolist() == [0, 2]
    (untagged,) = encode_tagged(tokenizer, [Tagged(("ab", "c"), ())], TAGS, 9)
    assert set(untagged.labels.tolist()) == {-100} and untagged.ids[0] == tokenizer.cls


def test_what_a_vocabulary_lacks(tokenizer):
    assert subword_problems(tokenizer, "bert", 5, texts=2) == []
    (short,) = subword_problems(tokenizer, "bert", 4, texts=2)
    assert short.fix == "use 5 or more"
    (problem,) = subword_problems(tokenizer, "gpt", 100, texts=1)
    assert problem.message == "the vocabulary has no special token for end_of_text"
