"""Where a tokenizer comes from: local vocabulary files, a Hugging Face name, or training on the corpus."""

import socket
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from disttrain.config.problems import Problem, RefusedInput
from disttrain.config.schema import DataConfig
from disttrain.data.tokenizer import TRAINED_SPECIALS, byte_tokenizer_json

TRAINED = ("bpe", "wordpiece")

_BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_CHARACTERS = 1000
_GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
_GPT2_WANTED = "encoder.json and vocab.bpe, vocab.json and merges.txt, or tokenizer.json"
_BERT_WANTED = "vocab.txt, one *-vocab.txt, or tokenizer.json"


def tokenizer_json(data: DataConfig) -> bytes:
    """Content of tokenizer.json for every tokenizer that is not trained on the corpus.

    Raises RefusedInput when vocabulary files are missing or wrong, or a name cannot be loaded.
    """
    if data.tokenizer == "bytes":
        return byte_tokenizer_json()
    if data.tokenizer in TRAINED:
        raise ValueError(f"{data.tokenizer} is trained on the corpus, not loaded")
    settings = (f"data.tokenizer={data.tokenizer}", f"data.tokenizer_path={data.tokenizer_path}")
    try:
        found = _located(data)
        if found is None:
            return _from_hub(_hub_name(data), settings)
        if len(found) == 1 and found[0].name.endswith(".json"):
            return found[0].read_bytes()
        library = _gpt2(*found) if data.tokenizer == "gpt2" else _bert(found[0], data.lowercase)
        return library.to_str().encode()
    except RefusedInput:
        raise
    except Exception as error:  # the package raises plain Exception for files that it cannot read
        problem = Problem(settings, f"the vocabulary cannot be read: {error}", "check the vocabulary files")
        raise RefusedInput([problem]) from error


def reads_tokenizer_json(data: DataConfig) -> bool:
    """Whether a whole tokenizer is read from a file or the hub, which then also says whether it lower-cases."""
    if data.tokenizer in ("bytes", *TRAINED):
        return False
    found = _located(data)
    return found is None or found[0].name.endswith(".json") and len(found) == 1


def _located(data: DataConfig) -> tuple[Path, ...] | None:
    """The vocabulary files on this machine; None when only the hub can have the tokenizer."""
    folder = Path(data.tokenizer_path if data.tokenizer_path is not None else data.tokenizer).expanduser()
    if data.tokenizer_path is None and (data.tokenizer in ("gpt2", "bert") or not folder.exists()):
        return None
    settings = (f"data.tokenizer={data.tokenizer}", f"data.tokenizer_path={data.tokenizer_path}")
    if not folder.exists():
        raise RefusedInput([Problem(settings, f"{folder} does not exist", "give the folder of the vocabulary files")])
    if folder.is_file() and folder.suffix == ".json":
        return (folder,)
    wanted = {"gpt2": _GPT2_WANTED, "bert": _BERT_WANTED}.get(data.tokenizer, "tokenizer.json")
    found = {"gpt2": _gpt2_files, "bert": _bert_files}.get(data.tokenizer, _no_files)(folder, data.lowercase)
    if not found and (folder / "tokenizer.json").is_file():
        found = (folder / "tokenizer.json",)
    if not found:
        raise RefusedInput([Problem(settings, f"{folder} does not hold {wanted}", f"put {wanted} there")])
    return found


def _no_files(folder: Path, lowercase: bool) -> tuple[Path, ...]:
    return ()


def _gpt2_files(folder: Path, lowercase: bool) -> tuple[Path, ...]:
    pairs = (tuple(folder / name for name in names) for names in _GPT2_FILES)
    return next((pair for pair in pairs if all(file.is_file() for file in pair)), ())


def _bert_files(folder: Path, lowercase: bool) -> tuple[Path, ...]:
    """vocab.txt, the only *-vocab.txt, or the one whose name says that it is uncased, or is not."""
    if folder.is_file():
        return (folder,)
    if (folder / "vocab.txt").is_file():
        return (folder / "vocab.txt",)
    found = sorted(folder.glob("*-vocab.txt"))
    if len(found) > 1:
        found = [file for file in found if ("uncased" in file.name) == lowercase]
    return tuple(found) if len(found) == 1 else ()


def _hub_name(data: DataConfig) -> str:
    if data.tokenizer == "bert":
        return "bert-base-uncased" if data.lowercase else "bert-base-cased"
    return data.tokenizer


def _from_hub(name: str, settings: tuple[str, ...]) -> bytes:
    """A tokenizer of the hub: the copy of an earlier download where there is one, so that later runs need no network."""
    from huggingface_hub import hf_hub_download
    from tokenizers import Tokenizer as Library

    try:
        return Path(hf_hub_download(name, "tokenizer.json", local_files_only=True)).read_bytes()
    except (OSError, ValueError) as error:  # not there, or no name that the hub could have
        reason = "it was not downloaded before, and there is no network" if _no_network() else str(error)
    if not _no_network():
        try:
            return Library.from_pretrained(name).to_str().encode()
        except Exception as error:  # the package raises plain Exception
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    message = f"'{name}' is no known tokenizer and cannot be loaded from Hugging Face: {reason}"
    raise RefusedInput([Problem(settings, message, "use bytes, bpe or wordpiece, or give data.tokenizer_path")])


def _no_network() -> bool:
    """Whether the hub's name cannot be looked up: the package would retry for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    if urllib.request.getproxies():  # then another machine looks the name up
        return False
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return True
    return False


def _gpt2(vocabulary: Path, merges: Path) -> Any:
    """GPT-2's byte-level BPE (Radford et al. 2019)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    library = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return library


def _bert(vocabulary: Path, lowercase: bool) -> Any:
    """BERT's WordPiece (Devlin et al. 2019): cleaned, Chinese characters apart, accents stripped when lower-cased."""
    from tokenizers import Tokenizer, models

    words = vocabulary.read_text(encoding="utf-8").splitlines()
    missing = [name for name in _BERT_SPECIALS if name not in words]
    if missing:
        raise RefusedInput([Problem((str(vocabulary),), f"the vocabulary lacks {', '.join(missing)}",
                                    "give a vocabulary made for BERT")])  # fmt: skip
    if not lowercase and not any(word[:1].isupper() for word in words):
        raise RefusedInput([Problem((str(vocabulary), "data.lowercase=false"),
                                    "the vocabulary has no capital letters: every capitalised word would be unknown",
                                    "set data.lowercase=true")])  # fmt: skip
    library = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    _dress_as_bert(library, lowercase)
    library.add_special_tokens(list(_BERT_SPECIALS))
    return library


def _dress_as_bert(library: Any, lowercase: bool) -> None:
    from tokenizers import decoders, normalizers, pre_tokenizers

    library.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()


def smallest_vocabulary(kind: str) -> int:
    """Entries that a trained vocabulary has in any case: bpe's bytes and special tokens, wordpiece's special tokens."""
    return 256 + len(TRAINED_SPECIALS) if kind == "bpe" else len(_BERT_SPECIALS)


def train(kind: str, texts: list[str], vocab_size: int, lowercase: bool) -> bytes:
    """Train a vocabulary and give its tokenizer.json. The same texts in the same order give the same bytes.

    bpe: byte-level (Sennrich et al. 2016; Radford et al. 2019). wordpiece: BERT's form, of the most frequent
    characters (1,000, or a quarter of the vocabulary). Special tokens come first.
    """
    library = _train_bpe(texts, vocab_size) if kind == "bpe" else _train_wordpiece(texts, vocab_size, lowercase)
    return library.to_str().encode()


def _train_bpe(texts: list[str], vocab_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, show_progress=False,
                                  special_tokens=list(TRAINED_SPECIALS),
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    library.train_from_iterator(_batches(texts), trainer)
    return library


def _train_wordpiece(texts: list[str], vocab_size: int, lowercase: bool) -> Any:
    """The package numbers the characters inside words in the order of a hash table, and breaks ties by number: two
    trainings differ. So a first, empty training finds these characters, and the second gets them sorted."""
    from tokenizers import Tokenizer, models, trainers

    library = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    _dress_as_bert(library, lowercase)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(library.normalizer.normalize_str(text))  # pyright: ignore[reportOptionalMemberAccess]
    characters = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    characters = characters[: min(_CHARACTERS, vocab_size // 4)]  # each may come twice, alone and inside a word
    words = list(_BERT_SPECIALS)
    for size in (1, vocab_size):
        trainer = trainers.WordPieceTrainer(vocab_size=size, min_frequency=2, show_progress=False,
                                            special_tokens=words, initial_alphabet=characters,
                                            limit_alphabet=len(characters))  # fmt: skip
        library.train_from_iterator(_batches(texts), trainer)
        vocabulary = library.get_vocab(with_added_tokens=False)
        words += sorted(word for word in vocabulary if word.startswith("##") and len(word) == 3)
    trained = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))  # without the characters as added tokens
    _dress_as_bert(trained, lowercase)
    trained.add_special_tokens(list(_BERT_SPECIALS))
    return trained


def _batches(texts: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(texts), 64):
        yield texts[start : start + 64]
