"""From settings to token shards: idempotent, resumable, one writer at a time."""

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disttrain.config.problems import Problem, RefusedInput
from disttrain.config.schema import Config, DataConfig
from disttrain.data.encode import complete_sidecar, encode_item
from disttrain.data.files import fingerprint, one_writer, remove_temporary, sha256_file, write_atomically
from disttrain.data.items import Item
from disttrain.data.matching import blend_problems, token_problems, tokenizer_problems
from disttrain.data.shards import (
    INDEX,
    SPLITS,
    TOKENIZER,
    VERSION,
    Index,
    Unit,
    read_index,
    shard_problems,
    token_dtype,
)
from disttrain.data.sources import (
    SAMPLE_BYTES,
    Source,
    configured_sources,
    held_out_source,
    text_source,
    training_sample,
)
from disttrain.data.tokenizer import byte_tokenizer_json, load_tokenizer
from disttrain.data.vocabulary import TRAINED, tokenizer_json, train
from disttrain.data.workers import Call, run_calls

Report = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all (0: unknown) and what is being done."""

MOST_WORKERS = 8
"""Default limit of data.workers: each takes about 100 MB."""

_OWN_HELD_OUT = -1


@dataclass(frozen=True)
class Prepared:
    """Where the prepared data lies."""

    tokenizer: Path
    """The tokenizer.json that made the tokens."""
    tokenizer_name: str
    """As in data.tokenizer."""
    train: tuple[tuple[Path, float], ...]
    """Folder and weight of each training source; its training tokens are the split "train"."""
    held_out: tuple[tuple[Path, float], ...]
    """Folder and weight of each held-out source; its tokens are the split "held_out"."""
    soft: Path | None = None
    """Teachers' probabilities for the training examples of a task."""


@dataclass(frozen=True)
class _Recipe:
    """What goes into one folder of tokens."""

    train: Source | None
    held_out: Source | None
    fraction: float
    tokenizer: Path
    tokenizer_name: str
    unit: Unit

    def items(self) -> Iterator[Item]:
        count = 0
        for item in self.train.items(self.fraction) if self.train else ():
            count += 1
            yield item
        if self.held_out:
            yield from self.held_out.items(1.0, count)

    def identity(self) -> str:
        sources = [source and source.identity() for source in (self.train, self.held_out)]
        return fingerprint([VERSION, sources, self.fraction, sha256_file(self.tokenizer), self.unit])

    def text_bytes(self) -> int:
        sizes = [source.text_bytes() for source in (self.train, self.held_out) if source]
        return 0 if None in sizes else sum(size for size in sizes if size)


def prepare(config: Config, report: Report | None = None) -> Prepared:
    """Make everything that `open_data` needs in data.cache_dir, or find it there; cheap when it is all there.

    Tokens prepared elsewhere (corpus: tokens) are used in place; their checksums are verified on first use.
    Raises RefusedInput for what the user can mend: unreadable input, too little text, a full disk. Interrupted, it
    leaves complete shards only, and goes on from them next time.
    """
    data, cache = config.data, _cache(config)
    report = report or _silent
    sources = configured_sources(data)
    ready = {i: _open_tokens(config, str(s.path), cache, report) for i, s in enumerate(sources) if s.corpus == "tokens"}
    tokenizer, name = _tokenizer(data, ready, cache, report)
    folders = {number: index.folder for number, index in ready.items()}
    for number, recipe in _recipes(config, tokenizer, name).items():
        folders[number] = _make(recipe, cache / "tokens" / recipe.identity(), _workers(data), report).folder
    train_sets = tuple((folders[number], source.weight) for number, source in enumerate(sources))
    own = folders.get(_OWN_HELD_OUT)
    prepared = Prepared(tokenizer, name, train_sets, ((own, 1.0),) if own else train_sets)
    _refuse(_misfits(config, prepared))
    return prepared


def bytes_to_write(config: Config) -> int:
    """Bytes of tokens that `prepare` has yet to write, about; 0 when all is there. Writes nothing.

    A byte tokenizer's tokens take 2 bytes for each byte of text. Other vocabularies give one token of 2 or 4 bytes
    for 2 (code) to 5 (prose) bytes of text: counted as 1 byte for each. Unknown sizes (hf) count as nothing.
    """
    data, cache = config.data, _cache(config)
    tokenizer = _tokenizer_home(data, cache) / TOKENIZER
    total = 0
    for recipe in _recipes(config, tokenizer, data.tokenizer).values():
        folder = cache / "tokens" / recipe.identity() if tokenizer.exists() else None
        if folder is None or _complete(folder, folder.name) is None:
            there = sum(file.stat().st_size for file in folder.glob("shard_*")) if folder else 0
            total += max(0, recipe.text_bytes() * (2 if data.tokenizer == "bytes" else 1) - there)
    return total


def prepare_folder(config: Config, out: str | Path, report: Report | None = None) -> Path:
    """Prepare the config's one source in a folder of the user's choice, to be used as `corpus: tokens, path: OUT`.

    The folder gets the tokenizer too. Raises RefusedInput as `prepare` does, and when the folder holds other things.
    """
    data, cache, out = config.data, _cache(config), Path(out).expanduser().absolute()
    sources = configured_sources(data)
    if len(sources) != 1 or sources[0].corpus == "tokens":
        _refuse([Problem(("data.blend",) if len(sources) != 1 else ("data.corpus=tokens",),
                         "one source of text is prepared at a time",
                         "give data.corpus and data.path of one source that is not tokens")])  # fmt: skip
    others = [p.name for p in out.iterdir() if not _ours(p.name)] if out.is_dir() else []
    if others or (out.exists() and not out.is_dir()):
        _refuse([Problem((f"--out {out}",), f"it is no empty folder: {', '.join(sorted(others)[:3]) or 'a file'}",
                         "give a new or empty folder")])  # fmt: skip
    report = report or _silent
    tokenizer, name = _tokenizer(data, {}, cache, report)
    recipe = _recipes(config, tokenizer, name)[0]
    _make(recipe, out, _workers(data), report)
    folder = ((out, 1.0),)
    _refuse(_misfits(config, Prepared(out / TOKENIZER, name, folder, folder)))
    return out


def verify(folder: str | Path) -> list[Problem]:
    """Read every shard of a prepared folder against its checksum; what is missing, short or changed."""
    try:
        return shard_problems(read_index(Path(folder).expanduser()), checksums=True)
    except RefusedInput as refused:
        return refused.problems


def _cache(config: Config) -> Path:
    return Path(config.data.cache_dir).expanduser().absolute()


def _recipes(config: Config, tokenizer: Path, name: str) -> dict[int, _Recipe]:
    """What there is to tokenize, by the number of the source. Own held-out files join the one source that there is;
    beside a blend or prepared tokens they are a set of their own, number _OWN_HELD_OUT."""
    data, own = config.data, held_out_source(config.data)
    unit: Unit = "sentence" if config.model.family == "bert" else "document"
    fraction = 0.0 if own else data.held_out_fraction
    sources = configured_sources(data)
    texts = [number for number, source in enumerate(sources) if source.corpus != "tokens"]
    joined = own is not None and len(sources) == 1 and texts == [0]
    recipes = {number: _Recipe(text_source(data, number), own if joined else None, fraction, tokenizer, name, unit)
               for number in texts}  # fmt: skip
    if own and not joined:
        recipes[_OWN_HELD_OUT] = _Recipe(None, own, fraction, tokenizer, name, unit)
    return recipes


def _silent(done: int, total: int, what: str) -> None:
    """The report of nobody listening."""


def _refuse(problems: list[Problem]) -> None:
    if problems:
        raise RefusedInput(problems)


def _ours(name: str) -> bool:
    return name.startswith("shard_") or name in (INDEX, TOKENIZER, ".lock") or name.endswith(".tmp")


def _workers(data: DataConfig) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return data.workers or min(MOST_WORKERS, cores)


def _open_tokens(config: Config, path: str, cache: Path, report: Report) -> Index:
    """A user's folder of tokens, sizes checked always and checksums once per state of its files."""
    index = read_index(Path(path).expanduser().absolute())
    _refuse(token_problems(config, index))
    stats = [(shard["file"], (index.folder / shard["file"]).stat().st_mtime_ns) for shard in index.shards]
    stamp = cache / "verified" / fingerprint([str(index.folder), sha256_file(index.folder / INDEX), stats])
    if not stamp.exists():
        report(0, 0, f"verifying {path}")
        _refuse(shard_problems(index, checksums=True))
        stamp.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(stamp, b"")
    return index


def _tokenizer(data: DataConfig, ready: dict[int, Index], cache: Path, report: Report) -> tuple[Path, str]:
    """The tokenizer.json of this config and its name: of the prepared tokens, loaded, or trained."""
    if ready:
        first = next(iter(ready.values()))
        _refuse(blend_problems(list(ready.values())))
        return first.folder / TOKENIZER, first.tokenizer
    folder = _tokenizer_home(data, cache)
    if not (folder / TOKENIZER).exists():
        with one_writer(folder, lambda: report(0, 0, "waiting for another process that makes the tokenizer")):
            if not (folder / TOKENIZER).exists():
                if data.tokenizer in TRAINED:
                    report(0, 0, f"training the {data.tokenizer} tokenizer")
                content = _trained(data) if data.tokenizer in TRAINED else tokenizer_json(data)
                write_atomically(folder / TOKENIZER, content)
    return folder / TOKENIZER, data.tokenizer


def _tokenizer_home(data: DataConfig, cache: Path) -> Path:
    """Folder of the cache for this tokenizer, named by its content or by what it is trained on."""
    if data.tokenizer not in TRAINED:
        return cache / "tokenizers" / fingerprint([data.tokenizer, tokenizer_json(data).decode()])
    settings = [data.tokenizer, data.tokenizer_vocab_size, data.lowercase, _trained_fraction(data), VERSION]
    sources = [(source.identity(), weight) for source, weight in _trained_sources(data)]
    return cache / "tokenizers" / fingerprint([settings, sources])


def _trained_fraction(data: DataConfig) -> float:
    return 0.0 if data.held_out_path is not None else data.held_out_fraction


def _trained_sources(data: DataConfig) -> list[tuple[Source, float]]:
    return [(text_source(data, number), source.weight) for number, source in enumerate(configured_sources(data))]


def _trained(data: DataConfig) -> bytes:
    sources, fraction = _trained_sources(data), _trained_fraction(data)
    total = sum(weight for _, weight in sources)
    texts = [text for source, weight in sources
             for text in training_sample(source, fraction, int(SAMPLE_BYTES * weight / total))]  # fmt: skip
    call = (train, (data.tokenizer, texts, data.tokenizer_vocab_size, data.lowercase))
    with closing(run_calls(iter([call]), 1, threads=True)) as results:  # its memory goes with its process
        return next(results)


def _make(recipe: _Recipe, folder: Path, workers: int, report: Report) -> Index:
    """Make a folder of tokens, or find it complete."""
    identity = recipe.identity()
    if (index := _complete(folder, identity)) is not None:
        return index
    with one_writer(folder, lambda: report(0, 0, f"waiting for another process that prepares {folder}")):
        if (index := _complete(folder, identity)) is not None:
            return index
        (folder / INDEX).unlink(missing_ok=True)
        remove_temporary(folder)
        write_atomically(folder / TOKENIZER, recipe.tokenizer.read_bytes())
        tokenizer = load_tokenizer(recipe.tokenizer)
        dtype = token_dtype(tokenizer.vocab_size)
        shards = _encode_all(recipe, identity, folder, dtype, workers, report)
        index = Index(folder, identity, dtype, recipe.unit, recipe.tokenizer_name, sha256_file(recipe.tokenizer),
                      tokenizer.vocab_size, tuple(shards))  # fmt: skip
        for left_over in set(folder.glob("shard_*.bin")) - {folder / shard["file"] for shard in shards}:
            left_over.unlink()
            left_over.with_suffix(".json").unlink(missing_ok=True)
        write_atomically(folder / INDEX, index.to_json())
        return index


def _complete(folder: Path, identity: str) -> Index | None:
    if not (folder / INDEX).exists():
        return None
    index = read_index(folder)
    return index if index.fingerprint == identity and not shard_problems(index, checksums=False) else None


def _encode_all(recipe: _Recipe, identity: str, folder: Path, dtype: str, workers: int,
                report: Report) -> list[dict[str, Any]]:  # fmt: skip
    """Make every shard that is not there yet; the sidecars of all, in order."""
    shards: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    done, total = 0, recipe.text_bytes()

    def calls() -> Iterator[Call]:
        for item in recipe.items():
            key = fingerprint([identity, item.input])
            if (sidecar := complete_sidecar(item.number, key, folder)) is not None:
                skipped.append(sidecar)
            else:
                yield encode_item, (item, key, folder, recipe.unit, dtype)

    pending = calls()
    first = list(itertools.islice(pending, 2))
    here = recipe.tokenizer.read_bytes() == byte_tokenizer_json() and (len(first) < 2 or workers == 1)
    jobs = itertools.chain(first, pending)
    # the package `tokenizers` starts threads, after which this process could not fork: it stays in the workers
    results = (function(*arguments) for function, arguments in jobs) if here else run_calls(jobs, workers)
    with closing(results):
        for sidecar in results:
            shards.append(sidecar)
            done += sidecar["text_bytes"]
            report(min(done, total) if total else done, total, "tokenizing")
    return sorted(skipped + shards, key=lambda shard: (len(shard["file"]), shard["file"]))


def _misfits(config: Config, prepared: Prepared) -> list[Problem]:
    """What only the prepared data shows: a vocabulary that does not fit the model, too little text."""
    problems = tokenizer_problems(config, load_tokenizer(prepared.tokenizer), prepared.tokenizer_name)
    length = config.data.sequence_length
    needed = length + 1 if config.model.family == "gpt" else 1
    for split, sets in zip(SPLITS, (prepared.train, prepared.held_out), strict=True):
        for folder, _ in sets:
            tokens = read_index(folder).tokens(split)
            if tokens < needed:
                message = f"the {split.replace('_', '-')} text is too short for one sequence ({folder})"
                problems.append(Problem((f"data.sequence_length={length}", f"{tokens:,} {split} tokens"), message,
                                        "give more text, shorter sequences, or other held-out text"))  # fmt: skip
    return problems
