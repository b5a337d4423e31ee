"""Run folders with numbers that can be worked out by hand, and a command that makes them in place of a training.

As a program it is a launcher of a sweep: `made_up.py NPROC train CONFIG KEY=VALUE...`. It imports nothing that takes long.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

HEADER = {"kind": "header", "time": 1.0, "world_size": 2, "launcher": "local", "precision": "fp32", "parameters": 1_000_000,
          "versions": {"disttrain": "0", "torch": "2"}, "git_commit": "abc", "peak_flops_source": "no datasheet figure",
          "hardware": {"host": "h", "device": "a CPU", "cores": 2}}  # fmt: skip
CONFIG = {"run": {"name": "x", "dir": "runs", "seed": 0, "compile": False}, "model": {"family": "gpt"},
          "data": {"corpus": "text"}, "parallel": {"tensor": 1}, "log": {"every": 1}}  # fmt: skip


def step(n: int, seconds: float, loss: float, tokens: int = 100, **more: Any) -> dict[str, Any]:
    """Step n of a run whose steps all take as long; the first is a warm-up step."""
    rate = tokens / seconds
    record = {"kind": "step", "time": 1.0, "step": n, "tokens_seen": tokens * n, "loss": loss, "interval_steps": 1}
    record |= {
        "warmup": n == 1,
        "step_seconds": seconds,
        "tokens_per_second": rate,
        "tokens_per_second_per_rank": rate / 2,
    }
    record |= {
        "sequences_per_second": 1.0,
        "model_flops_per_second_per_rank": 1e9,
        "mfu_causal": None,
        "mfu_full": None,
    }
    record |= {"hfu": None, "elapsed_seconds": 2 * seconds * n, "train_seconds": seconds * n, "skipped_steps": 0}
    record |= {"peak_reserved_bytes_max": None, "host_rss_bytes_max": 300 * 2**20, "host_rss_bytes_max_rank": 1}
    record |= {
        "comm_bytes_per_step": 4 * 2**20,
        "comm_bytes_uncompressed_per_step": 8 * 2**20,
        "wire_bytes_per_step": 2**20,
    }
    return {**record, "pipeline_bubble_fraction": None, "pipeline_bubble_fraction_theory": None, **more}


def records(name: str, steps: list[dict], held_out: float = 1.5, **header: Any) -> list[dict]:
    """A run that is done."""
    last = steps[-1]
    config = {**CONFIG, "run": {**CONFIG["run"], "name": name}, **header.pop("config", {})}
    first = {**HEADER, "name": name, "config": config, **header}
    evaluation = {"kind": "eval", "step": last["step"], "tokens_seen": last["tokens_seen"], "eval_loss": held_out}
    summary = {"kind": "summary", "step": last["step"], "stop_reason": "steps", "loss": last["loss"],
               "elapsed_seconds": last["elapsed_seconds"], "train_seconds": last["train_seconds"],
               "tokens_per_second_mean": last["tokens_per_second"], "host_rss_bytes_max": last["host_rss_bytes_max"],
               "peak_reserved_bytes_max": last["peak_reserved_bytes_max"]}  # fmt: skip
    return [first, *steps, evaluation, summary]


def write(folder: Path, made: list[dict]) -> Path:
    """Put the records of a run, and its summary when it has one, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in made))
    if made[-1]["kind"] == "summary":
        (folder / "summary.json").write_text(json.dumps(made[-1]))
    return folder


def train(words: list[str]) -> int:
    """What the settings ask for: optim.lr=0.1 fails at first, 0.2 is out of memory, 0.3 is refused, 0.4 takes for ever."""
    settings = dict(word.split("=", 1) for word in words if "=" in word)
    folder = Path(settings["run.dir"]) / settings["run.name"]
    rate = settings.get("optim.lr")
    with open("order.txt", "a") as file:
        file.write(settings["run.name"] + "\n")
    tried = Path("tried")
    if rate == "0.1" and not tried.exists():
        tried.touch()
        print("disttrain: it broke\nlast words")
        return 1
    if rate == "0.2":
        print("torch.OutOfMemoryError: CUDA out of memory")
        return 1
    if rate == "0.3":
        print(
            "disttrain: 1 problem; nothing was started\n\n  1  a=1, b=2\n     they differ\n     fix: make them equal\n"
        )
        return 2
    if rate == "0.4":
        write(folder, [{**HEADER, "name": folder.name}, step(1, 0.5, 3.0)])
        time.sleep(60)
    write(folder, records(folder.name, [step(n, 0.5, 4 / n) for n in range(1, 5)]))
    (folder / "checkpoints" / "step_00000004").mkdir(parents=True, exist_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(train(sys.argv[3:]))
