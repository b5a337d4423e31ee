"""What one run does, step by step, on one process or under a layout: recorded once, compared ever after.

Three optimizer steps. After the first come an evaluation and a checkpoint. In step 2, where the engine can be made to
overflow, one element of one gradient of the last rank becomes infinite: all ranks must skip it and halve the loss scale.
Step 3 is done twice: straight on, and by a fresh engine from the layout's own checkpoint, which is the same but for the
loss scale, since a skipped step changes nothing else. (Where no step is skipped, it is step 2 that is done twice.) The
fresh engine then loads the checkpoint that one process wrote, and everything it holds afterwards is compared.
"""

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint  # noqa: F401  here, so that not every forked rank loads it again
from torch import Tensor

from disttrain import checkpoint, engines
from disttrain.config.schema import Config, Precision
from disttrain.engines.native import NativeEngine
from disttrain.mesh import build_mesh
from disttrain.models import model_class
from disttrain.parallel.collectives import Traffic, gather_objects
from disttrain.parallel.groups import Groups, make_groups
from disttrain.parallel.sharding import local
from disttrain.precision import LossScale
from disttrain.verify.batches import Batches, micro_batches
from disttrain.verify.compare import PHASES, Difference, Ledger, place_of
from disttrain.verify.entries import (
    Loaded,
    compare_copies,
    compare_evaluation,
    compare_loaded,
    compare_state,
    compare_step,
    moments_of,
)
from disttrain.verify.expectation import Following, expectation
from disttrain.verify.gathering import Brought, Gathering, agreed
from disttrain.verify.plan import OVERFLOW, SAVED, STEPS, rate
from disttrain.verify.records import RankView, Reference, StepTrace, scales
from disttrain.verify.tolerance import Key, Tolerance

SCALE = LossScale(value=1024.0, growth_interval=2, minimum=1.0)
"""Loss scale at the start: half-way to doubling when it is saved, halved by the overflow, doubled by the resumed step."""


@dataclass(frozen=True)
class Comparison:
    """A layout beside the reference."""

    worst: dict[str, Difference]
    """Largest error of each phase that was reached."""
    failures: list[Difference]
    """Of the step or phase where the first one was met; comparing ends there."""
    errors: dict[Key, float]
    seconds: float


Plant = Callable[[], None]


def record(
    rank: int, config: Config, precision: Precision, batches: Batches, folder: Path, overflows: bool
) -> Reference:
    """The reference: run it as the only rank of a world. Its checkpoint goes below `folder`."""
    started = time.monotonic()
    observed = _Observed(_groups(rank, config), config, precision, batches, overflows)
    reference = Reference(observed.tied, observed.weights()[0])
    for step in range(1, STEPS + 1):
        trace = observed.step(step)
        reference.steps.append(trace)
        if step == SAVED:
            reference.evaluation = observed.evaluate()
            reference.checkpoint = observed.save(folder)
            reference.files = checkpoint.read(reference.checkpoint)
            reference.saved = observed.engine.scale
    observed.close()
    reference.seconds = time.monotonic() - started
    return reference


def compare(
    rank: int, config: Config, precision: Precision, batches: Batches, reference: Reference, folder: Path,
    tolerance: Tolerance, overflows: bool, plant: Plant | None = None, until: tuple[str, int] | None = None,
) -> Comparison:  # fmt: skip
    """One rank of a layout, compared with the reference as it goes; only rank 0's result counts.

    It ends with the first difference, or once the phase and step `until` were compared. `plant`, if given, is called
    first: a test's fault.
    """
    started = time.monotonic()
    if plant is not None:
        plant()
    ledger = Ledger(tolerance)
    if until is None or until[0] == "run":  # which may happen anywhere
        until = PHASES[-1], STEPS
    groups = _groups(rank, config)
    for done in _compare(groups, config, precision, batches, reference, folder, ledger, overflows):
        if agreed(bool(ledger.failures), groups) or place_of(*done) >= place_of(*until):
            break
    return Comparison(ledger.worst, ledger.failures, ledger.errors, time.monotonic() - started)


def _compare(
    groups: Groups, config: Config, precision: Precision, batches: Batches, reference: Reference, folder: Path,
    ledger: Ledger, overflows: bool,
) -> Iterator[tuple[str, int]]:  # fmt: skip
    """Compare one thing after the other; yields the phase and step that are done, when it may be stopped."""
    following = expectation(config, precision, reference)
    with closing(_Observed(groups, config, precision, batches, overflows)) as observed:
        path = yield from _compare_training(ledger, observed, reference, following, folder)
    with closing(_Observed(groups, config, precision, batches, False)) as observed:
        if groups.rank == 0:
            ledger.label, following = "resume", following.resumed()
        observed.load(path)
        weights, _ = observed.weights()
        if groups.rank == 0:
            ledger.tensors("weights", SAVED, weights, following.weights, reference.tied, "as loaded")
        _compare_step(ledger, observed, following, reference.repeated.step)
        yield "resume", STEPS
        observed.load(reference.checkpoint)
        loaded = observed.loaded(reference)
        if groups.rank == 0:
            ledger.label, following = "reshard", following.resharded()
            compare_loaded(ledger, loaded, following, reference)
        yield "reshard", SAVED


def _compare_training(
    ledger: Ledger, observed: "_Observed", reference: Reference, following: Following, folder: Path
) -> Generator[tuple[str, int], None, Path]:
    """From the initial weights to the last step; gives the checkpoint that was written on the way."""
    rank, path = observed.groups.rank, folder
    initial, apart = observed.weights()
    if rank == 0:
        ledger.tensors("initial_weights", 0, initial, reference.initial, reference.tied)
        following.start(initial)
        compare_copies(ledger, "replicas", 0, apart)
    yield "replicas", 0
    for step in range(1, STEPS + 1):
        _compare_step(ledger, observed, following, step)
        yield "replicas", step
        if step == SAVED:
            compare_evaluation(ledger, gather_objects(observed.evaluate()), reference)
            yield "evaluation", step
            path = observed.save(folder)
            if rank == 0:
                compare_state(ledger, checkpoint.read(path), following.files)
            yield "checkpoint", step
    return path


def _compare_step(ledger: Ledger, observed: "_Observed", following: Following, step: int) -> None:
    trace = observed.step(step)
    if observed.groups.rank == 0:
        compare_step(ledger, trace, following.step(trace), observed.tied)


def _groups(rank: int, config: Config) -> Groups:
    return make_groups(build_mesh(config.parallel, dist.get_world_size()), rank, "cpu", Traffic())


class _Observed:
    """One rank's engine, watched."""

    def __init__(self, groups: Groups, config: Config, precision: Precision, batches: Batches, overflows: bool) -> None:
        self.config, self.batches, self.groups = config, batches, groups
        self.share = (groups.mesh.data_rank(groups.rank), groups.mesh.data_ranks, config.train.micro_batch_size)
        self.engine = engines.build(config, self.groups, torch.device("cpu"), precision)
        self._overflowing = self.engine if isinstance(self.engine, NativeEngine) and overflows else None
        if self._overflowing is not None:
            self._overflowing.scale = SCALE
        self.engine.watch = self._watch
        self.tied: dict[str, str] = dict(model_class(config.model).tied)
        self._step = 0
        self._gathering = Gathering(self.engine.held("weight"), groups)
        self._seen: dict[str, np.ndarray] = {}
        self._scale = 1.0

    def weights(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Whole weights on rank 0, as the model has them: an optimizer could hold others; and how far copies are apart."""
        brought = self._bring(None, {}, {})
        return brought.whole.get("weight", {}), brought.apart["weight"]

    def step(self, step: int) -> StepTrace:
        """One optimizer step, with everything that can be seen of it."""
        self._step, self._seen = step, {}
        mine = micro_batches(self.batches.train[step - 1], *self.share)
        result = self.engine.step(mine, step, rate(self.config, step))
        view = RankView(
            losses={name: float(loss.sum) / max(int(loss.count), 1) for name, loss in result.losses.items()},
            counts={name: int(loss.count) for name, loss in result.losses.items()}
            | {"tokens": int(result.tokens), "positions": result.positions},
            norm=float(result.grad_norm),
            skipped=result.skipped,
            scales=scales(result.loss_scale, self.engine.scale),
        )
        brought = self._bring(view, self._seen, {"gradient": self._seen["gradient"]})
        whole = {kind: brought.whole.get(kind, {}) for kind in ("gradient", "clipped", "weight")}
        gradients = {name: tensor / self._scale for name, tensor in whole["gradient"].items()}
        clipped = {} if result.skipped else whole["clipped"]
        return StepTrace(step, brought.said, gradients, clipped, whole["weight"], brought.apart)

    def _bring(self, said: Any, values: dict[str, np.ndarray], copies: dict[str, np.ndarray]) -> Brought:
        """With the weights as they are now."""
        flat, held = self._gathering.flat, self.engine.held
        return self._gathering.bring(
            said, values | {"weight": flat(held("parameter"))}, copies | {"weight": flat(held("weight"))}
        )

    def evaluate(self) -> dict[str, float]:
        """Means of every objective and score over the held-out batch."""
        sums = self.engine.evaluate(micro_batches(self.batches.held_out, *self.share))
        return {name: float(total) / max(float(count), 1.0) for name, (total, count) in sums.items()}

    def save(self, folder: Path) -> Path:
        """Write a checkpoint as training does."""
        state = self.engine.state_dict()
        trainer = {"step": self._step, "engine": state.pop("engine")}
        return checkpoint.save(folder, self._step, state, trainer, keep=1)

    def load(self, path: Path) -> None:
        """Take over a checkpoint as training does."""
        state = self.engine.to_fill(lambda: checkpoint.shapes(path))
        trainer = checkpoint.load(path, state)
        self.engine.load_state_dict({**state, "engine": trainer["engine"]})

    def loaded(self, reference: Reference) -> Loaded:
        """Weights, the optimizer's state and the loss scale, as they are now."""
        saved = self.engine.state_dict()["optimizer"]
        weights = self.engine.held("weight")
        names = [shard.tied_to or shard.name for shard, _ in weights]
        kinds = moments_of(reference)
        values = {
            kind: self._gathering.flat([
                (shard, local(saved.get(name, {}).get(kind, weight)))
                for name, (shard, weight) in zip(names, weights, strict=True)
            ])
            for kind in kinds
        }  # fmt: skip
        whole = {
            f"optimizer.{name}.{key}": value.detach().cpu()
            for name, state in saved.items()
            for key, value in state.items()
            if key not in kinds
        }
        brought = self._bring((self.engine.scale, whole), values, {})
        moments = {f"optimizer.{n}.{kind}": t for kind in kinds for n, t in brought.whole.get(kind, {}).items()}
        kept = {name: t for name, t in moments.items() if name in reference.files}  # not every parameter has every kind
        return Loaded(brought.said, brought.whole.get("weight", {}), brought.apart["weight"], kept)

    def close(self) -> None:
        """Let go of the engine."""
        self.engine.watch = None
        self.engine.close()

    def _watch(self, moment: str) -> None:
        if moment in ("reduced", "clipped"):
            kind = "gradient" if moment == "reduced" else moment
            self._seen[kind] = self._gathering.flat(self.engine.held("gradient"))
        if moment != "reduced":
            return
        self._scale = self.engine.scale.value
        last = self.groups.rank == self.groups.world.size - 1
        if self._overflowing is not None and self._step == OVERFLOW and last:
            overflow(self._overflowing)


def overflow(engine: NativeEngine) -> None:
    """Make one element of one gradient of this rank infinite."""
    for parameter in engine.parameters:
        if parameter.gradient is not None and parameter.gradient.numel():
            parameter.gradient.view(-1)[0] = math.inf
            return
    raise ValueError("this rank holds no gradient")
