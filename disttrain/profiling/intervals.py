"""Sets of moments: lists of (start, end), ascending and apart, in seconds."""

from collections.abc import Iterable

Interval = tuple[float, float]
Intervals = list[Interval]


def union(*parts: Iterable[Interval]) -> Intervals:
    """What is in any of them; parts may overlap and come in any order."""
    joined: Intervals = []
    for start, end in sorted(interval for part in parts for interval in part):
        if end <= start:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def common(a: Intervals, b: Intervals) -> Intervals:
    """What is in both."""
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            found.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def without(a: Intervals, b: Intervals) -> Intervals:
    """What is in a and not in b."""
    left, j = [], 0
    for start, end in a:
        while j < len(b) and b[j][1] <= start:
            j += 1
        at = j
        while at < len(b) and b[at][0] < end:
            if b[at][0] > start:
                left.append((start, b[at][0]))
            start = max(start, b[at][1])
            at += 1
        if start < end:
            left.append((start, end))
    return left


def seconds(a: Intervals) -> float:
    """How long it is in all."""
    return sum(end - start for start, end in a)
