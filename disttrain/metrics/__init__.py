"""What is measured of a run: names, units, formulas (`keys`), clocks, rates, memory, and the records of metrics.jsonl.

`docs/measurement.md` says the same in prose; a test keeps its tables equal to `METRICS`.
"""

from disttrain.metrics import energy
from disttrain.metrics.keys import METRICS, Metric, markdown_tables, unknown_keys
from disttrain.metrics.ranks import RankReading, read_rank, reduce_ranks
from disttrain.metrics.records import Metrics, StepReading, perplexity
from disttrain.metrics.throughput import FlopsPerSequence, Interval, SteadyRates, Throughput, flop_rates, rates

__all__ = [
    "METRICS",
    "FlopsPerSequence",
    "Interval",
    "Metric",
    "Metrics",
    "RankReading",
    "SteadyRates",
    "StepReading",
    "Throughput",
    "energy",
    "flop_rates",
    "markdown_tables",
    "perplexity",
    "rates",
    "read_rank",
    "reduce_ranks",
    "unknown_keys",
]
