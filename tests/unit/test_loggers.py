"""metrics.jsonl survives kills, rollbacks and NaN; a sink may fail, the truth may not."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from disttrain import loggers as package
from disttrain.config.problems import RefusedInput
from disttrain.config.schema import Config, LogConfig
from disttrain.loggers import Loggers, TruthFailed, jsonl, open_loggers, preflight, read_records

ROOT = Path(__file__).parents[2]
QUIET = Config(log=LogConfig(console="none"))


def step(n, **more):
    return {"kind": "step", "step": n, "loss": 1.0 / n, **more}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_line_is_on_disk_before_write_returns_and_holds_the_time(tmp_path):
    path = tmp_path / "metrics.jsonl"
    loggers = Loggers(jsonl.JsonlSink(path), clock=lambda: 12.5)
    for n in (1, 2):
        loggers.write(step(n))
        assert lines(path)[-1] == {**step(n), "time": 12.5}
    loggers.close()
    with pytest.raises(RuntimeError, match="after close"):
        loggers.write(step(3))


def test_nan_and_infinity_stay_valid_json_and_come_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = jsonl.JsonlSink(path)
    sink.write({"kind": "step", "loss": math.nan, "grad_norm": math.inf, "low": -math.inf, "config": {"a": [math.nan]}})
    sink.close()

    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    plain = json.loads(path.read_text(), parse_constant=refuse)
    assert plain["loss"] is plain["grad_norm"] is plain["config"]["a"][0] is None
    assert plain["non_finite"] == {"loss": "nan", "grad_norm": "inf", "low": "-inf", "config.a.0": "nan"}
    (record,) = read_records(path)
    assert math.isnan(record["loss"]) and record["grad_norm"] == math.inf and record["low"] == -math.inf


def test_text_of_any_language_survives(tmp_path):
    sink = jsonl.JsonlSink(tmp_path / "m")
    sink.write({"kind": "event", "message": "\u00fcber \u2603 \n two lines"})
    sink.close()
    assert read_records(tmp_path / "m")[0]["message"] == "\u00fcber \u2603 \n two lines"


def test_a_value_that_is_not_json_is_the_programmers_error(tmp_path):
    sink = jsonl.JsonlSink(tmp_path / "m")
    with pytest.raises(TypeError):
        sink.write({"kind": "event", "path": Path("x")})
    sink.close()
    assert (tmp_path / "m").read_bytes() == b""


def write_run(path, records):
    path.write_bytes(b"".join(jsonl.encode(record) for record in records))


RECORDS = [
    {"kind": "header", "name": "a"},
    *(step(n) for n in (1, 2, 3)),
    {"kind": "eval", "step": 3, "eval_loss": 1.0},
    {"kind": "event", "event": "checkpoint_saved", "step": 3, "message": "m"},
    step(4),
    {"kind": "eval", "step": 4, "eval_loss": 1.0},
    {"kind": "event", "event": "x", "step": 4, "message": "kept"},
    {"kind": "summary", "step": 4},
]


def test_rewind_drops_steps_that_are_done_again_and_keeps_the_rest(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_run(path, RECORDS)
    assert jsonl.rewind(path, 3) == jsonl.Rewound(dropped=2, reached_step=4)
    assert lines(path) == [r for r in RECORDS if r["kind"] not in ("step", "eval") or r["step"] <= 3]
    assert jsonl.rewind(path, 0).dropped == 4
    assert [r["kind"] for r in lines(path)] == ["header", "event", "event", "summary"]
    assert jsonl.rewind(tmp_path / "none", 3) == jsonl.Rewound(0, 0)
    assert not (tmp_path / "none").exists()


def test_a_file_cut_anywhere_is_repaired_to_its_whole_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_run(path, RECORDS[:4])
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    around_ends = {end + offset for end in ends for offset in (-2, -1, 0, 1) if end + offset <= len(whole)}
    for cut in sorted({*range(0, len(whole), 7), *around_ends}):
        path.write_bytes(whole[:cut])
        complete = sum(end - 1 <= cut for end in ends)  # a line that lacks only its newline is complete
        assert read_records(path) == RECORDS[:complete]
        jsonl.rewind(path, 10)
        assert path.read_bytes() == whole[: ends[complete - 1] if complete else 0]


def test_a_last_line_of_zeros_as_after_a_power_failure_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_run(path, RECORDS[:2])
    with path.open("ab") as file:
        file.write(bytes(100))
    jsonl.rewind(path, 10)
    assert lines(path) == RECORDS[:2]


@pytest.mark.parametrize("broken", [b'{"kind": "step", "st\n', b"[1, 2]\n", b'{"step": 3}\n'])
def test_a_broken_line_elsewhere_is_refused_and_nothing_is_changed(tmp_path, broken):
    path = tmp_path / "metrics.jsonl"
    write_run(path, RECORDS[:2])
    content = path.read_bytes() + broken + jsonl.encode(step(2))
    path.write_bytes(content)
    for reads in (lambda: read_records(path), lambda: jsonl.rewind(path, 1)):
        with pytest.raises(RefusedInput, match="line 3"):
            reads()
    assert path.read_bytes() == content


def test_a_crash_while_rewinding_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write_run(path, RECORDS)
    before = path.read_bytes()

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        jsonl.rewind(path, 1)
    assert path.read_bytes() == before
    monkeypatch.undo()
    assert jsonl.rewind(path, 1).dropped == 5


def test_a_killed_writer_loses_nothing_that_it_wrote(tmp_path):
    program = f"""
from pathlib import Path
from disttrain.loggers.jsonl import JsonlSink
sink = JsonlSink(Path({str(tmp_path)!r}) / "metrics.jsonl")
for n in range(1, 10**9):
    sink.write({{"kind": "step", "step": n, "loss": 1 / n}})
    if n == 500:
        print("there", flush=True)
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT)
    assert child.stdout is not None and child.stdout.readline() == b"there\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    with open_loggers(QUIET, tmp_path, {"name": "again"}, resumed_step=400) as loggers:
        loggers.write(step(401))
    records = lines(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "step"] == list(range(1, 402))
    (rewound,) = (r for r in records if r["kind"] == "event")
    assert rewound["event"] == "rewound" and rewound["details"]["reached_step"] >= 500


def test_a_full_disk_stops_the_run_with_a_clear_error():
    sink = jsonl.JsonlSink(Path("/dev/full"))
    with pytest.raises(TruthFailed, match="cannot write /dev/full: No space left on device; the run stops here"):
        sink.write(step(1))


def test_a_folder_that_cannot_hold_the_file_stops_the_run(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(TruthFailed, match="Is a directory"):
        open_loggers(QUIET, tmp_path, {}, None if os.getuid() else 0)


class Spy:
    """A sink that remembers, and fails where it is told to."""

    def __init__(self, name, fails=()):
        self.name, self.fails, self.got, self.closed = name, fails, [], 0

    def write(self, record):
        if record["kind"] in self.fails:
            raise ConnectionError("network gone")
        self.got.append(record)

    def close(self):
        self.closed += 1
        if "close" in self.fails:
            raise OSError("cannot flush")


def composite(tmp_path, *sinks):
    return Loggers(jsonl.JsonlSink(tmp_path / "metrics.jsonl"), sinks)


def test_a_failing_sink_is_closed_and_reported_once_and_the_others_go_on(tmp_path, capsys):
    bad, good = Spy("bad", ("step",)), Spy("good")
    with composite(tmp_path, bad, good) as loggers:
        for n in (1, 2, 3):
            loggers.write(step(n))
    records = lines(tmp_path / "metrics.jsonl")
    assert [r["kind"] for r in records] == ["step", "event", "step", "step"]
    assert records[1]["event"] == "sink_failed" and records[1]["details"] == {"sink": "bad"}
    assert "network gone" in records[1]["message"]
    assert [r["step"] for r in good.got if r["kind"] == "step"] == [1, 2, 3]
    assert sum(r["kind"] == "event" for r in good.got) == 1
    assert (bad.closed, good.closed, bad.got) == (1, 1, [])
    assert capsys.readouterr().err.count("bad failed and is left out from now on") == 1


def test_two_sinks_that_fail_at_anything_do_not_stop_the_run(tmp_path, capsys):
    worst = [Spy(name, ("step", "event", "close")) for name in ("one", "two")]
    with composite(tmp_path, *worst) as loggers:
        loggers.write(step(1))
    events = [r for r in lines(tmp_path / "metrics.jsonl") if r["kind"] == "event"]
    assert {e["details"]["sink"] for e in events} == {"one", "two"} and len(events) == 2
    assert all("closing it failed as well: cannot flush" in e["message"] for e in events)
    assert [s.closed for s in worst] == [1, 1]
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_sink_that_cannot_be_opened_is_reported_and_others_get_the_header(tmp_path, capsys):
    def fail():
        raise PermissionError("no key")

    late = Spy("late")
    with composite(tmp_path) as loggers:
        loggers.write({"kind": "header", "name": "x"})
        assert loggers.add("wandb", fail) is None
        assert loggers.add("none", lambda: None) is None
        assert loggers.add("late", lambda: late) is late
    assert late.got[0]["name"] == "x"
    assert [r["kind"] for r in lines(tmp_path / "metrics.jsonl")] == ["header", "event"]
    assert "wandb failed" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_everything_is_closed_after_an_error_and_only_once(tmp_path, error, capsys):
    sinks = [Spy("a"), Spy("b", ("close",)), Spy("c")]
    loggers = composite(tmp_path, *sinks)
    with pytest.raises(error), loggers:
        raise error
    loggers.close()
    assert [s.closed for s in sinks] == [1, 1, 1]
    assert "b failed" in capsys.readouterr().err
    assert lines(tmp_path / "metrics.jsonl")[-1]["details"] == {"sink": "b"}


def test_other_sinks_are_closed_when_the_truth_fails(tmp_path):
    spy = Spy("a")
    loggers = Loggers(jsonl.JsonlSink(Path("/dev/full")), [spy])
    with pytest.raises(TruthFailed), loggers:
        loggers.write(step(1))
    assert spy.closed == 1 and spy.got == []


def test_a_resumed_run_writes_its_header_and_no_step_twice(tmp_path):
    with open_loggers(QUIET, tmp_path, {"name": "a"}, None) as loggers:
        for n in (1, 2, 3):
            loggers.write(step(n))
    with open_loggers(QUIET, tmp_path, {"name": "b"}, 2) as loggers:
        loggers.write(step(3, again=True))
    records = lines(tmp_path / "metrics.jsonl")
    assert [r["kind"] for r in records] == ["header", "step", "step", "header", "event", "step"]
    assert records[-1]["again"]
    with open_loggers(QUIET, tmp_path, {"name": "c"}, 3):
        pass
    assert [r["kind"] for r in lines(tmp_path / "metrics.jsonl")][-2:] == ["step", "header"]  # nothing was dropped


def test_how_far_an_earlier_process_came_is_known_after_two_rollbacks(tmp_path):
    for resumed, last in ((None, 9), (2, 4)):
        with open_loggers(QUIET, tmp_path, {}, resumed) as loggers:
            for n in range((resumed or 0) + 1, last + 1):
                loggers.write(step(n))
    assert jsonl.rewind(tmp_path / "metrics.jsonl", 2).reached_step == 9


def test_preflight_names_every_missing_package(monkeypatch):
    monkeypatch.setattr(package.importlib.util, "find_spec", lambda name: None)
    everything = Config(log=LogConfig(wandb=True, tensorboard=True))
    problems = preflight(everything)
    assert [p.settings for p in problems] == [("log.tensorboard=true",), ("log.wandb=true",)]
    assert "pip install 'disttrain[wandb]'" in problems[1].fix
    assert preflight(Config()) == []
    monkeypatch.undo()
    assert preflight(everything) == []
