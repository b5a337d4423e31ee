import json

import numpy as np
import pytest

from disttrain.data import open_data, prepare
from disttrain.data.shards import TokenSet, read_index
from tests.unit.data.conftest import make_text

END = 256


def tokens_of(folders, split):
    return np.concatenate([(s := TokenSet(read_index(f), split)).read(0, s.tokens) for f, _ in folders])


def whole_step(data, step, ranks):
    """The global batch of a step, put together from what each rank gets."""
    parts = [list(data.micro_batches(step, rank, ranks)) for rank in range(ranks)]
    micro = [parts[rank][m] for m in range(len(parts[0])) for rank in range(ranks)]
    return {key: np.concatenate([part[key] for part in micro]) for key in micro[0]}


@pytest.mark.parametrize("family", ["gpt", "bert"])
@pytest.mark.parametrize("micro", [None, 2, 1])
def test_any_number_of_ranks_sees_the_same_global_batch(config, text_file, family, micro):
    settings = config(
        family, micro=micro, corpus="text", path=str(text_file), document="blank_line", sequence_length=32
    )
    prepared = prepare(settings)
    reference = open_data(settings, prepared)
    for step in (0, 7, 1):
        expected = reference.train_batch(step * 12, 12)
        for ranks in (1, 2, 3, 4, 6):
            if micro and 12 % (micro * ranks):
                with pytest.raises(ValueError, match="cannot be split"):
                    list(reference.micro_batches(step, 0, ranks))
                continue
            data = open_data(settings, prepared)  # fresh: nothing may depend on earlier calls
            batch = whole_step(data, step, ranks)
            assert batch.keys() == expected.keys()
            for key in batch:
                assert batch[key].dtype == expected[key].dtype
                assert np.array_equal(batch[key], expected[key])


@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_batches_depend_on_the_seed_alone(config, text_file, family):
    def first(seed):
        settings = config(family, seed=seed, corpus="text", path=str(text_file), sequence_length=32)
        data = open_data(settings, prepare(settings))
        return data.train_batch(0, 12), data.held_out_batch(0, 12)

    (train_1, held_1), (again, _), (train_2, held_2) = first(1), first(1), first(2)
    for key in train_1:
        assert np.array_equal(train_1[key], again[key])
    assert train_1["samples"].tolist() == list(range(12))
    for key in held_1:
        assert np.array_equal(held_1[key], held_2[key]), "evaluation must not depend on the seed"
    assert not np.array_equal(train_1["tokens"], train_2["tokens"])


def test_gpt_sequences_are_slices_of_the_plain_concatenation(config, tmp_path):
    """Naive packing: every file's bytes, end of text after each, cut every 32 tokens."""
    (tmp_path / "corpus").mkdir()
    for number, size in enumerate([900, 40_000, 10, 7000]):
        (tmp_path / "corpus" / f"{number}.txt").write_text(make_text(size, number))
    (tmp_path / "held.md").write_text(make_text(3000, 99))
    settings = config(corpus="text", path=str(tmp_path / "corpus"), held_out_path=str(tmp_path / "held.md"),
                      sequence_length=32)  # fmt: skip
    data = open_data(settings, prepare(settings))
    naive = b"".join(f.read_bytes() + b"\xff" for f in sorted((tmp_path / "corpus").iterdir()))
    naive = np.frombuffer(naive, np.uint8).astype(np.int64)
    naive[naive == 255] = END  # 255 is no byte of UTF-8
    count = (len(naive) - 1) // 32
    assert data.train_sequences == count
    batch = data.train_batch(0, count)
    order = np.lexsort(batch["tokens"].T)
    expected = naive[: count * 32].reshape(count, 32)
    following = naive[1 : count * 32 + 1].reshape(count, 32)
    assert np.array_equal(batch["tokens"][order], expected[np.lexsort(expected.T)])
    for row, target in zip(batch["tokens"][:50], batch["targets"][:50], strict=True):
        place = np.flatnonzero((expected == row).all(axis=1))
        assert any(np.array_equal(following[p], target) for p in place)
    held = np.frombuffer((tmp_path / "held.md").read_bytes(), np.uint8)
    assert data.held_out_sequences == len(held) // 32


def test_an_epoch_has_every_sequence_once_and_the_next_another_order(config, text_file):
    settings = config(corpus="text", path=str(text_file), sequence_length=64)
    data = open_data(settings, prepare(settings))
    n = data.train_sequences
    first, second = (data.train_batch(epoch * n, n)["tokens"] for epoch in (0, 1))
    assert not np.array_equal(first, second)
    assert np.array_equal(first[np.lexsort(first.T)], second[np.lexsort(second.T)])
    assert len(np.unique(first, axis=0)) == n


def test_a_batch_may_span_epochs_and_any_count(config, text_file):
    settings = config(corpus="text", path=str(text_file), sequence_length=64)
    data = open_data(settings, prepare(settings))
    n = data.train_sequences
    whole = data.train_batch(n - 3, 7)["tokens"]
    assert np.array_equal(whole, np.concatenate([data.train_batch(n - 3 + i, 1)["tokens"] for i in range(7)]))


def test_held_out_is_disjoint_from_training_near_the_fraction_and_complete(config, tmp_path):
    """Each line of the text is unique, so a line is on one side only, and every byte is somewhere."""
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"line {number:06d} of the text\n" for number in range(20_000)))
    for document, fraction in (("file", 0.05), ("line", 0.05), ("file", 0.2)):
        settings = config(corpus="text", path=str(path), document=document, held_out_fraction=fraction)
        prepared = prepare(settings)
        sides = [bytes(t[t < 256].astype(np.uint8)) for t in (tokens_of(prepared.train, "train"),
                                                             tokens_of(prepared.held_out, "held_out"))]  # fmt: skip
        numbers = [{side[i + 5 : i + 11] for i in range(len(side)) if side.startswith(b"line ", i)} for side in sides]
        assert not numbers[0] & numbers[1]
        assert len(numbers[0]) + len(numbers[1]) == 20_000
        assert len(numbers[1]) / 20_000 == pytest.approx(fraction, rel=0.15)


def test_no_training_sequence_continues_over_text_that_was_taken_out(config, tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"{number:05d}\n" for number in range(20_000)))
    prepared = prepare(config(corpus="text", path=str(path)))
    for split in ("train", "held_out"):
        text = "".join("E" if t == END else chr(t) for t in tokens_of(prepared.train, split))
        runs = [[int(line) for line in run.split()] for run in text.split("E") if run]
        assert len(runs) >= 3
        assert all(run == list(range(run[0], run[-1] + 1)) for run in runs)


def test_blend_has_the_shares_it_was_given(config, tmp_path):
    for name, letter in (("a", "a"), ("b", "b"), ("c", "c")):
        (tmp_path / f"{name}.txt").write_text((letter * 31 + "\n") * 900)
    blend = [{"corpus": "text", "path": str(tmp_path / f"{n}.txt"), "weight": w} for n, w in
             (("a", 6.0), ("b", 3.0), ("c", 1.0))]  # fmt: skip
    settings = config(blend=blend, sequence_length=16)
    data = open_data(settings, prepare(settings))

    def shares(batch):
        return [float(np.mean((batch["tokens"] == ord(letter)).any(axis=1))) for letter in "abc"]

    assert shares(data.train_batch(0, 1000)) == [0.6, 0.3, 0.1]
    assert shares(data.train_batch(123_000, 2000)) == [0.6, 0.3, 0.1]
    held = data.held_out_batch(0, data.held_out_sequences)
    assert shares(held) == pytest.approx([0.6, 0.3, 0.1], abs=0.01)
    assert data.held_out_sequences > 80
    with pytest.raises(IndexError):
        data.held_out_batch(data.held_out_sequences, 1)


def test_blend_with_own_held_out_files_trains_on_everything(config, tmp_path, text_file):
    (tmp_path / "held.txt").write_text("z" * 5000)
    settings = config(blend=[{"corpus": "text", "path": str(text_file), "weight": 1.0},
                             {"corpus": "text", "path": [str(text_file)], "weight": 2.0}],
                      held_out_path=str(tmp_path / "held.txt"))  # fmt: skip
    data = open_data(settings, prepare(settings))
    assert data.train_sequences == 2 * (text_file.stat().st_size // 128)
    assert (data.held_out_batch(0, data.held_out_sequences)["tokens"] == ord("z")).all()


def test_tokens_are_read_across_shards(config, tmp_path, monkeypatch):
    monkeypatch.setattr("disttrain.data.items.ITEM_BYTES", 5000)
    path = tmp_path / "text.jsonl"
    texts = [make_text(700, seed) for seed in range(60)]
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    (tmp_path / "held.jsonl").write_text(json.dumps({"body": "x" * 1000}))
    settings = config(corpus="text", path=str(path), document="jsonl", text_field="body", tokenizer="bpe",
                      tokenizer_vocab_size=400, held_out_path=str(tmp_path / "held.jsonl"), sequence_length=500)  # fmt: skip
    prepared = prepare(settings)
    assert len(read_index(prepared.train[0][0]).shards) > 5
    data = open_data(settings, prepared)
    end = data.tokenizer.end_of_text
    expected = np.concatenate([[*data.tokenizer.encode(text), end] for text in texts])
    assert np.array_equal(tokens_of(prepared.train, "train"), expected)
    rows = data.train_batch(0, data.train_sequences)["tokens"]
    expected = expected[: rows.size].reshape(rows.shape)
    assert np.array_equal(rows[np.lexsort(rows.T)], expected[np.lexsort(expected.T)])
