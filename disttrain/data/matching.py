"""Whether prepared tokens and tokenizers fit a config."""

from disttrain.config.checks import given
from disttrain.config.problems import Problem
from disttrain.config.schema import Config
from disttrain.data.files import sha256_file
from disttrain.data.shards import TOKENIZER, Index, shard_problems
from disttrain.data.tokenizer import Tokenizer, missing_specials


def token_problems(config: Config, index: Index) -> list[Problem]:
    """Why prepared tokens do not serve this config: damage that sizes show, another tokenizer, another unit."""
    where = f"data.path={index.folder}"
    problems = shard_problems(index, checksums=False)
    vocabulary = index.folder / TOKENIZER
    if not vocabulary.is_file() or sha256_file(vocabulary) != index.tokenizer_sha256:
        problems.append(Problem((f"data.path={vocabulary}",), "the tokenizer of the tokens is missing or was changed",
                                "copy the folder again, or prepare the data again"))  # fmt: skip
    if given(config, "data.tokenizer") and config.data.tokenizer != index.tokenizer:
        problems.append(Problem((f"data.tokenizer={config.data.tokenizer}", where),
                                f"the tokens were made with the tokenizer {index.tokenizer}",
                                f"remove data.tokenizer, or set it to {index.tokenizer}"))  # fmt: skip
    family = config.model.family
    if family == "bert" and index.unit != "sentence":
        problems.append(Problem(("model.family=bert", where), "the tokens were prepared without sentence boundaries",
                                "prepare them again from a config with model.family=bert"))  # fmt: skip
    if family == "gpt" and index.unit != "document":
        problems.append(Problem(("model.family=gpt", where),
                                "the tokens were prepared as BERT's sentences, without white space or end-of-text",
                                "prepare them again from a config with model.family=gpt"))  # fmt: skip
    return problems


def blend_problems(indexes: list[Index]) -> list[Problem]:
    """Prepared tokens of one blend whose tokenizers differ."""
    first = indexes[0]
    return [Problem((f"path={first.folder}", f"path={other.folder}"), "the tokens have different tokenizers",
                    "prepare both with the same tokenizer.json")
            for other in indexes[1:] if other.tokenizer_sha256 != first.tokenizer_sha256]  # fmt: skip


def tokenizer_problems(config: Config, tokenizer: Tokenizer, name: str) -> list[Problem]:
    """A vocabulary that is too large for the model, or lacks tokens that its family needs."""
    problems = vocabulary_problems(config, tokenizer.vocab_size)
    if missing := missing_specials(tokenizer, config.model.family):
        problems.append(Problem((f"data.tokenizer={name}", f"model.family={config.model.family}"),
                                f"the vocabulary has no token for {', '.join(missing)}",
                                "use bytes, bpe or wordpiece, or another vocabulary"))  # fmt: skip
    return problems


def vocabulary_problems(config: Config, vocab_size: int) -> list[Problem]:
    """A tokenizer with more entries than the model has rows."""
    rows = config.model.vocab_size
    if rows is None or vocab_size <= rows:
        return []
    return [Problem((f"model.vocab_size={rows}", f"data.tokenizer={config.data.tokenizer}"),
                    f"the tokenizer has {vocab_size:,} entries, more than the model has rows",
                    f"set model.vocab_size={vocab_size} or leave it out")]  # fmt: skip
