"""What is wrong with the data settings, as far as it shows before anything is prepared. Writes nothing."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from disttrain.config.checks import given
from disttrain.config.problems import Problem, RefusedInput
from disttrain.config.schema import Config, DataConfig
from disttrain.data import hub
from disttrain.data.files import disk_full
from disttrain.data.items import expand
from disttrain.data.matching import blend_problems, token_problems, tokenizer_problems, vocabulary_problems
from disttrain.data.order import quotas
from disttrain.data.preparation import bytes_to_write
from disttrain.data.shards import read_index
from disttrain.data.sources import Source, configured_sources, held_out_source, text_source
from disttrain.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer_json
from disttrain.data.vocabulary import TRAINED, reads_tokenizer_json, smallest_vocabulary, tokenizer_json


def preflight(config: Config) -> list[Problem]:
    """Everything wrong with the data settings that shows without preparing: files, tokenizer, shards, disk.

    Token shards are checked for presence and size; their checksums are read by `prepare` on first use and by
    `verify`. A tokenizer with a Hugging Face name is looked for on disk and then on the hub.
    """
    problems = _shape(config.data)
    if problems:  # without one clear source the rest would only repeat them
        return [*problems, *_ignored(config)]
    problems = [*_sources(config), *_held_out(config.data)]
    problems += _ignored(config)
    problems += _tokenizer(config)
    if not problems:
        problems += [*_cache(config), *_size(config)]
    return problems


def _shape(data: DataConfig) -> list[Problem]:
    """Whether there is one corpus, or a blend, each with the path that it needs and no other."""
    if data.blend is not None and (data.corpus is not None or data.path is not None):
        return [Problem(("data.corpus", "data.blend"), "both one corpus and a blend are given",
                        "keep data.blend, or data.corpus and data.path")]  # fmt: skip
    if data.blend is None and data.corpus is None:
        return [Problem(("data.corpus", "data.blend"), "nothing says what to train on",
                        "set data.corpus=python-docs, or text with data.path")]  # fmt: skip
    if data.blend is not None and not data.blend:
        return [Problem(("data.blend=[]",), "the blend has no source", "list its sources")]
    problems = []
    for number, source in enumerate(configured_sources(data)):
        where = "data" if data.blend is None else f"data.blend[{number}]"
        corpus = f"{where}.corpus={source.corpus}"
        if source.corpus == "python-docs" and source.path is not None:
            problems.append(Problem((corpus, f"{where}.path={source.path}"), "python-docs has no path",
                                    "remove the path, or use corpus text"))  # fmt: skip
        elif source.corpus != "python-docs" and not source.path:
            problems.append(Problem((corpus, f"{where}.path"), "this corpus needs a path", "give the path"))
        elif source.corpus in ("hf", "tokens") and not isinstance(source.path, str):
            problems.append(Problem((corpus, f"{where}.path={source.path}"), "this corpus takes one path, not a list",
                                    "give one path, or several sources in data.blend"))  # fmt: skip
    shares = quotas([source.weight for source in configured_sources(data)])
    for number, share in enumerate(shares):
        if share == 0:
            problems.append(Problem((f"data.blend[{number}].weight",), "the weight is below a thousandth of the sum: "
                                    "the source would never be seen", "give it more weight, or remove it"))  # fmt: skip
    return problems


def _sources(config: Config) -> Iterator[Problem]:
    """Missing files, packages and shards."""
    data = config.data
    for number, source in enumerate(configured_sources(data)):
        if source.corpus == "text":
            yield from expand(source.path, data.document, text_source(data, number).setting)[1]
        elif source.corpus == "hf" and not hub.available():
            yield Problem(("data.corpus=hf",), "the package datasets is not installed", "pip install disttrain[hf]")
        elif source.corpus == "tokens":
            try:
                yield from token_problems(config, read_index(Path(str(source.path)).expanduser()))
            except RefusedInput as refused:
                yield from refused.problems


def _held_out(data: DataConfig) -> Iterator[Problem]:
    if data.held_out_path is None:
        return
    files, problems = expand(data.held_out_path, data.document, "data.held_out_path")
    yield from problems
    if not files and not problems:
        yield Problem(("data.held_out_path=[]",), "no held-out file is given", "name files, or remove the setting")
    trained = {file.resolve() for source in configured_sources(data) if source.corpus == "text"
               for file in expand(source.path, data.document, "data.path")[0]}  # fmt: skip
    for file in files:
        if file.resolve() in trained:
            yield Problem(("data.path", f"data.held_out_path: {file}"), "the held-out file is also trained on",
                          "name different files")  # fmt: skip


def _ignored(config: Config) -> Iterator[Problem]:
    """Settings that the user gave, with another value than the default, and that would have no effect."""
    data = config.data
    corpora = {source.corpus for source in configured_sources(data)}
    reads_text = "text" in corpora or data.held_out_path is not None
    own_tokenizer = "tokens" not in corpora
    trained = data.tokenizer in TRAINED
    bert = config.model.family == "bert"
    applies = {
        "document": (reads_text, "only text files have documents to separate", "use data.corpus=text"),
        "text_field": ("hf" in corpora or reads_text and data.document == "jsonl", "only jsonl and hf have records",
                       "use data.document=jsonl or data.corpus=hf"),
        "hf_config": ("hf" in corpora, "only hf data sets have configurations", "use data.corpus=hf"),
        "hf_split": ("hf" in corpora, "only hf data sets have splits", "use data.corpus=hf"),
        "max_bytes": (corpora != {"tokens"}, "prepared tokens are used whole", "limit the preparation instead"),
        "held_out_fraction": (data.held_out_path is None and corpora != {"tokens"},
                              "what is held out is already decided", "remove data.held_out_path"),
        "tokenizer_path": (own_tokenizer and data.tokenizer not in ("bytes", *TRAINED),
                           "this tokenizer is not read from a path", "use data.tokenizer=gpt2 or bert"),
        "tokenizer_vocab_size": (own_tokenizer and trained, "only bpe and wordpiece are trained",
                                 "use data.tokenizer=bpe or wordpiece"),
        "lowercase": (own_tokenizer and _lowercase_applies(data), "only wordpiece, and bert's vocab.txt, lower-case",
                      "use data.tokenizer=wordpiece or bert"),
        "mlm_probability": (bert, "only bert masks tokens", "use model.family=bert"),
        "short_sequence_probability": (bert, "only bert shortens sequences", "use model.family=bert"),
    }  # fmt: skip
    for name, (used, reason, fix) in applies.items():
        value = getattr(data, name)
        # a resolved config names every setting: one at its default asks for nothing
        if not used and given(config, f"data.{name}") and value != DataConfig.model_fields[name].default:
            yield Problem((f"data.{name}={value}", f"data.tokenizer={data.tokenizer}", f"data.corpus={data.corpus}",
                           f"model.family={config.model.family}"), f"data.{name} would be ignored: {reason}",
                          f"remove it, or {fix}")  # fmt: skip


def _lowercase_applies(data: DataConfig) -> bool:
    if data.tokenizer == "bert":
        try:
            return not reads_tokenizer_json(data)
        except RefusedInput:  # its files are missing, which is said elsewhere
            return True
    return data.tokenizer == "wordpiece"


def _tokenizer(config: Config) -> list[Problem]:
    """Vocabulary files, special tokens and sizes."""
    data = config.data
    prepared = [source for source in configured_sources(data) if source.corpus == "tokens"]
    if prepared:
        try:
            indexes = [read_index(Path(str(source.path)).expanduser()) for source in prepared]
        except RefusedInput:  # said with the sources
            return []
        return [*blend_problems(indexes), *vocabulary_problems(config, indexes[0].vocab_size)]
    if data.tokenizer in TRAINED:
        smallest = smallest_vocabulary(data.tokenizer)
        if data.tokenizer_vocab_size < smallest:
            size = f"data.tokenizer_vocab_size={data.tokenizer_vocab_size}"
            return [Problem((size, f"data.tokenizer={data.tokenizer}"),
                            "the vocabulary has no room for all bytes and the special tokens",
                            f"use {smallest} or more")]  # fmt: skip
        return vocabulary_problems(config, data.tokenizer_vocab_size)
    try:
        tokenizer = _loaded(data)
    except RefusedInput as refused:
        return refused.problems
    return tokenizer_problems(config, tokenizer, data.tokenizer)


def _loaded(data: DataConfig) -> Tokenizer:
    return byte_tokenizer() if data.tokenizer == "bytes" else load_tokenizer_json(tokenizer_json(data), data.tokenizer)


def _cache(config: Config) -> Iterator[Problem]:
    """A cache folder that cannot be written, or whose disk has no room for what is not prepared yet."""
    cache = Path(config.data.cache_dir).expanduser()
    place = cache
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        yield Problem((f"data.cache_dir={config.data.cache_dir}",), f"{place} is no folder that can be written",
                      "give another data.cache_dir")  # fmt: skip
        return
    if all(source.corpus != "tokens" for source in configured_sources(config.data)):
        needed = bytes_to_write(config)
        if needed > shutil.disk_usage(place).free:
            yield disk_full(place, needed)


def _text_sources(data: DataConfig) -> list[Source]:
    sources = [text_source(data, i) for i, s in enumerate(configured_sources(data)) if s.corpus != "tokens"]
    own = held_out_source(data)
    return [*sources, own] if own else sources


def _size(config: Config) -> Iterator[Problem]:
    """A corpus that cannot give one training and one held-out sequence: no token is shorter than a byte."""
    data = config.data
    needed = data.sequence_length + 1 if config.model.family == "gpt" else 1
    own = held_out_source(data)
    for source in _text_sources(data):
        total = source.text_bytes()
        if total is None:
            continue
        least = needed if own else needed / min(data.held_out_fraction, 1 - data.held_out_fraction)
        if total < least:
            yield Problem((f"{source.setting}: {total:,} bytes", f"data.sequence_length={data.sequence_length}"),
                          "the text is too short for one training and one held-out sequence",
                          "give more text, shorter sequences, or data.held_out_path")  # fmt: skip
