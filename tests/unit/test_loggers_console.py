"""What a person sees: plain lines that do not flood, a live display that fits 80 columns and gives the cursor back."""

import io
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from disttrain.config.schema import Config, LogConfig, TrainConfig
from disttrain.loggers import console as console_module
from disttrain.loggers import readable
from disttrain.loggers.console import LiveConsole, PlainConsole, open_console
from disttrain.loggers.progress import Progress, held_out_text, title

ROOT = Path(__file__).parents[2]
SHOW_CURSOR = "\x1b[?25h"
HIDE_CURSOR = "\x1b[?25l"


def config(**train):
    return Config(train=TrainConfig(**{"steps": 1000, **train}))


def step(n, seconds=0.25, warmup=False, **more):
    record = {"kind": "step", "step": n, "loss": 2.34567, "learning_rate": 3e-4, "grad_norm": 1.5, "loss_scale": None}
    record |= {"interval_steps": 1, "warmup": warmup, "step_seconds": seconds, "tokens_per_second": 12345.6}
    record |= {"elapsed_seconds": n * seconds, "train_seconds": n * seconds, "mfu_causal": None}
    return {**record, "peak_reserved_bytes_max": None, "host_rss_bytes_max": 3 * 2**29, **more}


EVAL = {"kind": "eval", "step": 3, "eval_loss": 2.25, "perplexity": 9.4877}
HEADER = {"kind": "header", "name": "gpt_tiny", "world_size": 4, "parameters": 3213312, "precision": "bf16"}
HEADER |= {"mesh": {"pipeline": 1, "shard": 2, "tensor": 2}, "config": {"model": {"family": "gpt"}}}
SUMMARY = {"kind": "summary", "step": 9, "stop_reason": "steps", "loss": 2.0, "eval_loss": 2.1, "elapsed_seconds": 83.0}
SUMMARY |= {"tokens_per_second_mean": 1.2e4}


def event(name, message, at=None):
    return {"kind": "event", "event": name, "step": at, "message": message}


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def plain(settings=None):
    stream, clock = io.StringIO(), Clock()
    return PlainConsole(settings or config(), stream, clock), stream, clock


def test_a_plain_line_says_what_matters_in_80_columns():
    sink, stream, _ = plain()
    sink.write(step(120))
    line = stream.getvalue().rstrip("\n")
    assert line == "step  120/1000  loss 2.3457  lr 3.00e-4  grad 1.50  12.3k tokens/s  250 ms  3:40 left"
    assert len(line) <= 88


def test_plain_lines_come_first_last_and_at_most_one_in_two_seconds():
    sink, stream, clock = plain(config(steps=100))
    for n in range(1, 101):
        sink.write(step(n))
        clock.now += 0.125
    printed = [int(text) for text in re.findall(r"^step +(\d+)/", stream.getvalue(), re.M)]
    assert printed == [1, 17, 33, 49, 65, 81, 97, 100]


def test_the_last_step_is_printed_when_the_end_was_not_foreseen():
    sink, stream, _ = plain()
    for n in (1, 2, 3):
        sink.write(step(n))
    sink.close()
    sink.close()
    assert [line.split("/")[0] for line in stream.getvalue().splitlines()] == ["step    1", "step    3"]


def test_plain_events_evaluations_and_the_end_are_said_in_order():
    sink, stream, _ = plain(config(steps=9))
    for record in (HEADER, step(1), step(3), EVAL, event("checkpoint_saved", "checkpoint saved: here", 3)):
        sink.write(record)
    for record in (event("sink_failed", "said on stderr already"), event("interrupted", "stopping"), SUMMARY):
        sink.write(record)
    assert stream.getvalue().splitlines() == [
        "gpt_tiny: gpt, 3.21M parameters, 4 ranks (shard 2, tensor 2), bf16",
        "step 1/9  loss 2.3457  lr 3.00e-4  grad 1.50  12.3k tokens/s  250 ms  2.0 s left",
        "step 3/9  loss 2.3457  lr 3.00e-4  grad 1.50  12.3k tokens/s  250 ms  1.5 s left",
        "step 3/9  held-out loss 2.2500, perplexity 9.488",
        "step 3/9  checkpoint saved: here",
        "stopping",
        "all steps done at step 9, loss 2.0000, held-out 2.1000, 12.0k tokens/s, 1:23",
    ]


def rendered(sink, width=80, color_system=None):
    """What the display draws, on a console of its own."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=color_system)
    with console.capture() as capture:
        console.print(sink)
    return capture.get()


def drawn(records, settings=None, width=80):
    """(lines of the display ten seconds after the last record, everything written to the terminal)."""
    stream, clock = io.StringIO(), Clock()
    console = Console(file=stream, force_terminal=True, width=width, highlight=False, color_system=None)
    sink = LiveConsole(settings or config(), console, clock)
    for record in records:
        sink.write(record)
    clock.now += 10.0
    lines = rendered(sink, width).splitlines()
    sink.close()
    return lines, stream.getvalue()


def test_the_live_display_is_three_lines_that_fit_80_columns():
    full = step(250, mfu_causal=0.413, peak_reserved_bytes_max=70 * 2**30, loss_scale=65536.0)
    lines, _ = drawn([HEADER, full, EVAL])
    assert len(lines) == 3 and all(len(line) <= 80 for line in lines)
    assert lines[0].startswith("step  250/1000 ") and "1:12 elapsed, 2:58 left" in lines[0]
    assert re.fullmatch(r"loss 2\.3457  held-out 2\.2500  lr 3\.00e-4  grad 1\.50  scale 65536 *", lines[1])
    assert re.fullmatch(r"12\.3k tokens/s  250 ms a step  41\.3 % MFU  70\.00 GiB device memory *", lines[2])


def test_the_bar_is_as_long_as_the_run_is_far():
    sink = LiveConsole(config(), Console(file=io.StringIO(), force_terminal=True), Clock())
    lengths = []
    for n in (0, 250, 500, 1000):
        if n:
            sink.write(step(n))
        pieces = re.findall(r"\x1b\[36m([\u2501\u2578]+)", rendered(sink, color_system="truecolor"))
        lengths.append(sum(len(piece) for piece in pieces))
    sink.close()
    assert lengths[0] == 0 and lengths[3] > 30
    assert lengths[1] == pytest.approx(lengths[3] / 4, abs=4) and lengths[2] == pytest.approx(lengths[3] / 2, abs=4)


@pytest.mark.parametrize("width", [20, 40, 200])
def test_other_widths_do_not_break_the_display(width):
    lines, _ = drawn([step(250), EVAL], width=width)
    assert all(len(line) <= width for line in lines)


def test_before_the_first_step_and_without_a_length_there_is_a_display_too():
    lines, _ = drawn([HEADER])
    assert lines[0].startswith("step    0/1000") and lines[1].startswith("waiting for the first step")
    lines, _ = drawn([step(7)], Config(train=TrainConfig(target_loss=1.0)))
    assert lines[0].startswith("step 7 ") and "left" not in lines[0]


def test_live_messages_scroll_above_and_the_cursor_comes_back():
    records = [HEADER, step(3), EVAL, event("checkpoint_saved", "checkpoint saved: " + "x" * 90, 3)]
    _, written = drawn([*records, event("sink_failed", "never shown")])
    assert "step    3/1000  held-out loss 2.2500, perplexity 9.488" in written
    assert "x" * 90 in written and "never shown" not in written
    assert written.count(HIDE_CURSOR) == 1 and written.rindex(SHOW_CURSOR) > written.index(HIDE_CURSOR)


def test_the_end_of_a_live_run_leaves_one_line_and_the_cursor():
    _, written = drawn([step(9), SUMMARY], config(steps=9))
    assert written.index("all steps done at step 9, loss 2.0000") > written.index(SHOW_CURSOR)


def test_ctrl_c_in_a_terminal_gives_the_cursor_back(tmp_path):
    program = f"""
import time
from pathlib import Path
from disttrain.config.schema import Config, TrainConfig
from disttrain.loggers import open_loggers
from tests.unit.test_loggers_console import HEADER, step
header = {{key: value for key, value in HEADER.items() if key != "kind"}}
with open_loggers(Config(train=TrainConfig(steps=1000)), Path({str(tmp_path)!r}), header, None) as loggers:
    for n in range(1, 1000):
        loggers.write(step(n))
        time.sleep(0.05)
"""
    parent, child = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env=env, stdout=child, stderr=child, stdin=child
    )
    os.close(child)
    seen = b""
    deadline = time.monotonic() + 60
    while b"tokens/s" not in seen:
        assert time.monotonic() < deadline, seen
        seen += os.read(parent, 65536)
    process.send_signal(signal.SIGINT)
    while True:
        try:
            more = os.read(parent, 65536)
        except OSError:  # Linux says so when the other side is closed
            break
        if not more:
            break
        seen += more
    os.close(parent)
    assert process.wait(timeout=30) != 0
    text = seen.decode()
    assert "KeyboardInterrupt" in text
    assert text.rindex(SHOW_CURSOR) > text.rindex(HIDE_CURSOR)


def test_auto_is_live_on_a_terminal_and_plain_elsewhere(monkeypatch):
    def opened(mode, **terminal):
        monkeypatch.setattr(
            console_module, "Console", lambda **more: Console(file=io.StringIO(), **{**terminal, **more})
        )
        sink = open_console(Config(log=LogConfig(console=mode)))
        if sink is not None:
            sink.close()
        return type(sink)

    assert opened("auto", force_terminal=True) is LiveConsole
    assert opened("auto", force_terminal=False) is PlainConsole
    assert opened("plain", force_terminal=True) is PlainConsole
    assert opened("live", force_terminal=False) is LiveConsole
    assert opened("none", force_terminal=True) is type(None)
    monkeypatch.setenv("TERM", "dumb")
    assert opened("auto", force_terminal=True) is PlainConsole


def test_time_left_follows_recent_steps_and_forgets_warmup():
    progress = Progress(config(steps=100))
    assert progress.seconds_left is None
    progress.take(step(1, seconds=60.0, warmup=True))
    progress.take(step(2, seconds=1.0))
    for n in range(3, 50):
        progress.take(step(n, seconds=2.0))
    assert progress.seconds_left == 51 * 2.0


def test_the_nearest_limit_counts():
    progress = Progress(config(steps=100, seconds=10.0))
    progress.take(step(4, seconds=2.0))
    assert (progress.fraction, progress.seconds_left) == (0.8, 2.0)
    progress.take(step(50, seconds=0.1))
    assert progress.fraction == 0.5


def test_a_resumed_run_starts_where_it_was():
    progress = Progress(config(steps=100))
    progress.take({**HEADER, "resumed_step": 40})
    assert progress.at() == "step  40/100" and progress.fraction == 0.4


def test_titles_and_scores_leave_out_what_is_not_known():
    assert title({"world_size": 1}) == "run: 1 rank"
    bert = {"eval_loss": 2.0, "perplexity": 4.0, "mlm_accuracy": 0.5, "nsp_accuracy": 0.75}
    words = "held-out loss 2.0000, perplexity 4, masked tokens right 50.0 %, pairs right 75.0 %"
    assert held_out_text(bert) == words


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (readable.count, 0, "0"),
        (readable.count, 999, "999"),
        (readable.count, 9.4877, "9.49"),
        (readable.count, 999.6, "1.00k"),
        (readable.count, 99949, "99.9k"),
        (readable.count, 123456789, "123M"),
        (readable.count, 5e18, "5000P"),
        (readable.count, float("nan"), "nan"),
        (readable.count, None, "-"),
        (readable.flops, 3.77e12, "3.77 TFLOP/s"),
        (readable.size, 340 * 2**20, "340 MiB"),
        (readable.size, 1.5 * 2**30, "1.50 GiB"),
        (readable.duration, 7.32, "7.3 s"),
        (readable.duration, 59.4, "59 s"),
        (readable.duration, 59.6, "1:00"),
        (readable.duration, 3725, "1:02:05"),
        (readable.duration, 3 * 86400 + 3700, "3d 01:01"),
        (readable.step_time, 0.0421, "42.1 ms"),
        (readable.step_time, 1.251, "1.25 s"),
        (readable.percent, 0.4131, "41.3 %"),
        (readable.perplexity, 1402.94, "1403"),
        (readable.perplexity, 50257.0, "50.3k"),
        (readable.perplexity, float("inf"), "inf"),
    ],
)
def test_numbers_read_well(function, value, text):
    assert function(value) == text
