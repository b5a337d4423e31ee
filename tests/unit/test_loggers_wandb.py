"""Weights & Biases, really run offline; its own transaction log is read back."""

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from disttrain.loggers import wandb as sink_module

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys
from pathlib import Path
from disttrain.config.schema import Config, LogConfig, RunConfig
from disttrain.loggers import open_loggers
folder, first, last, resumed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
config = Config(run=RunConfig(name="named"), log=LogConfig(console="none", wandb=True))
header = {"name": "named", "config": config.model_dump(mode="json"), "world_size": int(sys.argv[5])}
with open_loggers(config, folder, header, None if resumed == "new" else int(resumed)) as loggers:
    for n in range(first, last + 1):
        loggers.write({"kind": "step", "step": n, "loss": first + 1 / n, "mfu_causal": None})
        if n % 2 == 0:
            loggers.write({"kind": "eval", "step": n, "eval_loss": float(n)})
    if sys.argv[6] == "ends":
        loggers.write({"kind": "summary", "step": last, "stop_reason": "steps", "loss": 0.5})
"""


def train(folder, first, last, resumed, ranks=2, ends="ends"):
    """One process of a run; W&B names its folder by the second, so two must not start in the same one."""
    began = int(time.time())
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    words = [str(word) for word in (folder, first, last, resumed, ranks, ends)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        cwd=ROOT,
        env={**kept, "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stderr
    time.sleep(max(0.0, began + 1.05 - time.time()))


def records(path):
    """Records of a .wandb file: LevelDB's log format (blocks of 32 KiB; crc, length, type) of protobuf messages."""
    from wandb.proto import wandb_internal_pb2

    content, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def contents(folder):
    """(run id, rows by step, config, exit code) of every process, oldest first."""
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        run_id, rows, config, code = None, [], {}, None
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run_id = record.run.run_id
            elif kind == "config":
                config.update({item.key: json.loads(item.value_json) for item in record.config.update})
            elif kind == "history":
                items = {"".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                rows.append((record.history.step.num, {k: v for k, v in items.items() if not k.startswith("_")}))
            elif kind == "exit":
                code = record.exit.exit_code
        found.append((run_id, rows, config, code))
    return found


def test_one_run_with_our_steps_continues_under_its_id_without_a_step_twice(tmp_path):
    train(tmp_path, 1, 5, "new", ends="killed")
    train(tmp_path, 4, 7, 3)  # rolled back to 3: steps 4 and 5 are done again
    (id_1, rows_1, config_1, code_1), (id_2, rows_2, config_2, code_2) = contents(tmp_path)
    kept = (tmp_path / "wandb_id").read_text().strip()
    assert id_1 == id_2 == kept and len(kept) == 8
    assert [step for step, _ in rows_1 + rows_2] == [1, 2, 3, 4, 5, 6, 7]
    assert rows_1[1] == (2, {"train/loss": 1.5, "eval/eval_loss": 2.0})
    assert rows_2[0] == (6, {"train/loss": 4 + 1 / 6, "eval/eval_loss": 6.0})
    assert config_1["model"]["layers"] == 4 and config_1["header"]["world_size"] == 2
    assert config_2["run"]["name"] == "named"
    assert (code_1, code_2) == (1, 0)  # without a summary the run is marked as failed


def test_a_key_in_the_environment_is_not_written_anywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_WORD", "xyzzy-0123456789")
    secret = "0123456789abcdef0123456789abcdef01234567"
    program = PROGRAM.replace("import sys", f"import os, sys; os.environ['WANDB_API_KEY'] = {secret!r}", 1)
    env = {**os.environ, "WANDB_MODE": "offline"}
    words = [str(tmp_path), "1", "2", "new", "1", "ends"]
    subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, env=env, check=True, capture_output=True)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) > 3
    for path in files:
        content = path.read_bytes()
        assert secret.encode() not in content and b"xyzzy-0123456789" not in content, path


def test_the_id_is_made_once_and_an_empty_file_is_no_id(tmp_path):
    first, known = sink_module._run_id(tmp_path)
    assert not known and sink_module._run_id(tmp_path) == (first, True)
    (tmp_path / "wandb_id").write_text("")
    second, known = sink_module._run_id(tmp_path)
    assert not known and second != first


@pytest.mark.parametrize("mode", ["online", None])
def test_no_login_is_reported_and_training_goes_on(tmp_path, mode):
    program = PROGRAM.replace("wandb=True", f"wandb=True, wandb_mode={mode!r}")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    env = {**kept, "HOME": str(tmp_path / "home"), "NETRC": str(tmp_path / "netrc")}
    words = [str(tmp_path), "1", "2", "new", "1", "ends"]
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "disttrain: wandb failed and is left out from now on" in done.stderr
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["kind"] for r in written] == ["header", "event", "step", "step", "eval", "summary"]
    assert written[1]["details"] == {"sink": "wandb"}
