"""What is entered in the ledger: a step, an evaluation, a checkpoint, and what an engine holds that has loaded one."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from disttrain.optim import in_parts
from disttrain.precision import LossScale
from disttrain.verify.compare import Ledger
from disttrain.verify.expectation import Following
from disttrain.verify.plan import SAVED
from disttrain.verify.records import Reference, StepTrace


@dataclass(frozen=True)
class Loaded:
    """What an engine holds; whole on rank 0."""

    said: list[tuple[LossScale, dict[str, Tensor]]]
    """The loss scale of each rank, and what of the optimizer's state is whole there, counts and factors, by their names in a
    checkpoint."""
    weights: dict[str, Tensor]
    apart: dict[str, float]
    """How far copies of a weight are apart."""
    moments: dict[str, Tensor]
    """By their names in a checkpoint."""


def compare_step(ledger: Ledger, ours: StepTrace, expected: StepTrace, tied: dict[str, str]) -> None:
    """Enter every quantity of one step."""
    step, (want,) = expected.step, expected.ranks
    for rank, view in enumerate(ours.ranks):
        at = f"on rank {rank}"
        for name, count in want.counts.items():
            ledger.exact("counts", step, name, view.counts.get(name), count, at)
        for name, loss in want.losses.items():
            ledger.number("forward", step, name, view.losses.get(name, math.nan), loss, at)
        ledger.number("grad_norm", step, "grad_norm", view.norm, want.norm, at)
        ledger.exact("skip", step, "skipped", view.skipped, want.skipped, at)
        for name, scale in want.scales.items():
            ledger.exact("skip", step, name, view.scales[name], scale, at)
    ledger.tensors("gradients", step, ours.gradients, expected.gradients, tied)
    if ours.clipped and expected.clipped:
        ledger.tensors("clip", step, ours.clipped, expected.clipped, tied)
    ledger.tensors("weights", step, ours.weights, expected.weights, tied)
    compare_copies(ledger, "gradients", step, ours.apart["gradient"])
    compare_copies(ledger, "replicas", step, ours.apart["weight"])


def compare_evaluation(ledger: Ledger, evaluations: list[dict[str, float]], expected: Reference) -> None:
    """Enter every rank's scores."""
    for rank, scores in enumerate(evaluations):
        for name, value in expected.evaluation.items():
            ledger.number("evaluation", SAVED, name, scores.get(name, math.nan), value, f"on rank {rank}")


def compare_copies(ledger: Ledger, phase: str, step: int, apart: dict[str, float]) -> None:
    """Enter how far copies of parameters are apart on ranks that hold the same part."""
    ledger.copies(phase, step, "copies", 0.0)
    for name, error in apart.items():
        ledger.copies(phase, step, name, error)


def compare_state(ledger: Ledger, ours: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Weights and moments under their names in a checkpoint."""
    for kind in sorted({kind_of(name) for name in ours.keys() | wanted.keys()}):
        ours_of, theirs_of = ({n: t for n, t in f.items() if kind_of(n) == kind} for f in (ours, wanted))
        ledger.tensors("checkpoint", SAVED, ours_of, theirs_of, {})


def compare_loaded(ledger: Ledger, loaded: Loaded, following: Following, reference: Reference) -> None:
    """All that an engine holds once it has loaded a checkpoint of one process."""
    wanted, wanted_scale = following.files, reference.saved
    for rank, (scale, whole) in enumerate(loaded.said):
        at = f"as loaded, on rank {rank}"
        ledger.exact("skip", SAVED, "loss_scale", scale.value, wanted_scale.value, at)
        ledger.exact("skip", SAVED, "good_steps", scale.good_steps, wanted_scale.good_steps, at)
        for name in (name for name, value in whole.items() if value.ndim == 0):
            ledger.exact("checkpoint", SAVED, name, float(whole[name]), float(wanted[name]), at)
        factors = {name: value for name, value in whole.items() if value.ndim}
        compare_state(ledger, factors, {name: wanted[name] for name in factors})
    met = {name for _, whole in loaded.said for name in whole}
    moments = moments_of(reference)
    for name in sorted(name for name in wanted.keys() - met if kind_of(name) not in ("weight", *moments)):
        ledger.exact("checkpoint", SAVED, name, None, float(wanted[name].flatten()[0]), "it is missing")
    ledger.tensors("weights", SAVED, loaded.weights, following.weights, reference.tied, "as loaded")
    compare_copies(ledger, "replicas", SAVED, loaded.apart)
    compare_state(ledger, loaded.moments, {name: wanted[name] for name in wanted if kind_of(name) in moments})


def moments_of(reference: Reference) -> list[str]:
    """What the optimizer has as many of as a parameter has elements: `exp_avg`, not `step` or `row_var`."""
    files = reference.files.items()
    return sorted({kind_of(name) for name, tensor in files if in_parts(kind_of(name), tensor)} - {"weight"})


def kind_of(name: str) -> str:
    """Weights, or one of the optimizer's moments: tensors of one size."""
    return "weight" if name.startswith("model.") else name.rsplit(".", 1)[-1]
