"""Labelled examples of a run: found, cleaned and encoded once, then batches as of a corpus. No torch.

Sample i of a run is the same on any number of ranks: example `permute(i mod N)` of epoch i div N.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from disttrain.config.problems import Problem, RefusedInput
from disttrain.config.schema import Config
from disttrain.config.settings import setting
from disttrain.data.files import fingerprint, mapped, one_writer, write_atomically
from disttrain.data.loading import Batch, shares
from disttrain.data.order import permute
from disttrain.data.preparation import Prepared, Report
from disttrain.data.tokenizer import Tokenizer, byte_tokenizer_json, load_tokenizer, load_tokenizer_json
from disttrain.data.vocabulary import TRAINED, tokenizer_json
from disttrain.labelled.arrays import encode, form_of, words_of
from disttrain.labelled.chosen import chosen_examples, sources
from disttrain.labelled.cleaning import cleaning_problems
from disttrain.labelled.subwords import subword_problems
from disttrain.labelled.windows import window_problems
from disttrain.labelled.words import Vocabulary, build_vocabulary, load_vocabulary, save_vocabulary
from disttrain.sets import SETS

VERSION = 1
_ORDER = 4  # the purposes of a run's random numbers: disttrain.data.loading has 1 to 3
_META, _TOKENIZER = "meta.json", "tokenizer.json"
WORDS = "words.json"
"""The vocabulary of words, also in the folder of a run."""
MAX_QUESTION = 64
"""Tokens of a question that are kept (Devlin et al. 2019's code)."""


@dataclass(frozen=True)
class LabelledData:
    """Opened examples of a run; the methods of `disttrain.data.Data`."""

    config: Config
    tokenizer: Tokenizer | Vocabulary
    vocab_size: int
    train_sequences: int
    """Training examples, or windows of them: an epoch."""
    held_out_sequences: int
    _train: Mapping[str, np.ndarray]
    _held_out: Mapping[str, np.ndarray]
    """Arrays of the two splits; `soft_targets` of training ones are teachers' probabilities."""

    def train_batch(self, first_sample: int, count: int) -> Batch:
        """Samples first_sample .. first_sample + count of the run, in rows. Epochs follow one another without end.

        `samples` int64 [count] are their numbers in the run, on which dropout depends; `examples` those in the split.
        """
        samples = np.arange(first_sample, first_sample + count)
        rows = np.empty(count, np.int64)
        for epoch in sorted(set((samples // self.train_sequences).tolist())):
            here = samples // self.train_sequences == epoch
            place = samples[here] % self.train_sequences
            rows[here] = permute(place, self.train_sequences, (self.config.run.seed, _ORDER, epoch))
        return _rows(self._train, rows) | {"samples": samples, "examples": rows}

    def held_out_batch(self, first: int, count: int) -> Batch:
        """Held-out examples first .. first + count in their order. Raises IndexError beyond held_out_sequences."""
        if first < 0 or first + count > self.held_out_sequences:
            raise IndexError(f"held-out examples {first}..{first + count} of {self.held_out_sequences}")
        return _rows(self._held_out, np.arange(first, first + count))

    def micro_batches(self, step: int, data_rank: int, data_ranks: int) -> Iterator[Batch]:
        """The micro-batches of one data rank in one optimizer step (0-based), as `disttrain.data.Data.micro_batches`."""
        for first, size in shares(self.config.train, step, data_rank, data_ranks):
            yield self.train_batch(first, size)


def _rows(arrays: Mapping[str, np.ndarray], rows: np.ndarray) -> Batch:
    found = {name: array[rows] for name, array in arrays.items()}
    return {name: a.astype(np.int64) if a.dtype in (np.int32, np.uint8) else a for name, a in found.items()}


def preflight(config: Config) -> list[Problem]:
    """Everything wrong with a task's settings and files that shows without writing."""
    chosen = SETS.get(config.task.set or "")
    if chosen is None:
        return []  # which is said with the settings
    problems = cleaning_problems(config.cleaning, chosen.kind)
    if config.task.path is None and config.task.source == "files":
        problems.append(Problem((setting(config, "task.set"), "task.path=null"), "nothing says where its files are",
                                "give task.path, or use task.source=hub"))  # fmt: skip
    elif config.task.folds is None or config.task.fold < config.task.folds:
        problems += _refused(lambda: chosen_examples(config))
    if config.data.tokenizer != "words":
        return [*problems, *_tokenizer_problems(config)]
    if chosen.kind == "answer" or config.model.family in ("gpt", "bert"):
        problems.append(Problem(("data.tokenizer=words", setting(config, "model.family"), setting(config, "task.set")),
                                "a transformer reads parts of words, and so does what looks for answers",
                                "use data.tokenizer=bert, gpt2 or bytes"))  # fmt: skip
    if (path := config.task.vocabulary) is not None:
        problems += _refused(lambda: load_vocabulary(Path(path).expanduser()))
    return problems


def _refused(attempt: Callable[[], object]) -> list[Problem]:
    """Why something is refused; nothing where it is not."""
    try:
        attempt()
    except RefusedInput as refused:
        return refused.problems
    return []


def _tokenizer_problems(config: Config) -> list[Problem]:
    """Why a vocabulary of parts of words does not serve a task."""
    data = config.data
    try:
        tokenizer = _tokenizer(config)
    except RefusedInput as refused:
        return refused.problems
    if config.model.head == "answer":
        return window_problems(tokenizer, data.sequence_length, config.task.stride, MAX_QUESTION)
    rows, entries = config.model.vocab_size, tokenizer.vocab_size
    problems = subword_problems(tokenizer, form_of(config), data.sequence_length, 2)
    if rows is not None and entries > rows:
        problems.append(Problem((setting(config, "model.vocab_size"), setting(config, "data.tokenizer")),
                                f"the tokenizer has {entries:,} entries, more than the model has rows",
                                f"set model.vocab_size={entries} or leave it out"))  # fmt: skip
    return problems


def _tokenizer(config: Config) -> Tokenizer:
    return load_tokenizer_json(_tokenizer_json(config), config.data.tokenizer)


def _tokenizer_json(config: Config) -> bytes:
    """Raises RefusedInput where there is none."""
    if config.data.tokenizer in TRAINED:
        raise RefusedInput([Problem((setting(config, "data.tokenizer"), setting(config, "task.set")),
                                    "no vocabulary is trained on the examples of a task",
                                    "use data.tokenizer=words, bert, gpt2 or bytes")])  # fmt: skip
    return byte_tokenizer_json() if config.data.tokenizer == "bytes" else tokenizer_json(config.data)


def prepare(config: Config, report: Report | None = None) -> Prepared:
    """Encode the examples into data.cache_dir, or find them there. Raises RefusedInput for what the user can mend."""
    words = config.data.tokenizer == "words"
    spelled = b"" if words else _tokenizer_json(config)
    if words and config.task.vocabulary is not None:
        spelled = Path(config.task.vocabulary).expanduser().read_bytes()
    folder = Path(config.data.cache_dir).expanduser() / "tasks" / _identity(config, spelled)
    prepared = Prepared(
        folder / (WORDS if words else _TOKENIZER), config.data.tokenizer, ((folder, 1.0),), ((folder, 1.0),)
    )
    if (folder / _META).exists():
        return prepared
    if report is not None:
        report(0, 0, f"reading {config.task.set}")
    with one_writer(folder):
        if not (folder / _META).exists():
            _write(config, spelled, folder)
    return prepared


def _write(config: Config, spelled: bytes, folder: Path) -> None:
    """The vocabulary and both splits; meta.json comes last, and says that all is there."""
    train, held_out = chosen_examples(config)
    if config.data.tokenizer != "words":
        write_atomically(folder / _TOKENIZER, spelled)
        vocabulary: Tokenizer | Vocabulary = load_tokenizer(folder / _TOKENIZER)
    elif spelled:
        write_atomically(folder / WORDS, spelled)
        vocabulary = load_vocabulary(folder / WORDS)
    else:
        vocabulary = build_vocabulary(map(words_of, train), config.task.min_count, config.task.max_words)
        save_vocabulary(folder / WORDS, vocabulary)
    counts: dict[str, Any] = {}
    for split, examples in (("train", train), ("held_out", held_out)):
        arrays = encode(config, vocabulary, examples).arrays
        counts[split] = {"sequences": len(arrays["tokens"]), "arrays": sorted(arrays)}
        for name, array in arrays.items():
            narrow = array.astype(np.int32) if array.dtype == np.int64 else array
            np.save(folder / f"{split}.{name}.npy", narrow)
    write_atomically(folder / _META, json.dumps(counts, indent=1).encode())


def _identity(config: Config, spelled: bytes) -> str:
    task, model = config.task, config.model
    seed = config.run.seed if task.folds or task.max_examples or len(SETS[task.set or ""].files) == 1 else 0
    characters = task.max_characters if model.character_size else 0
    return fingerprint([VERSION, sources(config), task.model_dump(mode="json"), config.cleaning.model_dump(mode="json"),
                        spelled.decode(errors="replace"), config.data.sequence_length, characters, form_of(config),
                        seed])  # fmt: skip


def open_data(config: Config, prepared: Prepared) -> LabelledData:
    """Open prepared examples: arrays are mapped. Raises RefusedInput where they are gone or damaged."""
    folder = prepared.train[0][0]
    try:
        counts = json.loads((folder / _META).read_text())
        train, held_out = (_mapped(folder, split, counts[split]) for split in ("train", "held_out"))
    except (OSError, ValueError, KeyError) as error:
        raise RefusedInput([Problem((f"data.cache_dir: {folder}",), f"the prepared examples cannot be read: {error}",
                                    "delete the folder, and they are prepared again")]) from error  # fmt: skip
    if prepared.soft is not None:
        train["soft_targets"] = mapped(prepared.soft)
    words = config.data.tokenizer == "words"
    vocabulary = load_vocabulary(prepared.tokenizer) if words else load_tokenizer(prepared.tokenizer)
    size = len(vocabulary) if isinstance(vocabulary, Vocabulary) else vocabulary.vocab_size
    examples, others = (int(counts[split]["sequences"]) for split in ("train", "held_out"))
    return LabelledData(config, vocabulary, size, examples, others, train, held_out)


def _mapped(folder: Path, split: str, described: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: mapped(folder / f"{split}.{name}.npy")
            for name in described["arrays"]}  # fmt: skip
