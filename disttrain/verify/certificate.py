"""The certificate: what was compared with what, how closely, and what came out. JSON, written at once."""

import hashlib
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from disttrain.config.problems import Problem, RefusedInput
from disttrain.config.schema import Config
from disttrain.folders import write_atomically
from disttrain.header import git_commit, versions
from disttrain.verify.batches import Batches
from disttrain.verify.compare import PHASES, SMALL_TENSOR, Difference
from disttrain.verify.findings import Finding
from disttrain.verify.layouts import Layout
from disttrain.verify.plan import STEPS, changes, config_hash
from disttrain.verify.proof import Verdict
from disttrain.verify.tolerance import EXACT, FLOOR_MICRO_BATCHES, MULTIPLE, ROUNDING

FORMAT = 2

SAME = (
    "format",
    "config_sha256",
    "code_sha256",
    "changed_for_the_proof",
    "batches",
    "precision",
    "tolerance",
    "versions",
)
"""What must be the same in a certificate for its results to count in a later one."""


def certificate(
    config: Config, proof: Config, batches: Batches, verdicts: Sequence[Verdict], planned: int, interrupted: bool,
    code: str,
) -> dict[str, Any]:  # fmt: skip
    """The whole certificate. `config` is the user's, `proof` what was run, `planned` the number of layouts asked for.

    `code` is `code_hash` of when the verification began.
    """
    equal = sum(verdict.equal for verdict in verdicts)
    worst = [d for verdict in verdicts for d in verdict.worst.values()]
    return {
        "format": FORMAT,
        "equal": not interrupted and equal == planned == len(verdicts) and planned > 0,
        "interrupted": interrupted,
        "layouts": {"planned": planned, "compared": len(verdicts), "equal": equal},
        "worst": _difference(max(worst, key=lambda d: d.excess)) if worst else None,
        "config_sha256": config_hash(config),
        "code_sha256": code,
        "config": config.model_dump(mode="json"),
        "changed_for_the_proof": changes(config, proof),
        "batches": batches.source,
        "precision": proof.precision,
        "tolerance": _tolerance(proof.precision),
        "reference": f"one process in float64, one micro-batch of the whole batch, {STEPS} steps",
        "phases": list(PHASES),
        "versions": versions(),
        "git_commit": git_commit(),
        "host": {"machine": platform.machine(), "system": platform.platform()},
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "results": [_result(verdict) for verdict in verdicts],
    }


def code_hash(config: Config) -> str:
    """SHA-256 over disttrain's own sources and the file of `model.source`."""
    package = Path(__file__).resolve().parent.parent
    files = sorted(package.rglob("*.py"))
    if config.model.source is not None:
        files.append(Path(config.model.source.rpartition(":")[0]))
    whole = hashlib.sha256()
    for file in files:
        whole.update(hashlib.sha256(file.read_bytes()).digest())
    return whole.hexdigest()


def proven(path: Path, now: Mapping[str, Any]) -> dict[str, Verdict]:
    """Equal layouts, by name, of an earlier certificate; none where there is no such file.

    `now` is a certificate of what is verified now. Raises RefusedInput where the earlier one is of something else.
    """
    if not path.exists():
        return {}
    try:
        before = json.loads(path.read_text())
        different = [key for key in SAME if before.get(key) != json.loads(json.dumps(now[key]))]
        results = [] if different else before["results"]
    except (ValueError, KeyError, AttributeError) as error:
        raise RefusedInput([Problem((f"--resume {path}",), f"this is no certificate of verify: {error}",
                                    "remove it, or name another file with --out")]) from None  # fmt: skip
    if different:
        raise RefusedInput([Problem((f"--resume {path}",), f"this certificate is of another {', '.join(different)}",
                                    "leave --resume away to begin anew, or name another file with --out")])  # fmt: skip
    return {r["layout"]: _verdict(r) for r in results if r["equal"]}


def _verdict(result: Mapping[str, Any]) -> Verdict:
    """Of an equal layout."""
    worst = {phase: Difference(**{k: _number(v) for k, v in d.items()}) for phase, d in result["worst"].items()}
    return Verdict(Layout(**result["settings"]), True, worst, [], result["seconds"])


def _number(value: Any) -> Any:
    """Undo what `_difference` does to numbers that JSON does not know."""
    return float(value) if value in ("nan", "inf", "-inf") else value


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Replace the file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _tolerance(precision: str) -> dict[str, Any]:
    if precision == "fp64":
        return {
            "relative_error": EXACT,
            "of": "the worst element of a tensor",
            "relative_to": f"its largest element, plus {SMALL_TENSOR:g} of the largest element of all tensors",
        }
    return {
        "multiple_of_noise_floor": MULTIPLE,
        "of": "the root mean square of a tensor",
        "relative_to": f"its root mean square, plus {SMALL_TENSOR:g} of the largest of all tensors",
        "noise_floor": "the largest error against float64 of one-process runs in this precision, over all steps; at "
        f"least the median of its phase, and {ROUNDING:.2g}",
        "noise_floor_micro_batches": ["all" if size is None else size for size in FLOOR_MICRO_BATCHES],
    }


def _result(verdict: Verdict) -> dict[str, Any]:
    found: dict[str, Any] = {
        "layout": verdict.layout.name,
        "settings": asdict(verdict.layout),
        "equal": verdict.equal,
        "seconds": round(verdict.seconds, 3),
        "worst": {phase: _difference(d) for phase, d in verdict.worst.items()},
    }
    if verdict.failures:
        found["differences"] = [_difference(d) for d in verdict.failures[:20]]
    if verdict.finding is not None:
        found["finding"] = _finding(verdict.finding)
    if verdict.error:
        found["error"] = verdict.error
    return found


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "first": _difference(finding.first),
        "others": finding.others,
        "smallest_layout": finding.smallest.name,
        "needs": list(finding.axes),
        "likely_cause": finding.cause,
        "rerun": finding.rerun,
    }


def _difference(difference: Difference) -> dict[str, Any]:
    """Numbers that JSON does not know become text."""
    found = asdict(difference)
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in found.items() if v != ""}
