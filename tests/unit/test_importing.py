"""Imports without the garbage collector, which is as it was afterwards."""

import gc
import subprocess
import sys

import pytest

from disttrain.importing import at_once


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_within_and_nothing_looked_through_later(enabled: bool) -> None:
    before, was = gc.get_freeze_count(), gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        with at_once():
            kept = [[] for _ in range(1000)]
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
        assert gc.get_freeze_count() >= before + 900 < before + len(kept)
        with pytest.raises(ImportError), at_once():
            raise ImportError
        assert gc.isenabled() == enabled
    finally:
        gc.enable() if was else gc.disable()


def test_the_end_of_the_process_looks_through_nothing() -> None:
    code = (
        "import atexit, gc\n"
        "from disttrain.importing import at_once\n"
        "atexit.register(lambda: print(gc.get_freeze_count() >= frozen + 900))\n"  # what is registered first is last
        "with at_once(): pass\n"
        "frozen, kept = gc.get_freeze_count(), [[] for _ in range(1000)]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
