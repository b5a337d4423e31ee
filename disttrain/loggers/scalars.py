"""What of a record a plotting sink takes: finite or not, the numbers, under their documented keys."""

from typing import Any

_PREFIX = {"step": "train", "eval": "eval"}
_NOT_PLOTTED = {"step", "time"}


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """`train/<key>` of a step record, `eval/<key>` of an eval record; empty for other kinds."""
    prefix = _PREFIX.get(record["kind"])
    if prefix is None:
        return {}
    return {
        f"{prefix}/{key}": value
        for key, value in record.items()
        if key not in _NOT_PLOTTED and isinstance(value, int | float) and not isinstance(value, bool)
    }
