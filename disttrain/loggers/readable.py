"""Numbers as a person reads them, in a few characters."""

import math
from collections.abc import Mapping
from typing import Any

GIB = 1024**3
MIB = 1024**2


def count(value: float | None) -> str:
    """1234567 -> `1.23M`: three significant digits, decimal prefixes."""
    if value is None or not math.isfinite(value):
        return "-" if value is None else str(value)
    number, prefix = _scaled(value)
    return f"{value:.0f}" if not prefix and value == int(value) else number + prefix


def flops(value: float) -> str:
    """FLOP/s -> `3.77 TFLOP/s` (decimal prefixes)."""
    number, prefix = _scaled(value)
    return f"{number} {prefix}FLOP/s"


def joules(value: float) -> str:
    """Joules -> `4.00 kJ` (decimal prefixes)."""
    number, prefix = _scaled(value)
    return f"{number} {prefix}J"


def _scaled(value: float) -> tuple[str, str]:
    """(three significant digits, prefix)."""
    prefixes = {1.0: "", 1e3: "k", 1e6: "M", 1e9: "G", 1e12: "T", 1e15: "P"}
    scale = next((scale for scale in prefixes if abs(value) < 999.5 * scale), 1e15)
    scaled = abs(value) / scale
    digits = 0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2
    return f"{value / scale:.{digits}f}", prefixes[scale]


def size(value: float | None) -> str:
    """Bytes -> `1.21 GiB` or `340 MiB` (binary prefixes)."""
    if value is None:
        return "-"
    return f"{value / GIB:.2f} GiB" if value >= GIB else f"{value / MIB:.0f} MiB"


def duration(seconds: float | None) -> str:
    """Seconds -> `7.3 s`, `2:05`, `1:02:05` or `3d 01:02`."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, hours, days = whole // 60 % 60, whole // 3600 % 24, whole // 86400
    if days:
        return f"{days}d {hours:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def step_time(seconds: float | None) -> str:
    """Seconds of a step -> `340 ms` or `1.25 s`."""
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def loss(value: float | None) -> str:
    """A loss -> four decimals, also for nan and inf."""
    return "-" if value is None else f"{value:.4f}"


def percent(value: float | None) -> str:
    """A share -> `41.3 %`."""
    return "-" if value is None else f"{100 * value:.1f} %"


def perplexity(value: float) -> str:
    """A perplexity -> `9.488` or, from ten thousand, `50.3k`."""
    return f"{value:.4g}" if value < 9999.5 else count(value)


RIGHT = {"mlm_accuracy": "masked tokens right", "nsp_accuracy": "pairs right", "classify_accuracy": "classes right",
         "tag_accuracy": "tags right", "answer_accuracy": "windows right"}  # fmt: skip
"""What shares of right predictions are called."""
CORRELATIONS = ("matthews", "pearson", "spearman")
"""Official scores from -1 to 1, which are no shares."""


def scores(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value of each score of an eval record."""
    found = [(label, percent(record[key])) for key, label in RIGHT.items() if record.get(key) is not None]
    for key, value in record.items():
        if key.startswith("score_") and value is not None:
            name = key.removeprefix("score_")
            found.append((name.replace("_", " "), f"{value:.3f}" if name in CORRELATIONS else percent(value)))
    return found
