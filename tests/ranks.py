"""Run a function on several ranks: the product's own."""

from disttrain.verify.ranks import RanksFailed, run_ranks

__all__ = ["RanksFailed", "run_ranks"]
