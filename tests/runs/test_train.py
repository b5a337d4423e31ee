"""Whole runs: files, records, sinks, stopping, two ranks as one, BERT, resume after every kind of end."""

import json
import os
import signal
import subprocess
import time

import pytest
import yaml

from disttrain.metrics import unknown_keys
from tests import warm
from tests.runs.conftest import Workplace
from tests.warm import Running


def test_a_run_leaves_the_files_of_the_contract(workplace: Workplace) -> None:
    done = workplace.run("train", "run.yaml", "--nproc", "2", "log.tensorboard=true")
    folder = workplace.folder / "runs" / "run"
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "loss_curve.png", "logs/rank_0000.log",
                 "logs/rank_0001.log", "checkpoints/step_00000012/manifest.json"):  # fmt: skip
        assert (folder / name).is_file(), name
    assert list((folder / "tensorboard").iterdir())
    assert [r["step"] for r in workplace.records("run", "step")] == list(range(1, 13))
    assert [r["step"] for r in workplace.records("run", "eval")] == [6, 12]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["kind"] for r in records].count("summary") == 1
    assert all(unknown_keys(record) == [] for record in records)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["step"], summary["stop_reason"], summary["tokens_seen"]) == (12, "steps", 12 * 8 * 32)
    assert summary["mfu_causal_mean"] is None  # a CPU has no datasheet peak
    assert summary["host_rss_bytes_max"] > 50e6
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [f"step_000000{s}" for s in ("04", "08", "12")]
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["vocab_size"] == 261
    assert "held-out" in done.stdout
    workplace.run("report", "runs/run")
    again = workplace.run("train", "run.yaml", "--nproc", "2")  # a finished run is not trained further
    assert "12/12" in again.stdout
    assert len(workplace.records("run", "step")) == 12


def test_two_ranks_and_accumulation_equal_one_process(workplace: Workplace) -> None:
    words = ["train", "run.yaml", "precision=fp64", "model.dropout=0", "checkpoint.every=0"]
    workplace.run(*words, "run.name=one")
    workplace.run(*words, "run.name=two", "--nproc", "2", "train.micro_batch_size=2")
    for one, two in zip(workplace.curve("one"), workplace.curve("two"), strict=True):
        assert two == pytest.approx(one, rel=1e-10)
    one, two = workplace.evaluations("one"), workplace.evaluations("two")
    assert [e[0] for e in one] == [e[0] for e in two]
    assert [e[1] for e in two] == pytest.approx([e[1] for e in one], rel=1e-10)
    assert workplace.curve("one")[0][1] > workplace.curve("one")[-1][1] + 1  # and it learns


def test_bert_trains_and_is_scored(workplace: Workplace) -> None:
    workplace.run("train", "run.yaml", "--nproc", "2", "model.family=bert", "data.document=line",
                  "data.sequence_length=160", "model.max_positions=160", "precision=bf16")  # fmt: skip
    first, last = (workplace.records("run", "step")[i] for i in (0, -1))
    assert last["loss"] < first["loss"]
    assert first["loss"] == pytest.approx(first["loss_mlm"] + first["loss_nsp"])
    assert last["tokens_seen"] < 12 * 8 * 160  # padding does not count
    assert first["tokens_seen"] + first["padded_tokens"] == 8 * 160
    evaluation = workplace.records("run", "eval")[-1]
    assert 0 <= evaluation["mlm_accuracy"] <= 1
    assert 0 <= evaluation["nsp_accuracy"] <= 1


def wait_for_step(workplace: Workplace, process: Running, step: int) -> None:
    deadline = time.monotonic() + 90
    while not any(r["step"] >= step for r in workplace.records("run", "step")):
        assert process.poll() is None, process.output.read_text()
        assert time.monotonic() < deadline, "the run did not get anywhere"
        time.sleep(0.01)


@pytest.fixture
def undisturbed(workplace: Workplace) -> Workplace:
    """A workplace with the reference run named "reference": long enough to be caught in the middle."""
    workplace.run("train", "run.yaml", "run.name=reference", "--nproc", "2", "train.steps=200", "train.eval_every=50",
                  "checkpoint.every=25")  # fmt: skip
    return workplace


LONG = ("train", "run.yaml", "--nproc", "2", "train.steps=200", "train.eval_every=50", "checkpoint.every=25")


def test_resume_after_every_kind_of_end_is_bit_exact(undisturbed: Workplace) -> None:
    """Ctrl-C, then SIGTERM, then kill -9 of everything, then kill -9 of one rank; the curve is the undisturbed one."""
    workplace = undisturbed
    for number, step, code in ((signal.SIGINT, 10, 130), (signal.SIGTERM, 60, 130)):
        process = workplace.start(*LONG)
        wait_for_step(workplace, process, step)
        process.send_signal(number)
        output = process.communicate(timeout=60)
        assert process.returncode == code, output
        assert "Traceback" not in output, output
        assert workplace.records("run", "summary")[-1]["stop_reason"] == "interrupted"
        newest = max((workplace.folder / "runs/run/checkpoints").iterdir()).name
        assert newest == f"step_{workplace.records('run', 'step')[-1]['step']:08d}"  # nothing is lost
    process = workplace.start(*LONG)
    wait_for_step(workplace, process, 105)
    kill_all(process)
    process = workplace.start(*LONG)
    wait_for_step(workplace, process, 155)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    output = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert "was killed by SIGKILL" in output
    workplace.run(*LONG)
    assert workplace.curve("run") == workplace.curve("reference")
    assert workplace.evaluations("run") == workplace.evaluations("reference")
    assert workplace.records("run", "summary")[-1]["tokens_seen"] == 200 * 8 * 32


def ranks_of(process: Running) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    return [int(pid) for pid in found]


def kill_all(process: Running) -> None:
    for pid in ranks_of(process):
        os.kill(pid, signal.SIGKILL)
    process.kill()
    process.wait(60)


def test_ranks_end_when_their_parent_is_killed(workplace: Workplace) -> None:
    process = workplace.start(*LONG)
    wait_for_step(workplace, process, 5)
    ranks = ranks_of(process)
    process.kill()
    deadline = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{pid}") for pid in ranks):
        assert time.monotonic() < deadline, "orphaned ranks go on training"
        time.sleep(0.1)


def test_a_second_run_in_the_same_folder_is_refused(workplace: Workplace) -> None:
    process = workplace.start("train", "run.yaml", "train.steps=100000", "train.eval_every=0")
    wait_for_step(workplace, process, 2)
    done = workplace.run("train", "run.yaml", "train.steps=100000", "train.eval_every=0", code=2)
    assert "another process is training in this folder" in done.stderr
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130


def test_early_stops(workplace: Workplace) -> None:
    workplace.run("train", "run.yaml", "run.name=target", "train.target_loss=5.3", "train.eval_every=1")
    workplace.run("train", "run.yaml", "run.name=late", "train.steps=100000", "train.seconds=0.5", "train.eval_every=0")
    workplace.run("train", "run.yaml", "run.name=tokens", "train.tokens=1000")
    summaries = {name: workplace.records(name, "summary")[0] for name in ("target", "late", "tokens")}
    assert {name: s["stop_reason"] for name, s in summaries.items()} == {
        "target": "target_loss", "late": "time", "tokens": "steps"}  # fmt: skip
    assert summaries["target"]["eval_loss"] <= 5.3
    assert summaries["target"]["step"] < 12
    assert summaries["tokens"]["step"] == 4  # 256 tokens a step


def test_changing_what_was_trained_is_refused(workplace: Workplace) -> None:
    workplace.run("train", "run.yaml")
    words = ["model.layers=2", "run.seed=7", "train.global_batch_size=16"]
    done = workplace.run("train", "run.yaml", *words, code=2)
    assert all(word in done.stderr for word in words)
    workplace.run("train", "run.yaml", "train.steps=14", "optim.lr=1e-3")  # this may change
    assert [r["step"] for r in workplace.records("run", "step")] == list(range(1, 15))


def test_a_new_run_starts_from_another_runs_checkpoint(workplace: Workplace) -> None:
    workplace.run("train", "run.yaml")
    start = "runs/run/checkpoints/step_00000008"
    workplace.run("train", "run.yaml", "run.name=branch", "--resume", start)
    assert workplace.curve("branch") == workplace.curve("run")[8:]
    done = workplace.run("train", "run.yaml", "run.name=branch", "--resume", start, code=2)
    assert "already holds a run" in done.stderr
    workplace.run("train", "run.yaml", "run.name=branch", "--resume", "never", code=2)


def test_ctrl_c_while_data_is_prepared(workplace: Workplace) -> None:
    """It ends at once with 130, and the same command goes on with what is complete."""
    text = workplace.folder / "corpus" / "text.txt"
    for number in range(24):
        (text.parent / f"{number}.txt").write_text(text.read_text() * 15)
    words = ("train", "run.yaml", "data.tokenizer=bpe", "data.tokenizer_vocab_size=300", "train.steps=2",
             "optim.warmup_steps=0")  # fmt: skip
    process = workplace.start(*words)
    deadline = time.monotonic() + 90
    while not list(workplace.folder.glob("cache/tokens/*/shard_*.json")):
        assert process.poll() is None, process.output.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    workplace.run(*words)
    assert len(workplace.records("run", "step")) == 2


def test_divergence_is_one_clear_line(workplace: Workplace) -> None:
    done = workplace.run(
        "train", "run.yaml", "optim.lr=1e30", "optim.warmup_steps=0", "train.clip_grad_norm=null", code=1
    )
    assert "lower optim.lr" in done.stderr


def test_fp16_scales_its_loss(workplace: Workplace) -> None:
    workplace.run("train", "run.yaml", "precision=fp16", "loss_scale.initial=1e12", "train.steps=40")
    records = workplace.records("run", "step")
    assert records[0]["loss_scale"] == 1e12
    assert 0 < records[-1]["skipped_steps"] < 40
    assert records[-1]["loss_scale"] < 1e12
    assert records[-1]["loss"] < records[0]["loss"]


def test_every_n_steps(workplace: Workplace) -> None:
    """Records every 5 steps, and where an evaluation, a checkpoint or the end needs the totals."""
    workplace.run("train", "run.yaml", "log.every=5")
    records = workplace.records("run", "step")
    assert [r["step"] for r in records] == [4, 5, 6, 8, 10, 12]
    assert [r["interval_steps"] for r in records] == [4, 1, 1, 2, 2, 2]
    assert records[-1]["tokens_seen"] == 12 * 8 * 32


def test_sampling_from_a_run(workplace: Workplace) -> None:
    workplace.run("train", "run.yaml", "train.steps=60", "train.eval_every=0", "checkpoint.every=0")
    done = workplace.run("sample", "runs/run", "--prompt", "alpha ", "--tokens", "30", "--temperature", "0")
    assert done.stdout.startswith("alpha ")
    assert len(done.stdout) > 20
    assert (
        workplace.run("sample", "runs/run", "--seed", "3").stdout
        == workplace.run("sample", "runs/run", "--seed", "3").stdout
    )
    assert "no checkpoint" in workplace.run("sample", "runs/none", code=2).stderr


def test_demo_beats_uniform_and_shows_samples(workplace: Workplace) -> None:
    words = ["train.steps=60", "train.eval_every=0", "train.eval_sequences=null", "optim.lr=2e-2", "model.dropout=0"]
    done = warm.run(
        ["demo", "run.yaml", "--nproc", "2", *words], workplace.folder, workplace.environment, timeout_s=200
    )
    assert done.returncode in (0, 1), done.stderr
    assert "Kneser-Ney trigram" in done.stdout
    assert "What it writes" in done.stdout
    assert ("beats" if done.returncode == 0 else "does not beat") in done.stdout


def test_the_best_and_every_sixth_are_kept(workplace: Workplace) -> None:
    kept = [
        "checkpoint.every=2",
        "train.eval_every=2",
        "checkpoint.keep=1",
        "checkpoint.keep_every=6",
        "checkpoint.keep_best=1",
    ]
    workplace.run("train", "run.yaml", *kept, "train.steps=10")
    losses = {record["step"]: record["eval_loss"] for record in workplace.records("run", "eval")}
    best = min((loss, step) for step, loss in losses.items())[1]
    there = sorted(int(p.name.removeprefix("step_")) for p in (workplace.folder / "runs/run/checkpoints").iterdir())
    assert there == sorted({6, 10, best})


def test_without_workers_a_run_says_what_it_drops(workplace: Workplace) -> None:
    apart = ["outer.method=average", "outer.every=5", "checkpoint.every=4"]
    workplace.run("train", "run.yaml", "--nproc", "2", *apart, "train.steps=4", "train.eval_every=0")
    workplace.run("train", "run.yaml", "--nproc", "2", "train.steps=6", "train.eval_every=0")
    (event,) = [e for e in workplace.records("run", "event") if e["event"] == "workers_dropped"]
    assert event["step"] == 4
    assert [step["step"] for step in workplace.records("run", "step")] == list(range(1, 7))


def test_auto_shows_what_it_compared_and_trains_with_it(workplace: Workplace) -> None:
    done = workplace.run("train", "run.yaml", "--nproc", "2", "compression.codec=auto")
    (event,) = [e for e in workplace.records("run", "event") if e["event"] == "codec_chosen"]
    assert event["message"] in " ".join(done.stdout.split())
    candidates = {each["codec"]: each for each in event["details"]["candidates"]}
    taken = workplace.records("run", "header")[0]["config"]["compression"]["codec"]
    assert candidates[taken]["step_s"] <= 1.03 * min(each["step_s"] for each in candidates.values())
    step = workplace.records("run", "step")[-1]
    assert step["predicted_step_seconds"] == candidates[taken]["step_s"]
    assert "predicted" in done.stdout
    alone = workplace.run("train", "run.yaml", "compression.codec=auto", "run.name=alone")
    assert "codec" not in alone.stdout
