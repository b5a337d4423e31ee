"""Measuring: exact numbers under a clock that the test turns, and a table that documents every key."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from disttrain import metrics
from disttrain.config.schema import ParallelConfig
from disttrain.mesh import build_mesh
from disttrain.metrics import (
    METRICS,
    FlopsPerSequence,
    Metrics,
    RankReading,
    SteadyRates,
    StepReading,
    Throughput,
    flop_rates,
    keys,
    ranks,
    rates,
    read_rank,
    reduce_ranks,
    unknown_keys,
)

ROOT = Path(__file__).parents[2]


class Clock:
    """Seconds that pass only when the test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def pass_(self, seconds):
        self.now += seconds


def timed_step(meter, clock, seconds, **counts):
    meter.begin_step()
    clock.pass_(seconds)
    return meter.end_step(**{"tokens": 0, "target_tokens": 0, **counts})


def test_one_step_gives_exact_times_and_rates():
    clock = Clock()
    meter = Throughput(clock, warmup_steps=0)
    assert timed_step(meter, clock, 0.5, tokens=96, target_tokens=90, padded_tokens=32, sequences=8) == 0.5
    assert rates(meter.interval(), ranks=4) == {
        "interval_steps": 1,
        "warmup": False,
        "profiled": False,
        "step_seconds": 0.5,
        "tokens_per_second": 192.0,
        "tokens_per_second_per_rank": 48.0,
        "sequences_per_second": 16.0,
        "target_tokens": 90.0,
        "padded_tokens": 32.0,
    }


def test_an_interval_of_several_steps_averages_over_them_and_starts_anew():
    clock = Clock()
    meter = Throughput(clock, warmup_steps=0)
    timed_step(meter, clock, 0.25)  # counts are read from the device with the last step only
    timed_step(meter, clock, 0.25)
    timed_step(meter, clock, 1.0, tokens=300, target_tokens=270, sequences=6)
    got = rates(meter.interval(), ranks=1)
    assert (got["interval_steps"], got["step_seconds"], got["tokens_per_second"]) == (3, 0.5, 200.0)
    assert got["target_tokens"] == 90.0
    timed_step(meter, clock, 2.0, tokens=10)
    assert rates(meter.interval(), ranks=1)["tokens_per_second"] == 5.0
    with pytest.raises(ValueError, match="at least one step"):
        rates(meter.interval(), ranks=1)


def test_excluded_blocks_are_in_elapsed_time_and_in_no_step_inside_or_outside_it():
    clock = Clock()
    meter = Throughput(clock, warmup_steps=0)
    meter.begin_step()
    clock.pass_(1.0)
    with meter.excluded("logging"):
        clock.pass_(8.0)
    clock.pass_(1.0)
    assert meter.end_step(tokens=4, target_tokens=4) == 2.0
    with meter.excluded("evaluation"):
        clock.pass_(16.0)
        with meter.excluded("logging"):
            clock.pass_(4.0)
        clock.pass_(16.0)
    meter.pause("checkpoint")
    clock.pass_(64.0)
    meter.resume()
    assert meter.excluded_seconds == {"evaluation": 32.0, "checkpoint": 64.0, "logging": 12.0, "choosing": 0.0,
                                      "profiling": 0.0}  # fmt: skip
    assert meter.train_seconds == 2.0
    assert meter.elapsed_seconds == 2.0 + 32 + 64 + 12
    assert rates(meter.interval(), 1)["tokens_per_second"] == 2.0


def test_an_excluded_block_ends_when_its_body_raises():
    clock = Clock()
    meter = Throughput(clock)
    with pytest.raises(OSError), meter.excluded("checkpoint"):
        clock.pass_(1.0)
        raise OSError
    meter.begin_step()


def test_wrong_order_is_refused():
    meter = Throughput(Clock())
    with pytest.raises(RuntimeError):
        meter.end_step(tokens=1, target_tokens=1)
    with pytest.raises(RuntimeError):
        meter.resume()
    with pytest.raises(ValueError, match="'coffee'"):
        meter.pause("coffee")
    meter.begin_step()
    with pytest.raises(RuntimeError):
        meter.begin_step()


def test_elapsed_time_starts_when_told_or_with_the_first_step():
    clock = Clock()
    meter = Throughput(clock)
    clock.pass_(100.0)
    assert meter.elapsed_seconds == 0.0
    meter.start()
    clock.pass_(1.0)
    timed_step(meter, clock, 1.0)
    assert meter.elapsed_seconds == 2.0


def test_warmup_is_in_the_totals_and_in_no_average():
    clock = Clock()
    meter = Metrics(ranks=2, warmup_steps=3, clock=clock)
    for step, seconds in enumerate((100.0, 10.0, 10.0, 1.0, 4.0, 1.0), start=1):
        timed_step(meter.throughput, clock, seconds, tokens=60, target_tokens=60, sequences=6)
        record = meter.step_record(StepReading(step, {"lm": 1.0}, 0.1))
        assert record["warmup"] is (step <= 3)
    end = meter.summary_record(6, "steps")
    assert (end["tokens_seen"], end["train_seconds"], end["elapsed_seconds"]) == (360, 126.0, 126.0)
    assert (end["measured_steps"], end["mean_step_seconds"], end["median_step_seconds"]) == (3, 2.0, 1.0)
    assert (end["tokens_per_second_mean"], end["tokens_per_second_per_rank_mean"]) == (30.0, 15.0)
    assert end["sequences_per_second_mean"] == 3.0


def test_a_run_of_warmup_steps_only_has_no_average():
    clock = Clock()
    meter = Metrics(ranks=1, clock=clock)
    timed_step(meter.throughput, clock, 1.0, tokens=1)
    meter.step_record(StepReading(1, {"lm": 1.0}, 0.1))
    end = meter.summary_record(1, "steps")
    assert (end["tokens_per_second_mean"], end["median_step_seconds"], end["measured_steps"]) == (None, None, 0)


def test_an_interval_that_holds_a_warmup_step_is_left_out_whole():
    clock = Clock()
    meter = Throughput(clock, warmup_steps=3)
    steady = SteadyRates()
    for step in range(1, 11):
        timed_step(meter, clock, 9.0 if step <= 3 else 1.0, tokens=10)
        if step % 5 == 0:
            steady.add(rates(meter.interval(), 1))
    assert steady.result()["measured_steps"] == 5
    assert steady.result()["tokens_per_second_mean"] == 10.0


def test_averages_are_total_work_over_total_time():
    steady = SteadyRates()
    for seconds, tokens in ((1.0, 100.0), (3.0, 20.0)):
        steady.add(
            {"warmup": False, "interval_steps": 1, "step_seconds": seconds, "tokens_per_second": tokens / seconds}
        )
    assert steady.result()["tokens_per_second_mean"] == 30.0  # the mean of the two rates would be 53.3
    assert steady.result()["mfu_causal_mean"] is None


def test_flop_rates_are_exact_and_null_without_a_peak():
    flops = FlopsPerSequence(causal=100.0, full=120.0, hardware=160.0, six_n=80.0, positions=32)
    whole = {"tokens_per_second": 256.0, "sequences_per_second": 8.0}
    got = flop_rates(whole, 4, flops, peak_flops=400.0)
    shares = {"mfu_six_n": 0.4, "mfu_causal": 0.5, "mfu_full": 0.6, "hfu": 0.8}
    assert got == {"model_flops_per_second_per_rank": 200.0, **shares}
    blind = flop_rates(whole, 4, flops, peak_flops=None)
    assert blind == {"model_flops_per_second_per_rank": 200.0, **dict.fromkeys(shares)}
    assert set(flop_rates(whole, 4, None, 400.0).values()) == {None}
    assert set(flop_rates({**whole, "tokens_per_second": None}, 4, flops, 400.0).values()) == {None}
    assert json.dumps(blind["hfu"]) == "null"


def test_padding_is_executed_but_no_use_to_the_model():
    """Half of the positions are padding: model FLOPs are of the real tokens, HFU of what the hardware did."""
    flops = FlopsPerSequence(causal=100.0, full=120.0, hardware=160.0, six_n=80.0, positions=32)
    got = flop_rates({"tokens_per_second": 128.0, "sequences_per_second": 8.0}, 4, flops, peak_flops=400.0)
    assert (got["mfu_six_n"], got["mfu_causal"], got["mfu_full"], got["hfu"]) == (0.2, 0.25, 0.3, 0.8)


def test_a_profiled_interval_is_in_the_totals_and_in_no_average():
    clock = Clock()
    meter = Metrics(ranks=1, warmup_steps=0, clock=clock)
    for step, seconds in enumerate((1.0, 50.0, 3.0), start=1):
        timed_step(meter.throughput, clock, seconds, tokens=10, profiled=step == 2)
        assert meter.step_record(StepReading(step, {"lm": 1.0}, 0.1))["profiled"] is (step == 2)
    end = meter.summary_record(3, "steps")
    assert (end["tokens_seen"], end["train_seconds"], end["measured_steps"]) == (30, 54.0, 2)
    assert (end["tokens_per_second_mean"], end["mean_step_seconds"]) == (5.0, 2.0)


def test_energy_is_known_when_every_rank_knows_its_part():
    clock = Clock()
    meter = Metrics(ranks=2, warmup_steps=1, clock=clock)
    for step, parts in enumerate(((7.0, 0.0), (2.0, 0.0), (4.0, 6.0)), start=1):
        timed_step(meter.throughput, clock, 1.0, tokens=4)
        readings = [RankReading(rank, energy_joules=joules) for rank, joules in enumerate(parts)]
        record = meter.step_record(StepReading(step, {"lm": 1.0}, 0.1, ranks=readings))
        assert (record["energy_joules"], record["joules_per_token"]) == (sum(parts), sum(parts) / 4)
    end = meter.summary_record(3, "steps")
    assert (end["energy_joules"], end["joules_per_token_mean"]) == (19.0, 12.0 / 8)
    resumed = Metrics(ranks=2, warmup_steps=0, clock=clock)
    resumed.load_state_dict(meter.state_dict())
    timed_step(resumed.throughput, clock, 1.0, tokens=4)
    one_is_blind = [RankReading(0, energy_joules=1.0), RankReading(1)]
    assert resumed.step_record(StepReading(4, {"lm": 1.0}, 0.1, ranks=one_is_blind))["energy_joules"] is None
    assert resumed.summary_record(4, "steps")["energy_joules"] is None  # of a part there would be too little


def test_totals_continue_after_a_resume_and_warmup_counts_anew():
    clock = Clock()
    before = Metrics(ranks=1, warmup_steps=1, clock=clock)
    for _ in range(2):
        timed_step(before.throughput, clock, 2.0, tokens=8, skipped=True)
    before.eval_record(2, {"lm": 1.5})
    with before.throughput.excluded("checkpoint"):
        clock.pass_(1.0)
        state = json.loads(json.dumps(before.state_dict()))
    clock.pass_(1000.0)  # the process is gone for a while
    after = Metrics(ranks=1, warmup_steps=1, clock=clock)
    after.load_state_dict(state)
    timed_step(after.throughput, clock, 2.0, tokens=8)
    record = after.step_record(StepReading(3, {"lm": 1.0}, 0.1))
    assert record["warmup"] is True
    assert (record["tokens_seen"], record["skipped_steps"]) == (24, 2)
    assert (record["train_seconds"], record["elapsed_seconds"]) == (6.0, 7.0)
    end = after.summary_record(3, "steps")
    assert (end["best_eval_loss"], end["best_eval_step"]) == (1.5, 2)


def test_the_worst_rank_is_named():
    got = reduce_ranks(
        [
            RankReading(0, 10, 40, 7, 5, comm_bytes=100, comm_bytes_uncompressed=400, data_seconds=0.5),
            RankReading(1, 30, 40, 6, 6, comm_bytes=300, comm_bytes_uncompressed=400, data_seconds=2.0),
            RankReading(2, 30, None, 9, 4, compute_seconds=3.0),
        ],
        interval_steps=4,
    )
    assert got == {
        "peak_allocated_bytes_max": 30,
        "peak_allocated_bytes_max_rank": 1,
        "peak_reserved_bytes_max": 40,
        "peak_reserved_bytes_max_rank": 0,
        "host_rss_bytes_max": 9,
        "host_rss_bytes_max_rank": 2,
        "host_rss_current_bytes_max": 6,
        "comm_bytes_per_step": 75.0,
        "comm_bytes_uncompressed_per_step": 100.0,
        "wire_bytes_per_step": 0.0,
        "data_seconds": 0.5,
        "own_seconds_max": 0.75,
        "own_seconds_max_rank": 2,
        "own_seconds_median": 0.5,
        "pipeline_bubble_fraction": None,
    }
    with pytest.raises(ValueError):
        reduce_ranks([])


def test_the_bubble_is_the_idle_share_of_all_ranks_time():
    busy = [(6.0, 8.0), (3.0, 8.0), (8.0, 8.0), (3.0, 8.0)]
    readings = [RankReading(i, pipeline_busy_seconds=b, pipeline_seconds=t) for i, (b, t) in enumerate(busy)]
    assert reduce_ranks(readings, interval_steps=3)["pipeline_bubble_fraction"] == 1 - 20 / 32
    asleep = [RankReading(0, pipeline_busy_seconds=0.0, pipeline_seconds=0.0)]  # no step since the last record
    assert reduce_ranks(asleep)["pipeline_bubble_fraction"] is None


def test_the_measured_bubble_stands_beside_the_theory_and_both_are_null_without_a_pipeline():
    clock = Clock()
    for theory, times in ((0.2, (3.0, 4.0)), (None, (None, None))):
        meter = Metrics(2, warmup_steps=0, clock=clock, bubble_theory=theory)
        timed_step(meter.throughput, clock, 1.0, tokens=1)
        meter.step_record(StepReading(1, {"lm": 1.0}, 0.1, ranks=[RankReading(0, None, None, 1, 1, 0, 0, 0.0, *times)]))
        end = meter.summary_record(1, "steps")
        measured = None if theory is None else 0.25
        assert (end["pipeline_bubble_fraction"], end["pipeline_bubble_fraction_theory"]) == (measured, theory)


@pytest.mark.parametrize(
    "parallel",
    [
        {},
        {"tensor": 8},
        {"pipeline": 4, "tensor": 2},
        {"context": 4, "zero": 3},
        {"tensor": 2, "pipeline": 2, "context": 2},
    ],
)
def test_rates_are_of_the_world_and_a_rank_is_credited_with_its_share_whatever_the_layout(parallel):
    """8 ranks, 16 sequences of 32 tokens in 2 s: data ranks times their share is 16 under every layout."""
    world, mesh = 8, build_mesh(ParallelConfig(**parallel), 8)
    share = 16 // mesh.data_ranks
    assert share * mesh.data_ranks == 16
    clock = Clock()
    meter = Metrics(world, FlopsPerSequence(100.0, 120.0, 160.0, 80.0, 32), 1000.0, warmup_steps=0, clock=clock)
    sequences = share * mesh.data_ranks
    timed_step(meter.throughput, clock, 2.0, tokens=sequences * 32, target_tokens=sequences * 31, sequences=sequences)
    record = meter.step_record(StepReading(1, {"lm": 1.0}, 0.1))
    assert (record["tokens_per_second"], record["tokens_per_second_per_rank"]) == (256.0, 32.0)
    assert (record["sequences_per_second"], record["model_flops_per_second_per_rank"]) == (8.0, 100.0)
    assert (record["mfu_six_n"], record["mfu_causal"]) == (0.08, 0.1)
    assert (record["mfu_full"], record["hfu"]) == (0.12, 0.16)


def test_this_process_on_a_cpu_has_host_memory_and_no_device_memory():
    reading = read_rank(3, "cpu", comm_bytes=5)
    assert (reading.rank, reading.peak_allocated_bytes, reading.peak_reserved_bytes) == (3, None, None)
    assert reading.comm_bytes == 5
    assert reading.host_rss_bytes is not None and reading.host_rss_current_bytes is not None
    assert 2**20 < reading.host_rss_current_bytes <= reading.host_rss_bytes < 2**40


def test_device_memory_comes_from_the_cuda_allocator(monkeypatch):
    cuda = SimpleNamespace(max_memory_allocated=lambda: 11, max_memory_reserved=lambda: 22)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    reading = read_rank(0, "cuda")
    assert (reading.peak_allocated_bytes, reading.peak_reserved_bytes) == (11, 22)


def test_peak_memory_without_proc_agrees_within_reason(tmp_path):
    peak, current = ranks.host_rss_bytes(tmp_path / "no_such_file")
    usual_peak, usual_current = ranks.host_rss_bytes()
    assert usual_peak / 4 < peak < usual_peak * 4 + 2**30
    assert usual_current / 2 < current < usual_current * 2


@pytest.mark.skipif(not ranks.PROC_STATUS.exists(), reason="needs /proc: elsewhere the parent's peak cannot be told")
def test_a_child_does_not_report_the_peak_of_the_process_that_started_it():
    child = "from disttrain.metrics.ranks import host_rss_bytes; print(host_rss_bytes()[0])"
    parent = (
        "import subprocess, sys; block = bytearray(400 * 2**20); block[::4096] = b'x' * len(block[::4096]);"
        f"subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    )
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) < 200 * 2**20


def bert_metrics(clock):
    meter = Metrics(2, FlopsPerSequence(1e9, 1e9, 2e9, 1e9, 128), 1e12, warmup_steps=0, clock=clock)
    timed_step(meter.throughput, clock, 1.0, tokens=100, target_tokens=15, padded_tokens=28, sequences=1)
    return meter


def test_the_terms_of_a_bert_add_up_and_perplexity_is_of_the_masked_tokens():
    meter = bert_metrics(Clock())
    record = meter.step_record(StepReading(1, {"mlm": 2.0, "nsp": 0.5}, 0.1, ranks=[read_rank(0, "cpu")]))
    assert (record["loss"], record["loss_mlm"], record["loss_nsp"]) == (2.5, 2.0, 0.5)
    held_out = meter.eval_record(1, {"mlm": 1.0, "nsp": 0.5}, {"mlm_accuracy": 0.25, "nsp_accuracy": 0.75}, 64)
    assert (held_out["eval_loss"], held_out["eval_loss_mlm"], held_out["eval_loss_nsp"]) == (1.5, 1.0, 0.5)
    assert held_out["perplexity"] == math.e
    assert (held_out["mlm_accuracy"], held_out["eval_sequences"]) == (0.25, 64)
    end = meter.summary_record(1, "steps")
    assert (end["loss"], end["eval_loss"], end["nsp_accuracy"]) == (2.5, 1.5, 0.75)


def test_one_objective_has_no_terms_and_perplexity_may_overflow():
    meter = Metrics(1)
    record = meter.eval_record(1, {"lm": 710.0})
    assert record["eval_loss"] == 710.0 and "eval_loss_lm" not in record
    assert record["perplexity"] == math.inf
    assert metrics.perplexity({"nsp": 1.0}) is None
    assert math.isnan(meter.eval_record(2, {"mlm": math.inf, "nsp": -math.inf})["eval_loss"])
    with pytest.raises(ValueError, match="at least one objective"):
        meter.eval_record(1, {})


def test_the_best_held_out_loss_is_remembered_and_nan_is_never_best():
    meter = bert_metrics(Clock())
    for step, loss in ((1, math.nan), (2, 3.0), (3, 2.0), (4, 2.5)):
        meter.eval_record(step, {"lm": loss})
    meter.step_record(StepReading(4, {"lm": 2.0}, 0.1))
    end = meter.summary_record(4, "steps")
    assert (end["best_eval_loss"], end["best_eval_step"], end["eval_loss"]) == (2.0, 3, 2.5)


def test_every_key_of_a_real_record_is_documented_for_its_kind():
    meter = bert_metrics(Clock())
    step = meter.step_record(StepReading(1, {"mlm": 2.0, "nsp": 0.5}, 0.1, 1.0, 1.0, 2.0, ranks=[read_rank(0, "cpu")]))
    held_out = meter.eval_record(1, {"mlm": 1.0, "nsp": 0.5}, {"mlm_accuracy": 0.2, "nsp_accuracy": 0.7}, 8)
    for record in (step, held_out, meter.summary_record(1, "steps")):
        assert unknown_keys(record) == []
    assert unknown_keys({"kind": "step", "speed": 1}) == ["speed"]
    assert unknown_keys({"kind": "step", "perplexity": 1}) == ["perplexity"]
    made = {*step, *held_out, *meter.summary_record(1, "steps")}
    by_composite = {"time", "non_finite"}
    task = meter.eval_record(
        2, {"tag": 1.0}, {f"{n}_accuracy": 0.5 for n in ("classify", "tag", "answer")} | {"score_f1": 0.5}
    )
    assert unknown_keys(task) == [] and unknown_keys({**task, "kind": "step"})
    made |= {metrics.keys.SCORES if key == "score_f1" else key for key in task}
    for name, metric in METRICS.items():
        if {"step", "eval", "summary"} & set(metric.kinds):
            assert name in made | by_composite, f"{name} is documented and no record holds it"


CONTRACT = [
    "step",
    "tokens_seen",
    "loss",
    "learning_rate",
    "grad_norm",
    "loss_scale",
    "skipped_steps",
    "step_seconds",
    "tokens_per_second",
    "tokens_per_second_per_rank",
    "model_flops_per_second_per_rank",
    "mfu_causal",
    "mfu_full",
    "hfu",
    "peak_allocated_bytes_max",
    "peak_reserved_bytes_max",
    "host_rss_bytes_max",
    "comm_bytes_per_step",
    "comm_bytes_uncompressed_per_step",
    "wire_bytes_per_step",
    "pipeline_bubble_fraction",
    "pipeline_bubble_fraction_theory",
]


def test_the_keys_of_the_contract_are_in_a_step_record():
    record = bert_metrics(Clock()).step_record(StepReading(1, {"lm": 1.0}, 0.1))
    assert set(CONTRACT) <= set(record)


def test_no_key_is_documented_twice():
    names = [metric.name for metric in keys._ALL]
    assert len(names) == len(set(names))


def test_the_document_holds_the_tables():
    text = (ROOT / "docs" / "measurement.md").read_text()
    table = text.split("<!-- tables -->\n")[1].split("<!-- end of tables -->")[0]
    assert table.strip() == metrics.markdown_tables().strip(), "paste `python -m disttrain.metrics` into the document"


def test_measuring_logging_and_reporting_import_no_torch(tmp_path):
    program = f"""
import sys
from pathlib import Path
from disttrain.config.schema import Config, LogConfig
from disttrain.loggers import open_loggers
from disttrain.metrics import Metrics, StepReading, read_rank
from disttrain.report import loss_curve, read_run, summary_table
folder = Path({str(tmp_path)!r})
meter = Metrics(1)
with open_loggers(Config(log=LogConfig(tensorboard=True, console="plain")), folder, {{}}, None) as loggers:
    meter.throughput.begin_step()
    meter.throughput.end_step(1, 1)
    loggers.write(meter.step_record(StepReading(1, {{"lm": 1.0}}, 0.1, ranks=[read_rank(0, "cpu")])))
run = read_run(folder)
summary_table(run)
loss_curve(run, folder / "loss.png")
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
