"""Text to token ids and back: bytes in numpy, everything else through the package `tokenizers`."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from disttrain.config.problems import Problem, RefusedInput

SPECIAL_NAMES: Mapping[str, tuple[str, ...]] = {
    "end_of_text": ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]"),
    "pad": ("<|pad|>", "[PAD]", "<pad>"),
    "cls": ("<|cls|>", "[CLS]", "<s>"),
    "sep": ("<|sep|>", "[SEP]", "</s>"),
    "mask": ("<|mask|>", "[MASK]", "<mask>"),
    "unknown": ("[UNK]", "<unk>"),
}
"""The names under which vocabularies carry the special tokens; the first that is present counts."""

TRAINED_SPECIALS = tuple(SPECIAL_NAMES[role][0] for role in ("end_of_text", "pad", "cls", "sep", "mask"))
"""Special tokens of `bytes` (ids 256 to 260) and of a trained bpe vocabulary."""


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary. A special token's name inside a text is text: it is never read as the special token."""

    vocab_size: int
    """One more than the largest id."""
    special_ids: Mapping[str, int]
    """Id by role: end_of_text, pad, cls, sep, mask, unknown; roles that the vocabulary lacks are absent."""
    special_names: Mapping[str, str]
    """Spelling by role."""
    encode_batch: Callable[[Sequence[str]], list[np.ndarray]]
    """Ids (int64) of each text, without adding special tokens."""
    encode_offsets: Callable[[Sequence[str]], list[tuple[np.ndarray, np.ndarray]]]
    """The same ids, and beside them the characters [start, stop) of the text that each stands for: int64, (tokens, 2)."""
    decode: Callable[[Sequence[int] | np.ndarray], str]
    """Text of ids; special tokens appear by name."""

    def encode(self, text: str) -> np.ndarray:
        """Ids (int64) of one text, without adding special tokens."""
        return self.encode_batch([text])[0]

    @property
    def end_of_text(self) -> int | None:
        """Id of the token that ends a text."""
        return self.special_ids.get("end_of_text")

    @property
    def pad(self) -> int | None:
        """Id of the padding token."""
        return self.special_ids.get("pad")

    @property
    def cls(self) -> int | None:
        """Id of the token that starts a BERT sequence."""
        return self.special_ids.get("cls")

    @property
    def sep(self) -> int | None:
        """Id of the token that ends a segment of a BERT sequence."""
        return self.special_ids.get("sep")

    @property
    def mask(self) -> int | None:
        """Id of the token that stands for one to be predicted."""
        return self.special_ids.get("mask")

    @property
    def document_end(self) -> int | None:
        """Id put after each document of a GPT corpus: end_of_text, or sep in a vocabulary made for BERT."""
        return self.end_of_text if self.end_of_text is not None else self.sep


def missing_specials(tokenizer: Tokenizer, family: str) -> list[str]:
    """Special tokens that this model family needs and the vocabulary lacks, by role."""
    if family == "bert":
        return [role for role in ("pad", "cls", "sep", "mask") if role not in tokenizer.special_ids]
    return [] if tokenizer.document_end is not None else ["end_of_text"]


def byte_tokenizer() -> Tokenizer:
    """One id per UTF-8 byte (0 to 255) and five special tokens; 261 in all."""
    names = {i: name.encode() for i, name in enumerate(TRAINED_SPECIALS, 256)}
    roles = ("end_of_text", "pad", "cls", "sep", "mask")

    def encode_batch(texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]

    def encode_offsets(texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        found = []
        for text, ids in zip(texts, encode_batch(texts), strict=True):
            of = np.repeat(np.arange(len(text)), [len(character.encode()) for character in text])
            found.append((ids, np.stack([of, of + 1], axis=1)))
        return found

    def decode(ids: Sequence[int] | np.ndarray) -> str:
        return b"".join(names[i] if i > 255 else bytes([i]) for i in map(int, ids)).decode(errors="replace")

    return Tokenizer(
        vocab_size=256 + len(names),
        special_ids={role: 256 + i for i, role in enumerate(roles)},
        special_names=dict(zip(roles, TRAINED_SPECIALS, strict=True)),
        encode_batch=encode_batch,
        encode_offsets=encode_offsets,
        decode=decode,
    )


def byte_tokenizer_json() -> bytes:
    """`bytes` in the file format of the package `tokenizers`, so that other programs can use it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (b for b in range(256) if b not in printable)
    letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **flags} for i, name in enumerate(TRAINED_SPECIALS, 256)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {letters[b]: b for b in range(256)}, "merges": []},
    }
    return json.dumps(content, ensure_ascii=False).encode()


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json; `bytes` is recognised and needs no package.

    Raises RefusedInput when the file is missing or not a tokenizer.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        problem = Problem((str(path),), f"the tokenizer cannot be read: {error.strerror}", "prepare the data again")
        raise RefusedInput([problem]) from error
    return load_tokenizer_json(content, str(path))


def load_tokenizer_json(content: bytes, name: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json's content; name says where it is from. Raises RefusedInput if it is none."""
    if content == byte_tokenizer_json():
        return byte_tokenizer()
    from tokenizers import Tokenizer as Library

    try:
        return _from_library(Library.from_str(content.decode()))
    except Exception as error:  # the package raises plain Exception for a file that is not a tokenizer
        problem = Problem((name,), f"the file is not a tokenizer: {error}", "give a valid tokenizer.json")
        raise RefusedInput([problem]) from error


def _from_library(library: Any) -> Tokenizer:
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True
    vocabulary = library.get_vocab(with_added_tokens=True)
    names = {role: next((n for n in known if n in vocabulary), None) for role, known in SPECIAL_NAMES.items()}
    names = {role: name for role, name in names.items() if name is not None}

    def encode_batch(texts: Sequence[str]) -> list[np.ndarray]:
        encoded = library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(e.ids, dtype=np.int64) for e in encoded]

    def encode_offsets(texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        encoded = library.encode_batch(list(texts), add_special_tokens=False)
        return [(np.asarray(e.ids, np.int64), np.asarray(e.offsets, np.int64).reshape(-1, 2)) for e in encoded]

    def decode(ids: Sequence[int] | np.ndarray) -> str:
        return library.decode([int(i) for i in ids], skip_special_tokens=False)

    return Tokenizer(
        vocab_size=max(vocabulary.values()) + 1,
        special_ids={role: vocabulary[name] for role, name in names.items()},
        special_names=names,
        encode_batch=encode_batch,
        encode_offsets=encode_offsets,
        decode=decode,
    )
