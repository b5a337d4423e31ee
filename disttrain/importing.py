"""Imports of much at once. Imports no torch.

What is imported stays until the end. Python's garbage collector looks through it again and again all the same: a sixth of
the time of importing torch, and a third of it once more when the process ends (CPython 3.11).
"""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_once() -> Iterator[None]:
    """A block of imports, in which nothing is collected. What is there after it is never looked through again, and what is
    there when the process ends is left to the system."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.freeze)
        if was_enabled:
            gc.enable()
