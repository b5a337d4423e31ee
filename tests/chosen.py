"""Which of many alike cases `make test` and `make test-real` take; all where DISTTRAIN_EVERY_CASE is 1, as in test-all."""

import os
from collections.abc import Iterable
from typing import TypeVar

ALL = os.environ.get("DISTTRAIN_EVERY_CASE") == "1"

Case = TypeVar("Case")


def chosen(cases: Iterable[Case], every: int) -> list[Case]:
    """The first, and every so-manieth after it."""
    return list(cases)[:: 1 if ALL else every]
