"""Layouts compared with one process: references, noise floors, and one layout at a time on forked ranks."""

import math
import os
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from disttrain.config.load import with_values
from disttrain.config.schema import Config, Precision
from disttrain.models import model_class
from disttrain.verify.batches import Batches
from disttrain.verify.compare import Difference, first_of
from disttrain.verify.findings import Finding, explain
from disttrain.verify.layouts import Layout
from disttrain.verify.plan import HUNG, OVERFLOW, config_hash
from disttrain.verify.ranks import Ranks, RanksFailed, run_ranks
from disttrain.verify.records import Reference
from disttrain.verify.tolerance import FLOOR_MICRO_BATCHES, Exactly, Key, Measuring, Noise, Tolerance
from disttrain.verify.trace import Comparison, Plant, compare, record

COMPILING_S = 600.0
"""Further seconds for a layout that compiles its blocks."""


@dataclass(frozen=True)
class Verdict:
    """One layout."""

    layout: Layout
    equal: bool
    worst: dict[str, Difference]
    """Largest error of each phase that was reached."""
    failures: list[Difference]
    """Of the first phase that differs, the worst first."""
    seconds: float
    error: str = ""
    """What the ranks said, when they raised or hung."""
    finding: Finding | None = None


@dataclass
class Proof:
    """A config as `plan.proof_config` gives it, its batches, and what one process does with them."""

    config: Config
    batches: Batches
    precision: Precision = "fp64"
    plant: Plant | None = None
    """A fault planted in every layout, never in the reference (tests)."""
    overflows: bool = True
    """Whether step 2 overflows; DeepSpeed keeps its gradients to itself, so nobody can make them infinite."""
    timeout_s: float | None = None
    """Seconds a layout may take; from the reference's time when not given."""
    _references: dict[str, tuple[Config, Reference, Tolerance]] = field(default_factory=dict)
    _folder: Path | None = None
    _ranks: Ranks | None = None
    """They know the reference `_known`."""
    _known: Reference | None = None

    def __enter__(self) -> "Proof":
        """Make room for checkpoints."""
        self._folder = Path(tempfile.mkdtemp(prefix="disttrain-verify-"))
        return self

    def __exit__(self, *error: object) -> None:
        """Remove them, and the references whose checkpoints they hold."""
        if self._ranks is not None:
            self._ranks.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._references.clear()

    @property
    def folder(self) -> Path:
        """Where checkpoints go while the proof is open. Raises ValueError when it is not."""
        if self._folder is None:
            raise ValueError("open the proof with `with`")
        return self._folder

    def reference(self, config: Config | None = None) -> tuple[Config, Reference, Tolerance]:
        """(config with the clip threshold, one process in float64, tolerance); made when first asked for."""
        config = config or self.config
        key = config_hash(config)
        if key not in self._references:
            self._references[key] = self._make_reference(config, key)
        return self._references[key]

    def verify(self, layout: Layout, config: Config | None = None, until: tuple[str, int] | None = None) -> Verdict:
        """Run a layout and compare it, up to a phase and step if given."""
        config, reference, tolerance = self.reference(config)
        return self._compare(config, reference, layout, tolerance, until)

    def explain(self, verdict: Verdict, command: str, bisect: bool = True) -> Finding:
        """Why a layout is not equal; runs smaller layouts to find out what it takes."""
        tied = model_class(self.config.model).tied

        def fails(layout: Layout, config: Config, wanted: Difference) -> list[Difference]:
            return self.verify(layout, config, (wanted.phase, wanted.step)).failures

        names = frozenset([*tied.keys(), *tied.values()])
        return explain(self.config, verdict.layout, verdict.failures, fails, names, command, bisect)

    def _make_reference(self, config: Config, key: str) -> tuple[Config, Reference, Tolerance]:
        exact = with_values(config, {"precision": "fp64"})
        free = Layout().applied(with_values(exact, {"train.clip_grad_norm": None}))
        folder = self.folder / key[:12]
        (probe,) = run_ranks(record, 1, free, "fp64", self.batches, folder, self.overflows, timeout_s=3600)
        chosen = {"train.clip_grad_norm": clip_threshold(probe)}
        config, exact = with_values(config, chosen), Layout().applied(with_values(exact, chosen))
        (reference,) = run_ranks(record, 1, exact, "fp64", self.batches, folder, self.overflows, timeout_s=3600)
        if self.precision == "fp64":
            return config, reference, Exactly()
        errors: dict[Key, float] = {}
        for size in FLOOR_MICRO_BATCHES:
            alone = Layout(micro_batch=size)
            found = self._run(config, reference, alone, Measuring(), None).errors
            errors |= {quantity: max(errors.get(quantity, 0.0), error) for quantity, error in found.items()}
        return config, reference, Noise.of(errors)

    def _compare(
        self, config: Config, reference: Reference, layout: Layout, tolerance: Tolerance, until: tuple[str, int] | None
    ) -> Verdict:
        started = time.monotonic()
        try:
            found = self._run(config, reference, layout, tolerance, self.plant, until)
        except RanksFailed as error:
            name = HUNG if error.hung else last_line(next(iter(error.raised.values()), str(error)))
            failure = Difference("run", 0, name, math.inf, 0.0, math.nan, math.nan)
            seconds = time.monotonic() - started
            return Verdict(layout, False, {"run": failure}, [failure], seconds, str(error))
        failures = first_of(found.failures)
        return Verdict(layout, not failures, found.worst, failures, time.monotonic() - started)

    def _run(
        self, config: Config, reference: Reference, layout: Layout, tolerance: Tolerance, plant: Plant | None,
        until: tuple[str, int] | None = None,
    ) -> Comparison:  # fmt: skip
        folder = self.folder / "layout"
        applied = layout.applied(config)
        cores = len(os.sched_getaffinity(0))
        patience = self.timeout_s or 90 + 60 * reference.seconds * max(1.0, layout.world / cores)
        patience += COMPILING_S if layout.compile else 0.0
        try:
            if plant is None and layout.engine == "native" and not layout.compile:
                ranks = self._knowing(reference)
                return ranks.run(layout.world, applied, folder, tolerance, until, timeout_s=patience)[0]
            return run_ranks(  # what may leave traces in a process has one of its own
                compare, layout.world, applied, self.precision, self.batches, reference, folder, tolerance,
                self.overflows, plant, until, timeout_s=patience,
            )[0]  # fmt: skip
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _knowing(self, reference: Reference) -> Ranks:
        """Ranks for one layout after another that is compared with this reference."""
        if self._ranks is None or self._known is not reference:
            if self._ranks is not None:
                self._ranks.close()
            kept = self.precision, self.batches, reference
            self._known, self._ranks = reference, Ranks(
                lambda rank, config, folder, tolerance, until: compare(
                    rank, config, *kept, folder, tolerance, self.overflows, None, until
                )
            )  # fmt: skip
        return self._ranks


def clip_threshold(probe: Reference) -> float:
    """Between the middle two gradient norms of the steps that are not skipped: some are clipped, some are not."""
    norms = sorted(trace.ranks[0].norm for trace in probe.steps if trace.step != OVERFLOW)
    middle = len(norms) // 2
    return (norms[middle - 1] + norms[middle]) / 2


def last_line(traceback: str) -> str:
    """What a traceback says in the end, with the place where it says nothing more than the kind of error."""
    lines = [line.strip() for line in traceback.strip().splitlines() if line.strip()]
    if not lines:
        return "no message"
    place = next((line for line in reversed(lines) if line.startswith('File "')), "")
    return lines[-1][:200] if ": " in lines[-1] or not place else f"{lines[-1]} in {place}"
