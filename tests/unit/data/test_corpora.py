import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from disttrain.config.problems import RefusedInput
from disttrain.data import open_data, preflight, prepare, python_docs
from disttrain.data.items import Document, expand
from disttrain.data.shards import Split, TokenSet, read_index
from tests.unit.data.conftest import make_text


def text_of(prepared, split: Split = "train"):
    tokens = np.concatenate([(s := TokenSet(read_index(f), split)).read(0, s.tokens) for f, _ in prepared.train])
    return bytes(tokens[tokens < 256].astype(np.uint8)).decode()


def test_python_docs_is_prose_then_code_without_repeating_docstrings():
    texts = list(python_docs.documents())
    assert 8e6 < sum(map(len, texts)) < 40e6
    topics = python_docs.topics()
    assert texts[: len(topics)] == topics and sum(map(len, topics)) > 200_000
    sentence = "Encode objects in a binary or text form"
    doc = "Return a shallow copy of x's state"  # sentences that the library does not hold: the search works
    assert not any(sentence in t or doc in t for t in texts)
    docstring = "Serialize ``obj`` as a JSON formatted stream to ``fp`` (a"
    assert sum(docstring in text for text in texts) == 1
    assert any("def dump(obj, fp" in text for text in texts[len(texts) // 2 :])


def test_python_docs_leaves_out_tests_and_installed_packages():
    names = {path.name for path in python_docs.source_files()}
    parts = {part for path in python_docs.source_files() for part in path.parts[-4:]}
    assert {"json", "asyncio", "email"} <= parts and "argparse.py" in names
    assert not {"test", "tests", "site-packages", "__pycache__"} & parts


def test_python_docs_without_pydoc_data_is_the_sources(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert python_docs.topics() == []
    assert next(python_docs.documents()).strip()


def test_python_docs_honours_max_bytes_and_needs_nothing_else(config):
    settings = config(corpus="python-docs", max_bytes=200_000)
    assert preflight(settings) == []
    prepared = prepare(settings)
    text = text_of(prepared) + text_of(prepared, "held_out")
    assert len(text.encode()) == pytest.approx(200_000, abs=2000)
    assert prepare(config(corpus="python-docs", max_bytes=200_000)) == prepared
    topic = python_docs.topics()
    assert not topic or topic[0][:200] in text
    data = open_data(settings, prepared)
    assert data.train_sequences > 1000 and data.held_out_sequences > 50


def test_folders_globs_and_lists(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.rst", "sub/deep/d.text", "e.py", "f.jsonl", ".hidden.txt", ".git/g.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")

    def names(path, document: Document = "file"):
        files, problems = expand(path, document, "data.path")
        assert problems == []
        return [f.relative_to(tmp_path).as_posix() for f in files]

    assert names(str(tmp_path)) == ["a.md", "b.txt", "sub/c.rst", "sub/deep/d.text"]
    assert names(str(tmp_path), "jsonl") == ["f.jsonl"]
    assert names(f"{tmp_path}/**/*.[pt]*") == ["b.txt", "e.py", "sub/deep/d.text"]
    assert names([f"{tmp_path}/e.py", str(tmp_path), f"{tmp_path}/b.txt"]) == [
        "e.py", "a.md", "b.txt", "sub/c.rst", "sub/deep/d.text"]  # fmt: skip


@pytest.fixture(scope="module")
def records():
    return [{"text": make_text(400, seed), "label": seed} for seed in range(300)]


@pytest.mark.parametrize("kind", ["json", "parquet", "save_to_disk", "save_to_disk with splits"])
def test_hf_reads_local_data_sets(config, tmp_path, records, monkeypatch, kind):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    import datasets

    folder = tmp_path / "set"
    made = datasets.Dataset.from_list(records)
    if kind == "json":
        made.to_json(folder / "train.jsonl")
    elif kind == "parquet":
        made.to_parquet(folder / "train.parquet")
    elif kind == "save_to_disk":
        made.save_to_disk(folder)
    else:
        datasets.DatasetDict({"train": made, "other": made.select(range(5))}).save_to_disk(folder)
    settings = config(corpus="hf", path=str(folder), held_out_fraction=0.1)
    assert preflight(settings) == []
    prepared = prepare(settings)
    text, held = text_of(prepared), text_of(prepared, "held_out")
    assert all((record["text"] in text) != (record["text"] in held) for record in records)
    assert len(held) / len(text + held) == pytest.approx(0.1, abs=0.02)
    with pytest.raises(RefusedInput, match="no text under this key") as refused:
        prepare(config(corpus="hf", path=str(folder), text_field="body"))
    assert "the records have: label, text" in refused.value.problems[0].fix


def test_hf_max_bytes_and_a_trained_tokenizer(config, tmp_path, records, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    datasets.Dataset.from_list(records).save_to_disk(tmp_path / "set")
    settings = config(
        corpus="hf", path=str(tmp_path / "set"), max_bytes=50_000, tokenizer="bpe", tokenizer_vocab_size=400
    )
    data = open_data(settings, prepare(settings))
    assert data.vocab_size == 400
    index = read_index(prepare(settings).train[0][0])
    assert 49_000 <= sum(shard["text_bytes"] for shard in index.shards) <= 50_000


def test_hf_that_cannot_be_opened_is_a_problem(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RefusedInput, match="cannot be opened"):
        prepare(config(corpus="hf", path=str(tmp_path / "empty")))


def test_a_vocabulary_is_trained_on_training_text_alone(config, tmp_path):
    """Every line has its own word, so a held-out word in the vocabulary would show."""
    rare = [f"zq{'abcdefghij'[n % 10]}{'klmnopqrst'[n // 10 % 10]}{'uvwxy'[n // 100 % 5]}w" for n in range(500)]
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{(word + ' ') * 30}\n" for word in rare))
    settings = config(corpus="text", path=str(path), document="line", tokenizer="wordpiece", tokenizer_vocab_size=8000,
                      held_out_fraction=0.2, sequence_length=16)  # fmt: skip
    prepared = prepare(settings)
    tokenizer = open_data(settings, prepared).tokenizer
    held = TokenSet(read_index(prepared.held_out[0][0]), "held_out")
    held_words = set(tokenizer.decode(held.read(0, held.tokens)).split()) & set(rare)
    whole = {word for word in rare if len(tokenizer.encode(word)) == 1}
    assert len(whole) > 300
    assert not held_words & whole


def test_importing_the_package_is_cheap():
    code = (
        "import sys, disttrain.data; print([m for m in ('torch','numpy','tokenizers','datasets') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         cwd=Path(__file__).parents[3])  # fmt: skip
    assert out.stdout.strip() == "[]"


def test_the_data_package_needs_no_torch():
    code = ("import sys, disttrain.data as d; [getattr(d, n) for n in d.__all__]; "
            "print([m for m in ('torch', 'tokenizers', 'datasets', 'transformers') if m in sys.modules])")  # fmt: skip
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         cwd=Path(__file__).parents[3])  # fmt: skip
    assert out.stdout.strip() == "[]"
