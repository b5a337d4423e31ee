import random
import re

import numpy as np
import pytest

from disttrain.data import open_data, prepare
from disttrain.data.encode import sentences


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Documents whose sentences say their place: "d012s034 aaa bbb." in document 12 is sentence 34."""
    rng = random.Random(5)
    documents = []
    for d in range(80):
        documents.append(
            " ".join(f"D{d:03d}s{s:03d} " + "ab" * rng.randint(1, 12) + "." for s in range(rng.randint(5, 60)))
        )
    path = tmp_path_factory.mktemp("bert") / "text.txt"
    path.write_text("\n".join(documents))
    return path


@pytest.fixture
def opened(config, corpus):
    def build(**settings):
        resolved = config("bert", corpus="text", path=str(corpus), document="line",
                          **{"sequence_length": 128, **settings})  # fmt: skip
        return open_data(resolved, prepare(resolved))

    return build


def restored(batch):
    return np.where(batch["targets"] == -100, batch["tokens"], batch["targets"])


def test_sentences_end_at_punctuation_and_line_ends():
    text = 'One is here. "Two!" said he (loudly?) Three\nfour 3.14 five...  Six'
    assert sentences(text) == ["One is here.", '"Two!"', "said he (loudly?)", "Three", "four 3.14 five...", "Six"]


def test_layout_of_a_sequence(opened):
    data = opened()
    batch = data.train_batch(0, 400)
    tokenizer, tokens = data.tokenizer, restored(batch)
    assert {k: (v.dtype.name, v.shape) for k, v in batch.items()} == {
        "tokens": ("int64", (400, 128)), "targets": ("int64", (400, 128)), "token_types": ("int64", (400, 128)),
        "attention_mask": ("bool", (400, 128)), "next_sentence": ("int64", (400,)),
            "samples": ("int64", (400,)),
    }  # fmt: skip
    for row, types, mask in zip(tokens, batch["token_types"], batch["attention_mask"], strict=True):
        used = int(mask.sum())
        assert mask[:used].all() and (row[used:] == tokenizer.pad).all() and (types[used:] == 0).all()
        first, last = np.flatnonzero(row == tokenizer.sep)
        assert row[0] == tokenizer.cls and (row == tokenizer.cls).sum() == 1
        assert last == used - 1 and 2 <= first < last - 1
        assert (types[: first + 1] == 0).all() and (types[first + 1 : used] == 1).all()
    special = np.isin(tokens, [tokenizer.cls, tokenizer.sep, tokenizer.pad])
    assert (batch["targets"][special] == -100).all()


def test_masking_is_fifteen_percent_split_80_10_10(opened):
    data = opened(short_sequence_probability=0.0)
    batch = data.train_batch(0, 3000)
    chosen = batch["targets"] != -100
    ordinary = batch["attention_mask"].sum(axis=1) - 3
    assert np.array_equal(chosen.sum(axis=1), np.maximum(1, np.round(ordinary * 0.15)))
    masked = batch["tokens"][chosen] == data.tokenizer.mask
    kept = batch["tokens"][chosen] == batch["targets"][chosen]
    total = chosen.sum()
    bound = 4 * np.sqrt(0.8 * 0.2 / total)
    assert masked.mean() == pytest.approx(0.8, abs=bound)
    # a random token is the right one by chance once in 256
    assert kept.mean() == pytest.approx(0.1 + 0.1 / 256, abs=bound)
    others = batch["tokens"][chosen][~masked & ~kept]
    assert others.max() < 256 and len(np.unique(others)) > 200, "random tokens come from the whole ordinary vocabulary"
    places = np.flatnonzero(chosen.any(axis=0))
    assert places.min() == 1 and places.max() >= 125


def test_masks_change_with_the_epoch_and_the_probability_is_honoured(opened):
    data = opened(mlm_probability=0.4)
    chosen = data.train_batch(0, 500)["targets"] != -100
    assert chosen.sum() / data.train_batch(0, 500)["attention_mask"].sum() == pytest.approx(0.4, abs=0.02)
    n = data.train_sequences
    first, second = data.train_batch(0, n), data.train_batch(n, n)
    assert not np.array_equal(first["targets"], second["targets"])


def places(text):
    """(document, sentence) of each sentence start that is whole in a text."""
    return [(int(d), int(s)) for d, s in re.findall(r"D(\d{3})s(\d{3})", text)]


def test_b_follows_a_or_is_from_another_document(opened):
    data = opened()
    batch = data.train_batch(0, 4000)
    tokens, label = restored(batch), batch["next_sentence"]
    assert label.mean() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(4000))
    checked = {0: 0, 1: 0}
    for row, types, mask, value in zip(tokens, batch["token_types"], batch["attention_mask"], label, strict=True):
        used = int(mask.sum())
        a = places(data.tokenizer.decode(row[1:used][types[1:used] == 0]))
        b = places(data.tokenizer.decode(row[1:used][types[1:used] == 1]))
        if a and b:
            checked[int(value)] += 1
            assert (a[-1][0] == b[0][0]) == (value == 0)
            # truncation may take sentences off the front of B or the back of A, never change their order
            assert value == 1 or b[0][1] > a[-1][1]
            assert [s for _, s in a] == list(range(a[0][1], a[0][1] + len(a)))
    assert min(checked.values()) > 1000


def test_segments_that_fit_follow_one_another_exactly(opened):
    """In short documents nothing is truncated: B starts with the very next sentence."""
    data = opened(sequence_length=2000, short_sequence_probability=0.0)
    batch = data.train_batch(0, 300)
    seen = 0
    for row, types, mask, value in zip(restored(batch), batch["token_types"], batch["attention_mask"],
                                       batch["next_sentence"], strict=True):  # fmt: skip
        used = int(mask.sum())
        if value == 0 and used < 1990:
            a = places(data.tokenizer.decode(row[1:used][types[1:used] == 0]))
            b = places(data.tokenizer.decode(row[1:used][types[1:used] == 1]))
            assert (b[0][0], b[0][1]) == (a[-1][0], a[-1][1] + 1)
            seen += 1
    assert seen > 50


def test_short_sequences(opened):
    lengths = [
        opened(short_sequence_probability=p).train_batch(0, 1000)["attention_mask"].sum(axis=1) for p in (0.0, 0.9)
    ]
    assert lengths[1].mean() < 0.85 * lengths[0].mean()
    assert np.median(lengths[0]) == 128


def test_an_epoch_meets_nearly_all_text(opened, corpus):
    """Half of the segments B are replaced, and seams cut sentences: in one epoch two thirds of the sentences start."""
    data = opened(short_sequence_probability=0.0)
    batch = data.train_batch(0, data.train_sequences)
    held = data.held_out_batch(0, data.held_out_sequences)
    trained, held_out = ({place for row in restored(b) for place in places(data.tokenizer.decode(row[row < 256]))}
                         for b in (batch, held))  # fmt: skip
    assert held_out and not trained & held_out
    assert {d for d, _ in trained | held_out} == set(range(80))
    whole = len(places(corpus.read_text()))
    assert len(trained | held_out) > 0.6 * whole


@pytest.mark.parametrize("text", ["Only one sentence here, all alone in its document and rather long\n" * 250,
                                  "x" * 9000 + "\n"])  # fmt: skip
def test_documents_of_one_sentence_still_give_both_labels(config, tmp_path, text):
    (tmp_path / "one.txt").write_text(text)
    settings = config("bert", corpus="text", path=str(tmp_path / "one.txt"), document="line", sequence_length=32)
    data = open_data(settings, prepare(settings))
    labels = data.train_batch(0, 200)["next_sentence"]
    assert 0.3 < labels.mean() < 0.7


def test_one_document_alone_gives_both_labels(config, tmp_path):
    (tmp_path / "one.txt").write_text(". ".join(f"sentence {i}" for i in range(2000)))
    settings = config("bert", corpus="text", path=str(tmp_path / "one.txt"), sequence_length=64, tokenizer="wordpiece",
                      tokenizer_vocab_size=300)  # fmt: skip
    data = open_data(settings, prepare(settings))
    assert 0.3 < data.train_batch(0, 200)["next_sentence"].mean() < 0.7
