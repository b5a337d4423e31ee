"""The report of one run reads its folder alone, and says what is not known and why."""

import math
import struct

import numpy as np
import pytest
from rich.console import Console

from disttrain.config.problems import RefusedInput
from disttrain.loggers.jsonl import encode
from disttrain.report import loss_curve, loss_figure, read_run, summary_table

HEADER = {
    "kind": "header",
    "name": "gpt_tiny",
    "world_size": 2,
    "peak_flops_source": "no datasheet figure for this CPU",
}


def step(n, loss, seconds=0.5, warmup=False, **more):
    record = {"kind": "step", "step": n, "tokens_seen": 100 * n, "loss": loss, "interval_steps": 1, "warmup": warmup}
    record |= {"step_seconds": seconds, "tokens_per_second": 100 / seconds, "tokens_per_second_per_rank": 50 / seconds}
    record |= {
        "sequences_per_second": 1.0,
        "model_flops_per_second_per_rank": 2e9,
        "mfu_causal": None,
        "mfu_full": None,
    }
    record |= {"hfu": None, "elapsed_seconds": 2.0 * n, "train_seconds": 1.0 * n, "skipped_steps": 0}
    record |= {"peak_allocated_bytes_max": None, "peak_reserved_bytes_max": None}
    return {**record, "host_rss_bytes_max": 512 * 2**20, "host_rss_bytes_max_rank": 1, **more}


def held_out(n, loss, **more):
    return {"kind": "eval", "step": n, "tokens_seen": 100 * n, "eval_loss": loss, "perplexity": math.exp(loss), **more}


def run_of(folder, *records):
    (folder / "metrics.jsonl").write_bytes(b"".join(encode(record) for record in records))
    return read_run(folder)


def table_text(run, width=300):
    console = Console(width=width)
    with console.capture() as capture:
        console.print(summary_table(run))
    rows = [line.strip("\u2502 ").split("\u2502") for line in capture.get().splitlines() if line.startswith("\u2502")]
    return {row[0].strip(): row[1].strip() for row in rows}


def test_records_come_by_kind_and_a_half_written_line_is_left_out(tmp_path):
    run_of(tmp_path, HEADER, step(1, 3.0), held_out(1, 2.5), {"kind": "event", "event": "x", "step": 1, "message": ""})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "step", "step": 2, "lo')
    run = read_run(tmp_path)
    assert [len(kind) for kind in (run.headers, run.steps, run.evals, run.events, run.summaries)] == [1, 1, 1, 1, 0]
    assert run.name == "gpt_tiny" and run.summary is None


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RefusedInput, match="no such file"):
        read_run(tmp_path)
    for draw in (summary_table, loss_figure):
        with pytest.raises(ValueError, match="holds no step"):
            draw(run_of(tmp_path, HEADER))


def test_the_table_says_what_a_run_came_to(tmp_path):
    for n in (3, 6):
        (tmp_path / "checkpoints" / f"step_{n:08d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000009.writing").mkdir()
    summary = {"kind": "summary", "step": 6, "stop_reason": "steps", "elapsed_seconds": 12.0, "train_seconds": 6.0}
    steps = [step(n, 4.0 - n / 2, seconds=9.0 if n <= 3 else n / 8, warmup=n <= 3) for n in range(1, 7)]
    evals = [held_out(3, 1.0), held_out(6, 1.25, mlm_accuracy=0.5)]
    run = run_of(tmp_path, HEADER, *steps, *evals, {**summary, "checkpoint_seconds": 3.0, "evaluation_seconds": 0.0})
    got = table_text(run)
    assert got["state"] == "ended, all steps done"
    assert got["training loss"] == "1.0000 nats at step 6"
    assert got["held-out loss"] == "1.2500 nats at step 6 (best 1.0000 at step 3)"
    assert got["held-out perplexity"] == "3.49"
    assert got["masked tokens right"] == "50.0 %"
    assert got["tokens seen"] == "600 in 6 steps"
    assert got["time"] == "12 s, of it 6.0 s in steps, 3.0 s checkpoint"
    assert got["tokens per second"] == "160 (80 a rank on 2 ranks), mean of 3 steps after warm-up"  # 300 in 15/8 s
    assert got["step time"] == "median 625 ms, mean 625 ms"
    assert got["MFU"] == "- (no datasheet figure for this CPU; 2.00 GFLOP/s a rank)"
    assert got["memory, worst rank"] == "512 MiB host (rank 1)"
    assert got["checkpoints"].startswith("2, newest ")
    assert "skipped updates" not in got and "failed sinks" not in got


def test_checkpoints_of_steps_that_were_not_reached_again_are_not_the_newest(tmp_path):
    """A run whose checkpoints were all damaged has begun anew."""
    for n in (1, 2, 9):
        (tmp_path / "checkpoints" / f"step_{n:08d}").mkdir(parents=True)
    told = table_text(run_of(tmp_path, HEADER, step(1, 5.0), step(2, 4.0)))["checkpoints"]
    assert told.startswith("2, newest ") and told.endswith("step_00000002")


def test_a_noisy_last_loss_is_put_beside_its_recent_mean(tmp_path):
    run = run_of(tmp_path, HEADER, *(step(n, 5.0 - n / 10) for n in range(1, 31)))
    assert table_text(run)["training loss"] == "2.0000 nats at step 30 (mean of the last 3 records 2.1000)"


def test_what_is_known_on_a_gpu_is_shown(tmp_path):
    memory = {"peak_allocated_bytes_max": 2**30, "peak_allocated_bytes_max_rank": 0}
    memory |= {"peak_reserved_bytes_max": 3 * 2**29, "peak_reserved_bytes_max_rank": 1, "host_rss_bytes_max": None}
    known = {"mfu_six_n": 0.35, "mfu_causal": 0.4, "mfu_full": 0.5, "hfu": 0.6, "skipped_steps": 1, **memory}
    failed = {"kind": "event", "event": "sink_failed", "step": None, "message": "m", "details": {"sink": "wandb"}}
    header = {**HEADER, "peak_flops_per_second": 1e14, "peak_flops_source": "a datasheet"}
    got = table_text(run_of(tmp_path, header, failed, *(step(n, 1.0, **known) for n in (1, 2))))
    assert got["MFU"] == "35.0 % 6N, 40.0 % causal, 50.0 % full attention; HFU 60.0 %; of 100 TFLOP/s, a datasheet"
    assert got["memory, worst rank"] == "1.00 GiB allocated (rank 0), 1.50 GiB reserved (rank 1)"
    assert got["skipped updates"] == "1 of 2 (gradient overflow)"
    assert got["failed sinks"] == "wandb"


def test_without_a_peak_every_convention_is_shown_as_flops(tmp_path):
    flops = {"six_n": 3.0, "causal": 4.0, "full": 5.0, "hardware": 6e9}
    header = {**HEADER, **{f"flops_{name}_per_sequence": value for name, value in flops.items()}}
    got = table_text(run_of(tmp_path, header, *(step(n, 1.0) for n in (1, 2))))
    reached = "1.50 GFLOP/s 6N, 2.00 GFLOP/s causal, 2.50 GFLOP/s full attention, 3.00 GFLOP/s executed"
    assert got["MFU"] == f"- (no datasheet figure for this CPU; a rank {reached})"


def test_energy_is_shown_with_its_source_or_with_why_there_is_none(tmp_path):
    header = {**HEADER, "energy_source": "RAPL of every host: package-0"}
    summary = {"kind": "summary", "step": 2, "stop_reason": "steps", "elapsed_seconds": 2.0, "train_seconds": 1.0,
               "energy_joules": 4000.0}  # fmt: skip
    got = table_text(run_of(tmp_path, header, *(step(n, 1.0, energy_joules=50.0) for n in (1, 2)), summary))
    assert got["energy"] == "4.00 kJ, 0.50 J a token (RAPL of every host: package-0)"
    got = table_text(run_of(tmp_path, {**header, "energy_source": "no counters"}, step(1, 1.0)))
    assert got["energy"] == "- (no counters)"
    assert "energy" not in table_text(run_of(tmp_path, HEADER, step(1, 1.0)))


def test_what_a_rollback_took_back_is_not_of_the_run_but_is_told(tmp_path):
    spike = {"kind": "event", "event": "loss_spike", "step": 4, "message": "m", "details": {}}
    left_out = {"from_step": 4, "to_step": 2, "first_batch": 2, "last_batch": 3}
    back = {"kind": "event", "event": "rolled_back", "step": 4, "message": "m", "details": left_out}
    slow = {"kind": "event", "event": "slow_rank", "step": 4, "message": "m", "details": {"rank": 3, "host": "h"}}
    before, after = [step(n, 1.0) for n in (1, 2, 3, 4)], [step(n, 2.0) for n in (3, 4, 5)]
    run = run_of(tmp_path, HEADER, *before, held_out(4, 9.0), spike, back, *after, slow, slow)
    assert [(record["step"], record["loss"]) for record in run.steps] == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]
    got = table_text(run)
    assert got["loss spikes"] == "at step 4" and got["slow ranks"] == "3 on h"
    assert got["rolled back"] == "from step 4 to 2, batches 2 to 3 left out"
    assert got["held-out loss"] == "- (not evaluated)"


def test_the_bubble_stands_beside_the_theoretical_one(tmp_path):
    shares = {"pipeline_bubble_fraction_theory": 0.2}
    steps = [step(n, 1.0, pipeline_bubble_fraction=n / 10, **shares) for n in (1, 3, 4)]
    got = table_text(run_of(tmp_path, HEADER, *steps))
    assert got["pipeline bubble"] == "median 30.0 % measured, 20.0 % in theory"
    assert "pipeline bubble" not in table_text(run_of(tmp_path, HEADER, step(1, 1.0)))


def test_a_run_that_was_killed_or_is_short_says_so(tmp_path):
    got = table_text(run_of(tmp_path, HEADER, HEADER, step(1, math.nan, warmup=True)))
    assert got["state"] == "no summary after step 1: running, or it was killed, 2 process starts"
    assert got["training loss"] == "nan nats at step 1"
    assert got["held-out loss"] == "- (not evaluated)"
    for row in ("tokens per second", "step time", "MFU"):
        assert got[row] == "- (every step was a warm-up or profiled step)"
    assert got["checkpoints"] == "none"


def test_a_summary_that_training_went_past_no_longer_counts(tmp_path):
    end = {"kind": "summary", "step": 1, "stop_reason": "steps"}
    assert run_of(tmp_path, HEADER, step(1, 1.0), end).summary == end
    assert run_of(tmp_path, HEADER, step(1, 1.0), end, HEADER, step(2, 1.0)).summary is None


def a_run(folder, steps=200):
    losses = [2.0 + 6.0 * math.exp(-n / 20) + (0.2 if n % 2 else -0.2) for n in range(1, steps + 1)]
    losses[99] = math.nan
    records = [step(n, loss) for n, loss in enumerate(losses, start=1)]
    return run_of(folder, HEADER, *records, *(held_out(n, 2.5) for n in (50, 100, 150, 200) if n <= steps)), losses


def test_the_curve_shows_every_record_a_smoothed_line_and_held_out_points(tmp_path):
    run, losses = a_run(tmp_path)
    below, above = loss_figure(run, {"trigram": 2.25}).axes
    lines = {str(line.get_label()): line for line in below.get_lines()}
    raw, smooth = lines["training, each record"], lines["training, smoothed"]
    np.testing.assert_array_equal(raw.get_xdata(), [100 * n for n in range(1, 201)])
    np.testing.assert_array_equal(raw.get_ydata(), losses)
    smoothed = np.asarray(smooth.get_ydata())
    assert smooth.get_linewidth() > raw.get_linewidth()
    assert smoothed[0] == losses[0]  # the start is not bent
    assert math.isnan(smoothed[99]) and np.isfinite(np.delete(smoothed, 99)).all()
    assert smoothed[150] == pytest.approx(np.mean(losses[146:155]))
    assert smoothed[199] == pytest.approx(np.mean(losses[195:]))
    assert list(lines["held-out"].get_xdata()) == [5000, 10000, 15000, 20000]
    assert list(lines["trigram: 2.250"].get_ydata()) == [2.25, 2.25]
    assert (below.get_xlabel(), below.get_ylabel()) == ("tokens seen", "loss, nats per target token")
    assert above.get_xlabel() == "steps"
    ticks = dict(zip((text.get_text() for text in above.get_xticklabels()), above.get_xticks(), strict=True))
    assert ticks["100"] == 10000 and above.get_xlim() == below.get_xlim()


def test_the_picture_is_a_png_of_the_promised_size(tmp_path):
    loss_curve(a_run(tmp_path)[0], tmp_path / "new" / "loss.png", {"trigram": 2.25})
    content = (tmp_path / "new" / "loss.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1200, 750)
    assert len(content) > 20_000


def test_one_step_and_a_bert_can_be_drawn_and_only_nan_cannot(tmp_path):
    below, _ = loss_figure(run_of(tmp_path, HEADER, step(1, 3.0, loss_mlm=2.0, loss_nsp=1.0))).axes
    assert below.get_ylabel() == "loss, nats per masked token, plus nats per pair"
    with pytest.raises(ValueError, match="no step with a finite loss"):
        loss_figure(run_of(tmp_path, HEADER, step(1, math.nan)))
