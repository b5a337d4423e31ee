"""The memory of a preparation, parent and workers together, as the kernel counts it (PSS: shared pages once)."""

import sys
import time

import psutil
import pytest

from tests.unit.data.conftest import make_text

PREPARE = """
import sys
from disttrain.config.schema import Config
from disttrain.data import prepare
prepare(Config.model_validate_json(sys.argv[1]))
"""


def peak_bytes(config):
    """Largest sum over the process tree while a config is prepared in a process of its own."""
    process = psutil.Popen([sys.executable, "-c", PREPARE, config.model_dump_json()])
    peak = 0
    while process.poll() is None:
        total = 0
        for member in (process, *process.children(recursive=True)):
            try:
                total += member.memory_full_info().pss
            except psutil.Error:  # it ended in the meantime
                continue
        peak = max(peak, total)
        time.sleep(0.05)
    assert process.returncode == 0
    return peak


@pytest.mark.parametrize("tokenizer, megabytes", [("bytes", 100), ("bpe", 8)])
def test_preparing_stays_within_bounded_memory(config, tmp_path, tokenizer, megabytes):
    block = make_text(1_000_000)
    path = tmp_path / "big.txt"
    with open(path, "w") as file:
        for _ in range(megabytes):
            file.write(block)
    peak = peak_bytes(config(corpus="text", path=str(path), tokenizer=tokenizer, workers=2))
    assert 30e6 < peak < 400e6
