import importlib.util
import json
import os
import shutil
from collections import namedtuple

import pytest

from disttrain.config.problems import RefusedInput
from disttrain.config.schema import Config
from disttrain.data import preflight, prepare, prepare_folder
from tests.unit.data.conftest import make_text


def said(config: Config) -> str:
    """Every problem's text; each must name settings and a fix, and nothing may have been written."""
    cache = config.data.cache_dir
    before = os.path.exists(cache)
    problems = preflight(config)
    assert os.path.exists(cache) == before
    assert all(p.settings and p.message and p.fix for p in problems)
    return "\n".join(f"{', '.join(p.settings)}: {p.message} -> {p.fix}" for p in problems)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("disttrain.data.vocabulary._no_network", lambda: True)


def test_good_settings_have_no_problem(config, text_file):
    path = str(text_file)
    assert said(config(corpus="text", path=path)) == ""
    assert said(config("bert", corpus="text", path=[path], mlm_probability=0.2)) == ""
    assert said(config(corpus="text", path=path, tokenizer="bpe", vocab_size=8192)) == ""
    assert (
        said(config(blend=[{"corpus": "python-docs", "weight": 1}, {"corpus": "text", "path": path, "weight": 2}]))
        == ""
    )


def test_a_resolved_config_with_every_value_written_out_has_no_problem(config, text_file):
    """What a run writes down must be accepted again, for every family and tokenizer."""
    for family in ("gpt", "bert"):
        for tokenizer in ("bytes", "bpe", "wordpiece"):
            settings = config(family, corpus="text", path=str(text_file), tokenizer=tokenizer)
            assert said(Config.model_validate(settings.model_dump())) == ""


@pytest.mark.parametrize("data, expected", [
    ({}, "nothing says what to train on"),
    ({"corpus": "python-docs", "blend": [{"corpus": "python-docs", "weight": 1}]}, "both one corpus and a blend"),
    ({"blend": []}, "blend has no source"),
    ({"blend": [{"corpus": "python-docs", "weight": 1}, {"corpus": "python-docs", "weight": 1e-6}]}, "never be seen"),
    ({"corpus": "text"}, "needs a path"),
    ({"corpus": "hf"}, "needs a path"),
    ({"corpus": "tokens", "path": ["a", "b"]}, "one path, not a list"),
    ({"corpus": "python-docs", "path": "x"}, "python-docs has no path"),
    ({"corpus": "text", "path": "/nowhere/at/all.txt"}, "does not exist"),
    ({"corpus": "text", "path": "/nowhere/*.txt"}, "no file matches"),
    ({"corpus": "tokens", "path": "/nowhere"}, "holds no index.json"),
])  # fmt: skip
def test_shape_and_paths(config, data, expected):
    assert expected in said(config(**data))


def test_files_that_cannot_serve(config, tmp_path, text_file):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "none").mkdir()
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") * 500)
    assert "the file is empty" in said(config(corpus="text", path=str(tmp_path / "empty.txt")))
    assert "holds no *.txt" in said(config(corpus="text", path=str(tmp_path / "none")))
    assert "holds no *.jsonl" in said(config(corpus="text", path=str(tmp_path / "none"), document="jsonl"))
    assert "not UTF-8" in said(config(corpus="text", path=str(tmp_path / "latin.txt")))
    assert "no file matches" in said(config(corpus="text", path=str(text_file), held_out_path=f"{tmp_path}/*.nothing"))
    assert "also trained on" in said(config(corpus="text", path=str(tmp_path / "t*.txt"), held_out_path=str(text_file)))
    missing = said(config(corpus="text", path=str(tmp_path / "texxt.txt")))
    assert "text.txt" in missing, "the files that are there are named"


def test_unreadable_file(config, text_file, monkeypatch):
    def refuse(path, *args, **kwargs):
        if str(path) == str(text_file):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    opened = open
    monkeypatch.setattr("builtins.open", refuse)
    assert "cannot be read: Permission denied" in said(config(corpus="text", path=str(text_file)))


@pytest.mark.parametrize("family, data, setting", [
    ("gpt", {"mlm_probability": 0.2}, "data.mlm_probability"),
    ("gpt", {"short_sequence_probability": 0.3}, "data.short_sequence_probability"),
    ("gpt", {"lowercase": True}, "data.lowercase"),
    ("gpt", {"lowercase": True, "tokenizer": "bpe"}, "data.lowercase"),
    ("gpt", {"tokenizer_path": "vocabulary"}, "data.tokenizer_path"),
    ("gpt", {"tokenizer_path": "vocabulary", "tokenizer": "wordpiece"}, "data.tokenizer_path"),
    ("gpt", {"tokenizer_vocab_size": 500}, "data.tokenizer_vocab_size"),
    ("gpt", {"hf_config": "en"}, "data.hf_config"),
    ("gpt", {"hf_split": "test"}, "data.hf_split"),
    ("gpt", {"text_field": "body"}, "data.text_field"),
    ("gpt", {"corpus": "python-docs", "path": None, "document": "line"}, "data.document"),
    ("gpt", {"held_out_path": "HELD", "held_out_fraction": 0.1}, "data.held_out_fraction"),
])  # fmt: skip
def test_settings_that_would_be_ignored(config, text_file, tmp_path, family, data, setting):
    (tmp_path / "held.txt").write_text(make_text(2000))
    data = {k: str(tmp_path / "held.txt") if v == "HELD" else v for k, v in data.items()}
    text = said(config(family, **{"corpus": "text", "path": str(text_file), **data}))
    assert f"{setting} would be ignored" in text and text.count("\n") == 0


def test_hf_without_the_package(config, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "datasets" else real(name, *a))
    assert "pip install disttrain[hf]" in said(config(corpus="hf", path="some/set"))


def test_tokenizers(config, text_file, tmp_path):
    def with_tokenizer(**data):
        return said(config(corpus="text", path=str(text_file), **data))

    (tmp_path / "v").mkdir()
    assert "does not hold encoder.json" in with_tokenizer(tokenizer="gpt2", tokenizer_path=str(tmp_path / "v"))
    assert "does not hold vocab.txt" in with_tokenizer(tokenizer="bert", tokenizer_path=str(tmp_path / "v"))
    assert "does not exist" in with_tokenizer(tokenizer="bert", tokenizer_path=str(tmp_path / "w"))
    assert "'bytess' is no known tokenizer" in with_tokenizer(tokenizer="bytess")
    assert "cannot be loaded" in with_tokenizer(tokenizer="no-such/tokenizer-anywhere")
    assert "no room for all bytes" in with_tokenizer(tokenizer="bpe", tokenizer_vocab_size=260)
    assert "set model.vocab_size=261" in with_tokenizer(vocab_size=200)
    assert "set model.vocab_size=8192" in with_tokenizer(tokenizer="bpe", vocab_size=8000)
    from disttrain.data.vocabulary import train

    content = json.loads(train("bpe", [make_text(5000)], 300, False))
    content["added_tokens"] = content["added_tokens"][:1]
    content["model"]["vocab"] = {w.replace("mask", "musk"): i for w, i in content["model"]["vocab"].items()}
    (tmp_path / "v" / "tokenizer.json").write_text(json.dumps(content))
    assert with_tokenizer(tokenizer="mine", tokenizer_path=str(tmp_path / "v")) == ""
    text = said(
        config("bert", corpus="text", path=str(text_file), tokenizer="mine", tokenizer_path=str(tmp_path / "v"))
    )
    assert "no token for mask" in text


def test_too_little_text(config, tmp_path):
    (tmp_path / "short.txt").write_text("x" * 2000)
    assert "too short" in said(config(corpus="text", path=str(tmp_path / "short.txt")))
    (tmp_path / "held.txt").write_text("x" * 100)
    text = said(config(corpus="text", path=str(tmp_path / "short.txt"), held_out_path=str(tmp_path / "held.txt")))
    assert "data.held_out_path: 100 bytes" in text


def test_disk_and_cache(config, text_file, tmp_path, monkeypatch):
    (tmp_path / "a file").write_text("")
    settings = config(corpus="text", path=str(text_file), cache_dir=str(tmp_path / "a file" / "cache"))
    assert "no folder that can be written" in said(settings)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    full = config(corpus="text", path=str(text_file))
    assert "has no room for the prepared data" in said(full)
    assert "has no room" in said(config("bert", corpus="text", path=str(text_file), tokenizer="bpe"))
    prepare(full)
    assert said(full) == "", "what is there needs no room"


@pytest.fixture
def tokens(config, text_file, tmp_path):
    """A function that prepares the text once more, as tokens in a folder."""

    def build(family="gpt", **data):
        return prepare_folder(config(family, corpus="text", path=str(text_file), **data), tmp_path / f"tokens-{family}")

    return build


def edit(index, change):
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))


def triple_a_count(content):
    content["shards"][0]["train"]["tokens"] *= 3


DAMAGE = {
    "index missing": lambda folder: (folder / "index.json").unlink(),
    "index not json": lambda folder: (folder / "index.json").write_text("{"),
    "other json": lambda folder: (folder / "index.json").write_text('{"tokens": []}'),
    "other version": lambda folder: edit(folder / "index.json", lambda content: content.update(version=99)),
    "counts changed": lambda folder: edit(folder / "index.json", triple_a_count),
    "key missing": lambda folder: edit(folder / "index.json", lambda content: content.pop("dtype")),
    "tokenizer missing": lambda folder: (folder / "tokenizer.json").unlink(),
    "tokenizer changed": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "shard missing": lambda folder: (folder / "shard_00000.bin").unlink(),
    "shard truncated": lambda folder: os.truncate(folder / "shard_00000.bin", 800),
}


@pytest.mark.parametrize("how, expected", [
    ("index missing", "holds no index.json"), ("index not json", "cannot be read"), ("other json", "is no index"),
    ("other version", "format version 99"), ("counts changed", "damaged"), ("key missing", "damaged"),
    ("tokenizer missing", "tokenizer of the tokens is missing"), ("tokenizer changed", "was changed"),
    ("shard missing", "shard is missing"), ("shard truncated", "bytes instead of"),
])  # fmt: skip
def test_damaged_tokens(config, tokens, how, expected):
    folder = tokens()
    settings = config(corpus="tokens", path=str(folder))
    assert said(settings) == ""
    DAMAGE[how](folder)
    assert expected in said(settings)
    with pytest.raises(RefusedInput, match=expected):
        prepare(settings)


def test_tokens_that_do_not_fit_the_config(config, tokens):
    folder = str(tokens())
    assert "without sentence boundaries" in said(config("bert", corpus="tokens", path=folder))
    assert "as BERT's sentences" in said(config("gpt", corpus="tokens", path=str(tokens("bert"))))
    assert "made with the tokenizer bytes" in said(config(corpus="tokens", path=folder, tokenizer="bpe"))
    assert "set model.vocab_size=261" in said(config(corpus="tokens", path=folder, vocab_size=100))
    assert said(config(corpus="tokens", path=folder, tokenizer="bytes", vocab_size=261)) == ""
    for name, value in (("max_bytes", 10), ("document", "line"), ("lowercase", True), ("held_out_fraction", 0.2)):
        assert f"data.{name} would be ignored" in said(config(corpus="tokens", path=folder, **{name: value}))


def test_blended_tokens_share_their_tokenizer(config, text_file, tmp_path):
    folders = [prepare_folder(config(corpus="text", path=str(text_file), tokenizer=name, **more), tmp_path / name)
               for name, more in (("bytes", {}), ("bpe", {"tokenizer_vocab_size": 300}))]  # fmt: skip
    blend = [{"corpus": "tokens", "path": str(folder), "weight": 1.0} for folder in folders]
    with pytest.raises(RefusedInput, match="different tokenizers"):
        prepare(config(blend=blend))
    assert "different tokenizers" in said(config(blend=blend))


def test_all_problems_are_said_at_once(config, tmp_path):
    text = said(config(corpus="text", path=[f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"], held_out_path=f"{tmp_path}/c.txt",
                       tokenizer="gpt2", tokenizer_path=f"{tmp_path}/v", mlm_probability=0.3))  # fmt: skip
    for part in ("a.txt", "b.txt", "c.txt", f"{tmp_path}/v does not exist", "mlm_probability"):
        assert part in text
