"""The certificate: what was compared with what, how closely, and what came out. JSON, written at once."""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from disttrain.config.schema import Config
from disttrain.header import git_commit, versions
from disttrain.run import write_atomically
from disttrain.verify.batches import Batches
from disttrain.verify.compare import PHASES, SMALL_TENSOR, Difference
from disttrain.verify.findings import Finding
from disttrain.verify.plan import STEPS, changes, config_hash
from disttrain.verify.proof import Verdict
from disttrain.verify.tolerance import EXACT, FLOOR_MICRO_BATCHES, MULTIPLE, ROUNDING

FORMAT = 1


def certificate(
    config: Config, proof: Config, batches: Batches, verdicts: Sequence[Verdict], planned: int, interrupted: bool
) -> dict[str, Any]:
    """The whole certificate. `config` is the user's, `proof` what was run, `planned` the number of layouts asked for."""
    equal = sum(verdict.equal for verdict in verdicts)
    worst = [d for verdict in verdicts for d in verdict.worst.values()]
    return {
        "format": FORMAT,
        "equal": not interrupted and equal == planned == len(verdicts) and planned > 0,
        "interrupted": interrupted,
        "layouts": {"planned": planned, "compared": len(verdicts), "equal": equal},
        "worst": _difference(max(worst, key=lambda d: d.excess)) if worst else None,
        "config_sha256": config_hash(config),
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
