import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest

from disttrain.config.problems import RefusedInput
from disttrain.data import open_data, prepare, prepare_folder, verify
from disttrain.data.shards import read_index
from disttrain.data.workers import run_calls
from tests.unit.data.conftest import make_text

SLOW = """
import json, sys, time
from disttrain.config.schema import Config
from disttrain.data import encode, items, prepare, workers
items.ITEM_BYTES = 20_000
config = Config.model_validate_json(sys.argv[1])
prepare(config, lambda done, total, what: (print(what, done, total, flush=True), time.sleep(0.15)))
"""


def digest(folder):
    """Names and contents of what a preparation leaves, without the lock."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.name != ".lock"}


def start(config):
    return subprocess.Popen([sys.executable, "-c", SLOW, config.model_dump_json()], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "corpus").mkdir()
    for number in range(6):
        (tmp_path / "corpus" / f"{number}.txt").write_text(make_text(60_000, number))
    return str(tmp_path / "corpus")


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_and_repeated_equals_undisturbed(config, corpus, tmp_path, monkeypatch, how):
    settings = config(corpus="text", path=corpus, workers=2, cache_dir=str(tmp_path / "broken"))
    process = start(settings)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(4)]
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 2 and lines[-1].startswith("tokenizing")
    process.send_signal(how)
    process.communicate()
    wait_for(lambda: not any(c.is_running() and c.status() != psutil.STATUS_ZOMBIE for c in children))
    (folder,) = (tmp_path / "broken" / "tokens").iterdir()
    assert not (folder / "index.json").exists()
    done = sorted(folder.glob("shard_*.json"))
    assert 0 < len(done) < 18
    before = {path: path.stat().st_mtime_ns for path in done}
    (folder / "shard_00077.bin.123.tmp").write_bytes(b"half")
    monkeypatch.setattr("disttrain.data.items.ITEM_BYTES", 20_000)
    prepare(settings)
    assert {path: path.stat().st_mtime_ns for path in done} == before, "complete shards are not made again"
    undisturbed = prepare(config(corpus="text", path=corpus, workers=2, cache_dir=str(tmp_path / "whole")))
    assert digest(folder) == digest(undisturbed.train[0][0])


@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_one_and_two_workers_give_the_same_files(config, corpus, tmp_path, monkeypatch, family):
    monkeypatch.setattr("disttrain.data.items.ITEM_BYTES", 50_000)
    folders = [prepare(config(family, corpus="text", path=corpus, tokenizer="bpe", tokenizer_vocab_size=500,
                              workers=workers, cache_dir=str(tmp_path / str(workers)))).train[0][0]
               for workers in (1, 2)]  # fmt: skip
    assert digest(folders[0]) == digest(folders[1])
    assert len(read_index(folders[0]).shards) >= 6


def test_a_second_call_finds_everything_and_changes_nothing(config, corpus, monkeypatch):
    settings = config(corpus="text", path=corpus)
    first = prepare(settings)
    before = {p: p.stat().st_mtime_ns for p in first.train[0][0].iterdir()}
    monkeypatch.setattr("disttrain.data.preparation.encode_item", None)  # calling it would raise
    assert prepare(settings) == first
    assert {p: p.stat().st_mtime_ns for p in first.train[0][0].iterdir()} == before


@pytest.mark.parametrize("change", ["text", "held_out_fraction", "tokenizer", "family", "document", "max_bytes"])
def test_whatever_determines_the_tokens_gives_another_folder(config, text_file, change):
    first = prepare(config(corpus="text", path=str(text_file)))
    data = {"corpus": "text", "path": str(text_file)}
    if change == "text":
        text_file.write_text(make_text(60_000, seed=3))
    elif change != "family":
        data[change] = {"held_out_fraction": 0.1, "tokenizer": "bpe", "document": "line", "max_bytes": 50_000}[change]
    second = prepare(config("bert" if change == "family" else "gpt", **data))
    assert first.train[0][0] != second.train[0][0]


def test_two_processes_at_once_make_one_good_folder(config, corpus, tmp_path):
    settings = config(corpus="text", path=corpus, workers=1)
    processes = [start(settings), start(settings)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    said = [out for out, _ in outputs]
    assert sorted("tokenizing" in out for out in said) == [False, True], "one prepares, the other waits"
    assert any("waiting for another process" in out for out in said)
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    assert verify(folder) == []


def test_a_damaged_cache_is_mended(config, corpus, monkeypatch):
    monkeypatch.setattr("disttrain.data.items.ITEM_BYTES", 50_000)
    settings = config(corpus="text", path=corpus)
    folder = prepare(settings).train[0][0]
    good = digest(folder)
    (folder / "shard_00001.bin").unlink()
    with open(folder / "shard_00002.bin", "ab") as file:
        file.write(b"more")
    prepare(settings)
    assert digest(folder) == good


def test_progress_is_reported_up_to_the_whole(config, corpus, monkeypatch):
    monkeypatch.setattr("disttrain.data.items.ITEM_BYTES", 50_000)
    seen = []
    prepare(config(corpus="text", path=corpus, workers=2), lambda *report: seen.append(report))
    done = [d for d, total, what in seen if what == "tokenizing"]
    assert done == sorted(done) and len(done) > 3
    assert seen[-1][0] == seen[-1][1] == sum(os.path.getsize(os.path.join(corpus, f)) for f in os.listdir(corpus))


def test_a_chosen_folder_serves_as_tokens(config, corpus, tmp_path):
    direct = config(corpus="text", path=corpus, tokenizer="bpe", tokenizer_vocab_size=500)
    out = prepare_folder(direct, tmp_path / "out")
    assert (out / "tokenizer.json").exists() and verify(out) == []
    again = config(corpus="tokens", path=str(out))
    one, two = open_data(direct, prepare(direct)), open_data(again, prepare(again))
    assert one.vocab_size == two.vocab_size == 500
    for first, second in ((one.train_batch(0, 50), two.train_batch(0, 50)),
                          (one.held_out_batch(0, 5), two.held_out_batch(0, 5))):  # fmt: skip
        assert np.array_equal(first["tokens"], second["tokens"])
    # tokens blend with a text, which then takes their tokenizer
    blend = config(blend=[{"corpus": "tokens", "path": str(out), "weight": 1.0},
                          {"corpus": "text", "path": corpus, "weight": 1.0}])  # fmt: skip
    data = open_data(blend, prepare(blend))
    assert data.train_sequences == 2 * one.train_sequences and data.vocab_size == 500


def test_a_chosen_folder_is_not_overwritten(config, corpus, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(RefusedInput, match=r"thesis\.tex"):
        prepare_folder(config(corpus="text", path=corpus), tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]
    # another preparation of the same folder replaces the first, leaving none of its shards
    prepare_folder(config(corpus="text", path=corpus), tmp_path / "out")
    prepare_folder(config(corpus="text", path=corpus, max_bytes=100_000, tokenizer="bpe"), tmp_path / "out")
    assert verify(tmp_path / "out") == []
    assert {p.name for p in (tmp_path / "out").glob("shard_*.bin")} == {
        s["file"] for s in read_index(tmp_path / "out").shards
    }


def test_changed_content_is_found_on_first_use_and_by_verify(config, corpus, tmp_path):
    out = prepare_folder(config(corpus="text", path=corpus), tmp_path / "out")
    shard = out / "shard_00000.bin"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(RefusedInput, match="checksum"):
        prepare(config(corpus="tokens", path=str(out)))
    (problem,) = verify(out)
    assert "checksum" in problem.message and "shard_00000.bin" in problem.settings[0]


def test_checksums_are_read_once(config, corpus, tmp_path, monkeypatch):
    out = prepare_folder(config(corpus="text", path=corpus), tmp_path / "out")
    settings = config(corpus="tokens", path=str(out))
    seen = []
    prepare(settings, lambda *report: seen.append(report[2]))
    prepare(settings, lambda *report: seen.append(report[2]))
    assert seen == [f"verifying {out}"]


@pytest.mark.parametrize("name, content, problem", [
    ("bad.txt", b"good text\n" * 900 + b"\xff\xfe", "not UTF-8 text .byte 9,000."),
    ("bad.jsonl", b'{"text": "good"}\n' * 500 + b'{"text": \n', "not JSON"),
    ("bad.jsonl", b'{"text": "good"}\n{"body": "x"}\n', "no text under this key"),
])  # fmt: skip
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_bad_text_is_refused_with_its_place(config, tmp_path, name, content, problem, tokenizer):
    (tmp_path / name).write_bytes(content)
    document = "jsonl" if name.endswith("jsonl") else "file"
    with pytest.raises(RefusedInput, match=problem) as caught:
        prepare(config(corpus="text", path=str(tmp_path / name), document=document, tokenizer=tokenizer, workers=2))
    assert name in str(caught.value)


def test_too_little_text_is_refused(config, tmp_path):
    (tmp_path / "short.txt").write_text("short\n" * 100)
    with pytest.raises(RefusedInput, match="held-out text is too short"):
        prepare(config(corpus="text", path=str(tmp_path / "short.txt"), sequence_length=256))


def test_a_byte_order_mark_is_no_text(config, tmp_path):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + make_text(20_000).encode())
    prepared = prepare(config(corpus="text", path=str(tmp_path / "bom.txt")))
    settings = config(corpus="text", path=str(tmp_path / "bom.txt"))
    data = open_data(settings, prepared)
    assert not (data.train_batch(0, data.train_sequences)["tokens"] == 0xEF).any()


@pytest.mark.parametrize("call, message", [((os._exit, (3,)), "exit code 3"), ((os.abort, ()), "SIGABRT"),
                                           ((int, ("x",)), "ValueError: invalid literal")])  # fmt: skip
def test_a_worker_that_fails_or_dies_says_so_and_leaves_no_process(call, message):
    before = psutil.Process().children()  # pytest's fork server, where it has started (tests/warm.py)
    with pytest.raises(RuntimeError, match=message):
        list(run_calls(iter([(time.sleep, (0,)), call, (time.sleep, (60,))]), 2))
    assert psutil.Process().children() == before


def test_workers_take_calls_only_when_they_are_free():
    taken = []

    def calls():
        for number in range(20):
            taken.append(number)
            yield abs, (-number,)

    results = run_calls(calls(), 2)
    first = [next(results) for _ in range(3)]
    assert len(taken) <= 5
    assert sorted([*first, *results]) == list(range(20))


def test_the_index_says_what_is_inside(config, text_file):
    folder = prepare(config(corpus="text", path=str(text_file))).train[0][0]
    index = json.loads((folder / "index.json").read_text())
    assert index["format"] == "disttrain-tokens" and index["unit"] == "document" and index["dtype"] == "uint16"
    assert index["train"]["tokens"] + index["held_out"]["tokens"] >= text_file.stat().st_size
    assert index["shards"][0]["sha256"] == hashlib.sha256((folder / "shard_00000.bin").read_bytes()).hexdigest()


def test_preparing_works_from_a_thread_and_from_a_forked_process(config, text_file):
    settings = config(corpus="text", path=str(text_file), tokenizer="bpe", tokenizer_vocab_size=300)
    found = []
    thread = threading.Thread(target=lambda: found.append(prepare(settings)))
    thread.start()
    thread.join()
    process = multiprocessing.get_context("fork").Process(target=prepare, args=(settings,))
    process.start()
    process.join(60)
    assert found and process.exitcode == 0
