import numpy as np
import pytest

from disttrain.data.tokenizer import byte_tokenizer, load_tokenizer_json
from disttrain.data.vocabulary import train
from disttrain.labelled.windows import window_problems, windows_of
from tests.unit.labelled.made import ids, question, wordpiece, wordpiece_json

CONTEXT = "The cat  sat on the mat. A dog, unhappyly, b c d e f."


@pytest.fixture
def tokenizer(tmp_path):
    return wordpiece(tmp_path)


def test_one_window_that_holds_all(tokenizer):
    (window,) = windows_of(tokenizer, [question("A  cat sat.", "cat sat")], 20, 5)
    assert window.ids.tolist() == ids("[CLS] who ? [SEP] a cat sat . [SEP]")
    assert window.token_types.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert (window.start, window.end, window.question) == (5, 6, 0)
    assert window.offsets.tolist() == [[-1, -1]] * 4 + [[0, 1], [3, 6], [7, 10], [10, 11], [-1, -1]]


def test_windows_by_hand(tokenizer):
    found = windows_of(tokenizer, [question("a b c d e f", "d e")], 8, 2)  # room for three tokens
    texts = [ids(f"[CLS] who ? [SEP] {part} [SEP]") for part in ("a b c", "c d e", "e f")]
    assert [window.ids.tolist() for window in found] == texts
    assert [(window.start, window.end) for window in found] == [(0, 0), (5, 6), (0, 0)]


@pytest.mark.parametrize(("length", "overlap"), [(12, 0), (12, 3), (16, 5), (64, 8)])
def test_windows_are_those_of_the_library(tmp_path, length, overlap):
    from tokenizers import Tokenizer, processors

    library = Tokenizer.from_str(wordpiece_json(tmp_path).decode())
    library.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    library.enable_truncation(length, stride=overlap, strategy="only_second")
    first = library.encode("who ?", CONTEXT)
    theirs = [first, *first.overflowing]
    ours = windows_of(wordpiece(tmp_path), [question(CONTEXT)], length, stride=length - 5 - overlap)
    assert [window.ids.tolist() for window in ours] == [window.ids for window in theirs]
    assert [window.token_types.tolist() for window in ours] == [window.type_ids for window in theirs]
    for window, one in zip(ours, theirs, strict=True):
        inside = [list(pair) if place == 1 else [-1, -1]
                  for pair, place in zip(one.offsets, one.sequence_ids, strict=True)]  # fmt: skip
        assert window.offsets.tolist() == inside


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "bytes"])
def test_every_answer_is_found_again(tmp_path, kind):
    context = "Übrigens  sah Ann\u00a0Müller 中文 und 😀 den Hund\nim   Park."
    made = (
        byte_tokenizer() if kind == "bytes" else load_tokenizer_json(train(kind, [context * 3], 300, False), "trained")
    )
    words = context.split()
    answers = [context[context.index(a) : context.index(b) + len(b)] for i, a in enumerate(words) for b in words[i:]]
    questions = [question(context, answer, asked="wer?") for answer in answers]
    held = set()
    for window in windows_of(made, questions, 90, 10, max_question=4):
        if window.end:
            begin, stop = int(window.offsets[window.start, 0]), int(window.offsets[window.end, 1])
            assert context[begin:stop] == answers[window.question]
            held.add(window.question)
    assert len(held) == len(answers) or kind == "bytes"
    assert len(held) > len(answers) // 2


def test_long_questions_empty_contexts_and_no_answers(tokenizer):
    (cut,) = windows_of(tokenizer, [question("cat", asked="a b c d")], 20, 5, max_question=2)
    assert cut.ids.tolist() == ids("[CLS] a b [SEP] cat [SEP]") and (cut.start, cut.end) == (0, 0)
    (empty,) = windows_of(tokenizer, [question("")], 20, 5)
    assert empty.ids.tolist() == ids("[CLS] who ? [SEP] [SEP]") and (empty.offsets == -1).all()


def test_lengths_and_strides_that_skip_tokens(tokenizer):
    assert window_problems(tokenizer, 384, 128, 64) == []
    assert [p.fix for p in window_problems(tokenizer, 66, 1, 64)] == ["use max_length=68 or more"]
    assert [p.fix for p in window_problems(tokenizer, 77, 11, 64)] == ["use a stride from 1 to 10"]


def test_offsets_belong_to_the_ids(tmp_path):
    text = "naïve  中文 😀 end\n"
    for made in (
        wordpiece(tmp_path),
        byte_tokenizer(),
        load_tokenizer_json(train("bpe", [text * 3], 300, False), "bpe"),
    ):
        ((found, offsets),) = made.encode_offsets([text])
        assert np.array_equal(found, made.encode(text)) and offsets.shape == (len(found), 2)
        assert offsets.dtype == np.int64 and (offsets[:, 0] < offsets[:, 1]).all() and offsets.max() <= len(text)
    assert byte_tokenizer().encode_offsets([""])[0][1].shape == (0, 2)
