"""Proof that a layout trains exactly like one process: `disttrain verify` (docs/verify.md)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from disttrain.verify.layouts import Layout, parse, parse_list
    from disttrain.verify.matrix import full_matrix, sample, small_matrix
    from disttrain.verify.ranks import RanksFailed, run_ranks
    from disttrain.verify.verification import run

_HOMES = {
    "Layout": "layouts",
    "parse": "layouts",
    "parse_list": "layouts",
    "full_matrix": "matrix",
    "sample": "matrix",
    "small_matrix": "matrix",
    "RanksFailed": "ranks",
    "run": "verification",
    "run_ranks": "ranks",
}

__all__ = ["Layout", "RanksFailed", "full_matrix", "parse", "parse_list", "run", "run_ranks", "sample", "small_matrix"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that names of layouts need no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
