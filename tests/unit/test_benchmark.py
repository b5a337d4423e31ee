"""The throughput benchmark runs end to end on a tiny model, and its ratios are those of interleaved repeats."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = """
model: {layers: 1, hidden_size: 16, heads: 2, max_positions: 16}
data: {corpus: python-docs, tokenizer: bytes, sequence_length: 16, max_bytes: 100000}
train: {steps: 3, global_batch_size: 2, micro_batch_size: 2}
"""


def module(name: str) -> ModuleType:
    """A file of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_bare_loop_and_ceiling_run_and_are_reported(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    options = "--contestants ceiling bare --ranks 1 --precision fp32 --steps 2 --warmup 1 --repeats 1 --threads 1"
    command = [sys.executable, str(BENCHMARKS / "throughput.py"), *options.split()]
    command += ["--config", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "result")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "result.json").read_text())
    ceiling, bare = content["runs"]
    assert (ceiling["contestant"], bare["contestant"]) == ("ceiling", "bare")
    assert ceiling["tokens_per_second"] > bare["tokens_per_second"] > 0
    assert bare["host_bytes"] > 50 * 2**20
    # 12 H^2 weights a layer and the head, 6 operations each and token; attention 12 S H a layer and token.
    vocab = content["workload"]["vocab_size"]
    flops_per_token = 6 * (12 * 16**2 + 16 * vocab) + 12 * 16 * 16
    assert ceiling["flops_per_second"] / ceiling["tokens_per_second"] == pytest.approx(flops_per_token)
    assert content["about"]["threads_per_rank"] == 1
    text = (tmp_path / "result.md").read_text()
    assert "## fp32, 1 rank\n" in text and "| bare PyTorch loop | " in text


def test_a_contestant_that_fails_ends_the_benchmark_with_its_output(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)  # for the modules it imports
    throughput = module("throughput")
    program = "import os; print('out of', os.environ['OMP_NUM_THREADS'] + os.environ['RANK']); raise SystemExit(3)"
    commands = [[sys.executable, "-c", "pass"], [sys.executable, "-c", program]]
    with pytest.raises(RuntimeError, match=r"(?s)ended with 3.*out of 71"):
        throughput.execute(commands, tmp_path, 7, [{"RANK": "0"}, {"RANK": "1"}])


def test_ratios_are_medians_of_the_ratios_within_a_repeat():
    report = module("report")

    def run(contestant, repeat, speed, mebibytes, flops=None):
        return SimpleNamespace(
            contestant=contestant,
            repeat=repeat,
            tokens_per_second=speed,
            flops_per_second=flops,
            host_bytes=mebibytes * 2**20,
            device_bytes=None,
        )

    # The machine is half as fast in the second repeat and twice as fast in the third: the ratios are 0.9, 0.8, 0.85.
    runs = [run("bare", i, speed, 100) for i, speed in enumerate((1000, 500, 2000))]
    runs += [run("disttrain", i, speed, 110) for i, speed in enumerate((900, 400, 1700))]
    runs += [run("ceiling", i, speed, 50, 2e12) for i, speed in enumerate((2000, 1000, 4000))]
    rows = report.table(runs).splitlines()[2:]
    assert rows == [
        "| bare PyTorch loop | 1,000 (500 to 2,000) | 1.000 | 50 % | 100 MiB | 1.000 |",
        "| disttrain | 900 (400 to 1,700) | 0.850 | 42 % | 110 MiB | 1.100 |",
        "| matrix products alone | 2,000 (1,000 to 4,000) | 2.000 | 2.000 TFLOP/s | | |",
    ]


def test_the_parameter_count_is_the_model_s():
    from disttrain.config.schema import ModelConfig
    from disttrain.models import build_model

    shape = {"layers": 3, "hidden_size": 32, "heads": 2, "vocab_size": 50}
    config = ModelConfig(max_positions=24, ffn_hidden_size=128, layer_norm_epsilon=1e-5, **shape)
    counted = sum(p.numel() for p in build_model(config, seed=0).parameters())
    assert module("report").parameter_count({**shape, "sequence_length": 24}) == counted


def test_described_hardware_names_no_host():
    report = module("report")
    about = report.describe("cpu", 1, "command")
    import socket

    assert socket.gethostname() not in json.dumps(about).split('"')
    assert about["cores"] >= 1 and about["versions"]["torch"]
    assert report.file_name({**about, "cpu": "AMD EPYC (tm) 9", "cores": 2, "date": "2026-11-02"}) == (
        "throughput_amd-epyc-tm-9-2-cores_202611"
    )
