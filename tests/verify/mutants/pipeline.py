"""Faults of pipeline parallelism and tied weights."""

from typing import Any

import torch
from torch import Tensor

from disttrain.engines.native import NativeEngine
from disttrain.models import GPT
from disttrain.parallel import gradients, parallelize, pipeline
from tests.verify.mutants.mutant import Mutant, after, needs, replace


def tied_not_summed() -> None:
    gradients.sum_tied = lambda parameters, tied, groups: None


def tied_summed_twice() -> None:
    def again(nothing: None, parameters: Any, tied: Any, groups: Any) -> None:
        both = [p.gradient for p in parameters if p.shard.name in tied or p.shard.name in tied.values()]
        gradients.sum_over(groups.tie, [gradient for gradient in both if gradient is not None])

    after(gradients, "sum_tied", again)


def tied_updated_on_one_side() -> None:
    def make(update: Any) -> Any:
        def changed(self: NativeEngine, step: int, rate: float) -> None:
            kept = {p: p.master.detach().clone() for p in self.parameters if p.shard.tied_to}
            update(self, step, rate)
            with torch.no_grad():
                for p, old in kept.items():
                    p.master.copy_(old)

        return changed

    replace(NativeEngine, "_update", make)


def stages_exchanged() -> None:
    def swapped(layers: list[range], *args: Any) -> list[range]:
        return [layers[1], layers[0], *layers[2:]]

    after(parallelize, "layers_of_stages", swapped)


def layer_left_out() -> None:
    def make(forward: Any) -> Any:
        def changed(self: GPT, *args: Any, **kwargs: Any) -> Any:
            if self.head is None:  # the last block of every stage but the last is not called
                blocks = self.blocks
                self.blocks = torch.nn.ModuleDict(list(blocks.items())[:-1])
                try:
                    return forward(self, *args, **kwargs)
                finally:
                    self.blocks = blocks
            return forward(self, *args, **kwargs)

        return changed

    replace(GPT, "forward", make)


def targets_of_another() -> None:
    def make(step: Any) -> Any:
        def changed(self: pipeline.Pipeline, run: Any) -> None:
            count = len(self._targets)

            def shifted(model: Any, number: int, x: Tensor | None) -> Tensor:
                return run(model, (number + 1) % count if model.head is not None else number, x)

            step(self, shifted)

        return changed

    replace(pipeline.Pipeline, "step", make)


def scaled_by_the_schedule() -> None:
    def divided(nothing: None, self: pipeline.Pipeline, run: Any) -> None:
        for stage in self._stages:
            stage.scale_grads(len(self._targets))

    after(pipeline.Pipeline, "step", divided)


def stages_not_summed_over_data() -> None:
    def make(complete: Any) -> Any:
        return lambda parameters, groups, tied, reduced, *more: complete(parameters, groups, tied, True)

    replace(gradients, "complete", make)


def stale_rate_on_one_stage() -> None:
    def make(update: Any) -> Any:
        def changed(self: NativeEngine, step: int, rate: float) -> None:
            update(self, step, rate if self.groups.pipeline.rank == 0 else 1e-2)

        return changed

    replace(NativeEngine, "_update", make)


def weight_gradients_lost() -> None:
    """What a zero-bubble schedule computes later for the first micro-batch does not reach the sum."""

    def make(backward: Any) -> Any:
        def changed(self: pipeline.Stage, number: int, last_backward: bool = False) -> None:
            before = {p: None if p.grad is None else p.grad.clone() for p in self.model.parameters()}
            backward(self, number, last_backward)
            for p, grad in before.items() if number == 0 else ():
                p.grad = grad

        return changed

    replace(pipeline.Stage, "backward_weight_one_chunk", make)


def loss_twice() -> None:
    """Every pipeline rank adds the last stage's loss."""

    def doubled(total: Tensor, self: NativeEngine, *args: Any) -> Tensor:
        return total * self.groups.pipeline.size

    after(NativeEngine, "_forward_and_backward", doubled)


PIPELINE = [
    Mutant("tied_not_summed", "the tied embedding's gradients of first and last stage are not added",
           "pp2-1f1b.mb4 on 2", tied_not_summed, "gradients", "tied weights", needs("pipeline")),
    Mutant("tied_summed_twice", "the tied embedding's gradient is all-reduced twice", "pp2-1f1b.mb4 on 2",
           tied_summed_twice, "gradients", "tied weights", needs("pipeline")),
    Mutant("tied_updated_on_one_side", "the tied embedding is updated on the first stage only", "pp2-gpipe.mb4 on 2",
           tied_updated_on_one_side, "replicas", "tied weights are updated on one side", needs("pipeline")),
    Mutant("stages_exchanged", "interleaved stages hold each other's layers", "pp2-interleaved_1f1b.mb4 on 2",
           stages_exchanged, "forward", "pipeline: layers run in another order", needs("pipeline")),
    Mutant("layer_left_out", "uneven stages lose a layer at the boundary", "pp2-1f1b.mb4 on 2", layer_left_out,
           "forward", "pipeline: layers run", needs("pipeline")),
    Mutant("targets_of_another", "the last stage meets the targets of another micro-batch", "pp2-1f1b.mb4 on 2",
           targets_of_another, "forward", "input of another micro-batch", needs("pipeline")),
    Mutant("scaled_by_the_schedule", "torch's schedule divides gradients by the micro-batches (scale_grads)",
           "pp2-1f1b.dp2.mb2 on 4", scaled_by_the_schedule, "gradients", "the number of micro-batches",
           needs("pipeline")),
    Mutant("stages_not_summed_over_data", "gradients of pipeline stages are not reduced over data ranks",
           "pp2-1f1b.dp2.mb2 on 4", stages_not_summed_over_data, "gradients", "not summed over the data",
           needs("pipeline", "data")),
    Mutant("stale_rate_on_one_stage", "the learning rate is scheduled on the first stage only", "pp2-1f1b.mb4 on 2",
           stale_rate_on_one_stage, "weights", "learning rate", needs("pipeline")),
    Mutant("weight_gradients_lost", "ZBV trains wrongly without an error (torch 2.13 with resharding)",
           "pp2-zbv.mb4 on 2", weight_gradients_lost, "gradients", "pipeline: a stage's gradients",
           needs("pipeline", "micro_batch")),
    Mutant("loss_twice", "the reported loss is PP times too large", "pp2-1f1b.mb4 on 2", loss_twice, "forward",
           "2 times too large", needs("pipeline")),
]  # fmt: skip
