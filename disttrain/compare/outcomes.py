"""What became of every run of a comparison: one small file a run, so that tasks of an array do not meet. No torch."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from disttrain.compare.launching import Ending
from disttrain.compare.plan import Task
from disttrain.folders import write_atomically
from disttrain.loggers.jsonl import FILE

FOLDER = "outcomes"
LAST_BYTES = 20_000
"""As much of the end of a log is looked at for the reason of a failure."""
OUT_OF_MEMORY = ("OutOfMemoryError", "out of memory", "annot allocate memory", "can't allocate memory", "bad_alloc")
"""What CUDA, the allocators and the kernel say where memory runs out."""
State = Literal["done", "failed", "refused", "out of memory", "killed", "timed out", "interrupted"]


@dataclass(frozen=True)
class Outcome:
    """How the last attempt of a run ended."""

    strategy: str
    repeat: int
    state: State
    reason: str
    """One line; empty when it is done."""
    exit_code: int | None
    seconds: float
    """Wall time of the attempt, start-up included."""
    command: list[str]


def done(run_folder: Path) -> bool:
    """Whether a run ended as it was configured, by its summary.json."""
    try:
        summary = json.loads((run_folder / "summary.json").read_text())
    except (OSError, ValueError):
        return False
    return (run_folder / FILE).is_file() and summary.get("stop_reason") not in (None, "interrupted")


def save(folder: Path, outcome: Outcome) -> None:
    """Keep how a run ended, in place of what an earlier attempt left."""
    (folder / FOLDER).mkdir(exist_ok=True)
    path = folder / FOLDER / f"{outcome.strategy}-{outcome.repeat}.json"
    write_atomically(path, json.dumps(asdict(outcome), indent=1) + "\n")


def read(folder: Path, task: Task) -> Outcome | None:
    """How the last attempt of a run ended; None where there was none."""
    try:
        return Outcome(**json.loads((folder / FOLDER / f"{task.name}.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def judge(ending: Ending, exit_code: int, is_done: bool, said: str, timeout_s: float) -> tuple[State, str]:
    """State and reason of an attempt; `said` is the end of what it printed."""
    if is_done:
        return "done", ""
    if ending == "interrupted":
        return "interrupted", "the comparison was interrupted; the same command goes on"
    if ending == "timeout":
        return "timed out", f"not done after {timeout_s:g} s (timeout_s)"
    if exit_code == 2 and (problems := refusal(said)):
        return "refused", problems
    if any(words in said for words in OUT_OF_MEMORY):
        return "out of memory", _telling_line(said, OUT_OF_MEMORY)
    if exit_code in (-9, 137) or "was killed by SIGKILL" in said:
        return "killed", "a rank was killed by SIGKILL, which is what the kernel does where the host's memory runs out"
    if exit_code == 0:
        return "failed", "it ended, but not as it was configured: " + _telling_line(said, ())
    return "failed", f"exit code {exit_code}: {_telling_line(said, ('disttrain:',))}"


def refusal(said: str) -> str:
    """The problems in the list that refused input prints, each with its fix; empty where there is none."""
    found = re.findall(r"^ +\d+  (.+)\n +(.+)\n +fix: (.+)$", said, flags=re.MULTILINE)
    return "; ".join(f"{message} ({settings}; {fix})" for settings, message, fix in found)


def end_of(log: Path, start: int) -> str:
    """The last of what stands in a log behind `start` bytes."""
    with log.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(start, size - LAST_BYTES))
        return file.read().decode(errors="replace")


def _telling_line(said: str, words: Sequence[str]) -> str:
    """The last line with one of the words, or else the last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if any(word in line for word in words)] or lines
    return telling[-1][:300] if telling else "it said nothing"
