"""Corpora, tokenizers, memory-mapped tokens and batches (numpy; no torch).

`preflight` says what is wrong with the data settings, `prepare` makes token shards, `open_data` gives batches.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from disttrain.data.checking import preflight
    from disttrain.data.loading import Batch, Data, open_data
    from disttrain.data.preparation import Prepared, prepare, prepare_folder, verify
    from disttrain.data.tokenizer import Tokenizer, load_tokenizer

_HOMES = {
    "Batch": "loading",
    "Data": "loading",
    "open_data": "loading",
    "preflight": "checking",
    "Prepared": "preparation",
    "prepare": "preparation",
    "prepare_folder": "preparation",
    "verify": "preparation",
    "Tokenizer": "tokenizer",
    "load_tokenizer": "tokenizer",
}

__all__ = ["Batch", "Data", "Prepared", "Tokenizer", "load_tokenizer", "open_data", "preflight", "prepare",
           "prepare_folder", "verify"]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that importing the package stays cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
