"""From a pattern of differences to the likely class of its cause: one table, read from the top."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from disttrain.verify.batches import GLOBAL_BATCH
from disttrain.verify.compare import Difference
from disttrain.verify.layouts import Layout
from disttrain.verify.plan import HUNG, OVERFLOW, SAVED

AXES = ("tensor", "sequence", "pipeline", "context", "data", "zero", "replicate", "recompute", "micro_batch",
        "offload", "compile", "engine")  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What is known of a failure."""

    failures: Sequence[Difference]
    """Of the first phase that differs, the worst one first."""
    layout: Layout
    """The smallest one that was seen to fail in the same way."""
    axes: tuple[str, ...]
    """What of it cannot be left away."""
    settings: frozenset[str] = frozenset()
    """Settings without which it does not fail: dropout, label_smoothing."""
    tied: frozenset[str] = frozenset()
    """Names of tied parameters and of their sources."""

    @property
    def first(self) -> Difference:
        """The worst one."""
        return self.failures[0]

    @property
    def factor(self) -> float | None:
        """The one factor between ours and the reference in everything that differs; None when there is none."""
        ratios = [d.ratio for d in self.failures]
        found = ratios[0]
        if found is None or any(r is None or abs(r - found) > 1e-6 * abs(found) for r in ratios):
            return None
        return found

    @property
    def vectors_only(self) -> bool:
        """Whether only biases and norms differ."""
        return all(d.name.endswith("bias") or "norm" in d.name for d in self.failures)

    @property
    def tied_only(self) -> bool:
        """Whether only tied weights differ."""
        return bool(self.tied) and all(d.name in self.tied for d in self.failures)

    def needs(self, *axes: str) -> bool:
        """Whether it takes all these."""
        return set(axes) <= set(self.axes)

    def only_needs(self, *axes: str) -> bool:
        """Whether it takes nothing but these."""
        return bool(self.axes) and set(self.axes) <= set(axes)

    @property
    def size_factor(self) -> str:
        """How the factor follows from an axis: 'twice, once for each rank of data'; empty when it does not."""
        factor, sizes = self.factor, axis_sizes(self.layout)
        if factor is None or factor <= 0:
            return ""
        for size in sorted({*sizes.values(), 2}):
            numbers = " or ".join(what for what, n in sizes.items() if n == size)
            which = f", the number of {numbers}" if numbers else ""
            if math.isclose(factor, size, rel_tol=1e-6):
                return f"{size} times too large{which}"
            if math.isclose(factor, 1 / size, rel_tol=1e-6):
                return f"1/{size} of what it should be{which}"
        return ""


def axes_of(layout: Layout) -> list[str]:
    """What a layout does beyond one process and one micro-batch."""
    there = {
        "tensor": layout.tensor > 1, "sequence": layout.sequence, "pipeline": layout.pipeline > 1,
        "context": layout.context > 1, "data": layout.data > 1, "zero": layout.zero > 0,
        "replicate": layout.replicate > 1, "recompute": layout.recompute != "none",
        "micro_batch": layout.micro_batch is not None, "offload": layout.offload, "compile": layout.compile,
        "engine": layout.engine != "native",
    }  # fmt: skip
    return [axis for axis in AXES if there[axis]]


def axis_sizes(layout: Layout) -> dict[str, int]:
    """What a layout has several of, and how many."""
    sizes = {
        "tensor ranks": layout.tensor, "pipeline ranks": layout.pipeline, "context ranks": layout.context,
        "data ranks": layout.data, "replicas": layout.replicate,
        "micro-batches": GLOBAL_BATCH // (layout.data * layout.micro_batch) if layout.micro_batch else 1,
    }  # fmt: skip
    return {what: size for what, size in sizes.items() if size > 1}


def _off_by_log(f: Facts) -> bool:
    tensor = f.layout.tensor
    return tensor > 1 and math.isclose(abs(f.first.ours - f.first.expected), math.log(tensor), rel_tol=0.05)


def _smaller(f: Facts) -> bool:
    return abs(f.first.ours) < abs(f.first.expected)


def _part(*parts: str) -> Callable[[Facts], bool]:
    return lambda f: f.first.part in parts


def _as_loaded(f: Facts) -> bool:
    return f.first.part == "weights" and f.first.step == SAVED


def _always(f: Facts) -> bool:
    return True


TABLE: tuple[tuple[str, Callable[[Facts], bool], str], ...] = (
    ("run", lambda f: f.first.name == HUNG, "ranks wait for each other: one of them makes another number or order of "
     "collectives, or of pipeline messages"),
    ("run", _always, "a rank fails outright; its message says why"),
    ("initial_weights", lambda f: f.needs("pipeline"), "a stage fills its layers with the values of other ones"),
    ("initial_weights", _always, "initial values depend on the layout; they must be drawn for each whole parameter by "
     "its full name and cut afterwards"),
    ("counts", lambda f: bool(f.size_factor), "counts are added over ranks that hold the same tokens, or not added "
     "over all that hold different ones"),
    ("counts", _always, "the batch is not divided as it should be: some tokens are met twice, or by no rank"),
    ("forward", lambda f: "label_smoothing" in f.settings, "label smoothing spreads over the local shard of the "
     "vocabulary, or is not summed over the shards"),
    ("forward", lambda f: "dropout" in f.settings, "dropout masks depend on the rank or on how the batch is cut: "
     "masks must differ where tensors differ and agree where they are copies"),
    ("forward", _off_by_log, "the loss is off by the logarithm of the number of tensor ranks: the normaliser of "
     "the cross-entropy counts copies of the vocabulary, or one shard only"),
    ("forward", lambda f: bool(f.size_factor), "the loss is added over ranks that hold copies of it, or not added "
     "over all that hold parts"),
    ("forward", lambda f: f.needs("tensor"), "tensor parallelism: a sum over shards is missing or doubled in the "
     "forward pass (row-parallel product, its bias, embedding or cross-entropy)"),
    ("forward", lambda f: f.needs("context"), "context parallelism: attention misses keys, sees future ones, or "
     "positions do not follow the tokens"),
    ("forward", lambda f: f.needs("pipeline"), "pipeline: layers run in another order, twice or not at all, or on the "
     "input of another micro-batch"),
    ("forward", lambda f: f.only_needs("micro_batch"), "accumulation: losses are combined as a mean of means, a "
     "micro-batch is lost, or the model looks from one sequence to another or draws random numbers of its own"),
    ("forward", _always, "ranks do not see their share of the batch, losses are combined as a mean of means, or the "
     "model looks from one sequence to another or draws random numbers of its own"),
    ("gradients", lambda f: f.tied_only, "tied weights: the gradients of their two uses are not summed exactly once"),
    ("gradients", lambda f: f.needs("sequence") and (f.vectors_only or not f.size_factor),
     "sequence parallelism: each rank holds the gradient of its part of the sequence for parameters that are not cut; "
     "they must be summed over the tensor ranks exactly once"),
    ("gradients", lambda f: "dropout" in f.settings and f.needs("recompute"), "recomputation draws other dropout "
     "masks than the forward pass"),
    ("gradients", lambda f: "label_smoothing" in f.settings, "the backward pass of the smoothed cross-entropy does not "
     "fit its forward pass"),
    ("gradients", lambda f: bool(f.size_factor), "gradients are summed over an axis too often, or averaged where they "
     "must be summed, or the loss is divided by a wrong count"),
    ("gradients", lambda f: f.needs("zero") and f.vectors_only, "parameters that stay whole under ZeRO (norms) are not "
     "summed over the data ranks exactly once"),
    ("gradients", lambda f: f.only_needs("micro_batch"), "accumulation: each micro-batch is divided by its own count "
     "(mean of means), or the gradients of one replace those of another"),
    ("gradients", lambda f: f.only_needs("data", "micro_batch", "zero", "replicate", "offload"), "data parallelism: "
     "gradients are not summed over all data ranks, or each rank divides by its own count (mean of means)"),
    ("gradients", lambda f: f.needs("context"), "context parallelism: gradients are not summed over the context "
     "ranks, or the backward pass of attention loses a block"),
    ("gradients", lambda f: f.needs("tensor"), "tensor parallelism: the all-reduce of the backward pass at the entry "
     "of a column-parallel layer is missing or doubled"),
    ("gradients", lambda f: f.needs("pipeline", "data"),
     "gradients of pipeline stages are not summed over the data "
     "ranks, or before they are complete"),
    ("gradients", lambda f: f.needs("pipeline"), "pipeline: a stage's gradients of some micro-batches are lost or "
     "counted twice"),
    ("gradients", lambda f: f.needs("recompute"), "recomputation does not repeat the forward pass"),
    ("gradients", _always, "the backward pass of this layout loses or repeats a contribution"),
    ("grad_norm", _smaller, "the norm is that of a part of the parameters only: the squares of all shards and stages "
     "must be added"),
    ("grad_norm", _always, "copies of a parameter count more than once in the norm, or it is taken before unscaling"),
    ("skip", lambda f: f.first.name == "skipped", "ranks decide alone whether a gradient overflowed: the decision must "
     "be reduced over the whole mesh"),
    ("skip", _always, "the loss scale does not follow its rule on every rank"),
    ("clip", _always, "gradients are clipped by another norm than the global one, or not unscaled by the same factor"),
    ("weights", lambda f: f.first.step == OVERFLOW, "a skipped step changed weights"),
    ("weights", lambda f: f.first.step == OVERFLOW + 1, "a skipped step changed the optimizer's state, "
     "or evaluation or saving did"),
    ("weights", lambda f: f.tied_only, "tied weights are updated on one side only, or twice"),
    ("weights", lambda f: f.needs("zero"), "the sharded optimizer updates stale or misplaced shards, or updated shards "
     "are not gathered"),
    ("weights", _always, "right gradients, wrong update: learning rate, weight decay groups or optimizer state differ"),
    ("replicas", lambda f: f.tied_only, "tied weights are updated on one side only"),
    ("replicas", lambda f: f.first.step == OVERFLOW, "only some ranks skipped the step that overflowed"),
    ("replicas", lambda f: f.first.step == 0, "ranks start from different weights"),
    ("replicas", _always, "ranks that hold the same parameter updated it differently: its gradient is not reduced on "
     "all of them, or masks differ between them"),
    ("evaluation", lambda f: "dropout" in f.settings, "evaluation runs in training mode"),
    ("evaluation", lambda f: "label_smoothing" in f.settings, "label smoothing is used in evaluation"),
    ("evaluation", _always, "sums of evaluation are not added over the ranks that hold different sequences, once"),
    ("checkpoint", lambda f: f.needs("pipeline"), "a stage writes its layers under other numbers, or not all of "
     "them"),
    ("checkpoint", _always, "what is written is not the whole state: shards are misplaced, stale or missing"),
    ("resume", _as_loaded, "weights are not restored, or by wrong places"),
    ("resume", _part("skip"), "the state of the loss scaler is lost on resume"),
    ("resume", _part("weights", "replicas"), "the optimizer's state is not restored: moments, step count, or shards of "
     "them"),
    ("resume", _always, "a resumed run does not go on as the uninterrupted one"),
    ("reshard", _as_loaded, "a checkpoint of another layout is loaded into wrong places: layers in "
     "another order, or shards exchanged"),
    ("reshard", _part("skip"), "the state of the loss scaler is not taken over from another layout"),
    ("reshard", _always, "the optimizer's state is not taken over from a checkpoint of another layout"),
)  # fmt: skip
"""(phase, pattern, cause); the first row that fits is taken."""


def likely_cause(facts: Facts) -> str:
    """One sentence: the class of faults that shows like this."""
    for phase, fits, text in TABLE:
        if phase == facts.first.phase and fits(facts):
            size = facts.size_factor if phase in ("counts", "forward", "gradients", "grad_norm") else ""
            return f"{text} ({size})" if size else text
    raise ValueError(f"no cause is listed for the phase {facts.first.phase}")
