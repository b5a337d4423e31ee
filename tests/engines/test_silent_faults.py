"""What DeepSpeed and Horovod do wrongly without a word: `verify` sees each, once our way around it is taken away."""

from collections.abc import Callable, Iterator
from dataclasses import replace as changed
from typing import Any

import pytest

from disttrain.engines import deepspeed, horovod, objective
from disttrain.verify.layouts import parse
from disttrain.verify.proof import Proof
from tests.components import need
from tests.verify.mutants.mutant import after
from tests.verify.small import proof_for


def default_clipping() -> None:
    """DeepSpeed clips at 1.0 where nothing is said."""

    def silent(settings: dict, *_: Any) -> dict:
        del settings["gradient_clipping"]
        return settings

    after(deepspeed, "translate", silent)


def mean_of_means() -> None:
    """DeepSpeed averages what it is given over micro-batches and ranks, however many targets each has."""

    def backward(self: Any, batch: dict, counts: dict, last: bool) -> Any:
        self.engine.set_gradient_accumulation_boundary(last)
        losses = self.engine(batch, self.config.train.label_smoothing)
        mean, sums = objective.descended(losses, {name: loss.count for name, loss in losses.items()})
        self.engine.backward(mean)
        return sums

    deepspeed.DeepSpeedEngine._backward = backward


def not_divided() -> None:
    """Horovod's average of sums that were already divided by the whole step's count."""

    def average(nothing: None, self: Any, *_: Any) -> None:
        self._averaged = True

    after(horovod.Summed, "__init__", average)
    horovod.as_own_means = lambda *_: None


def broadcast_state() -> None:
    """broadcast_optimizer_state steps on zero gradients to have a state to send."""

    def broadcast(optimizer: Any, self: Any, *_: Any) -> Any:
        self._hvd.broadcast_optimizer_state(optimizer, root_rank=0)
        return optimizer

    after(horovod.Summed, "attach", broadcast)


FAULTS = [
    # engine, precision, layout, fault, phase in which verify must see it first
    ("deepspeed", "fp32", "dp2.mb4.deepspeed on 2", default_clipping, "weights"),
    ("deepspeed", "fp32", "dp2.zero2.mb2.deepspeed on 2", mean_of_means, "gradients"),
    ("horovod", "fp64", "dp2.mb4.horovod on 2", not_divided, "gradients"),
    ("horovod", "fp64", "dp2.horovod on 2", broadcast_state, "initial_weights"),
]


@pytest.fixture(scope="module")
def proofs() -> Iterator[Callable[[str, Any], Proof]]:
    opened: dict[tuple[str, str], Proof] = {}

    def proof(engine: str, precision: Any) -> Proof:
        need(engine)
        if engine == "deepspeed":
            deepspeed.quiet_deepspeed("cpu")  # ranks are forked, and need not import it again
        if (engine, precision) not in opened:
            made = changed(proof_for("gpt", precision, engine=engine), overflows=engine != "deepspeed")
            opened[engine, precision] = made.__enter__()
        return opened[engine, precision]

    yield proof
    for each in opened.values():
        each.__exit__()


@pytest.mark.parametrize("engine, precision, layout, fault, phase", FAULTS, ids=[fault[3].__name__ for fault in FAULTS])
def test_is_seen(proofs: Callable, engine: str, precision: Any, layout: str, fault: Callable, phase: str) -> None:
    proof = proofs(engine, precision)
    verdict = changed(proof, plant=fault).verify(parse(layout))
    assert not verdict.equal
    assert verdict.failures[0].phase == phase, (verdict.error, verdict.failures[:3])


@pytest.mark.parametrize("engine, precision, layout", [("deepspeed", "fp32", "dp2.zero2.mb2.deepspeed on 2"),
                                                       ("horovod", "fp64", "dp2.mb4.horovod on 2")])  # fmt: skip
def test_without_a_fault_all_is_equal(proofs: Callable, engine: str, precision: Any, layout: str) -> None:
    verdict = proofs(engine, precision).verify(parse(layout))
    assert verdict.equal, (verdict.error, verdict.failures[:3])
