"""Pipeline parallelism: the schedules of torch.distributed.pipelining around models that know nothing of them.

The schedule moves hidden states and their gradients between ranks and says when which chunk works on which micro-batch.
What a chunk computes is a function the engine hands over with every step: (chunk, micro-batch number, hidden states of
the chunk before, None for the first) -> hidden states, or in the last chunk the loss, divided and scaled already, a
scalar. Logits exist nowhere else, micro-batches may differ in anything but the shape of the hidden states, and torch's
own splitting of batches, loss functions and scaling of gradients are not used.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from disttrain.parallel.groups import Group
from disttrain.parallel.stage import Clock, Run, Stage
from disttrain.stages import rank_of_stage

TORCH_NAMES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved_1f1b": "Interleaved1F1B",
    "looped_bfs": "LoopedBFS",
    "interleaved_zero_bubble": "InterleavedZeroBubble",
    "zbv": "ZBVZeroBubble",
    "dualpipev": "DualPipeV",
}
"""What torch calls the schedules of `disttrain.stages.SCHEDULES`."""

Batch = TypeVar("Batch")


def keep_stage(model: Any, layers: range, first: bool, last: bool) -> None:
    """Remove, in place, the blocks outside `layers`, the embedding unless first and the head unless last."""
    for number in list(model.blocks):
        if int(number) not in layers:
            del model.blocks[number]
    if not first:
        model.embed = None
    if not last:
        model.head = None


class Pipeline:
    """One rank's chunks of the model under one schedule, for steps of equally many, equally shaped micro-batches."""

    def __init__(
        self,
        chunks: list[tuple[int, nn.Module]],
        group: Group,
        schedule: str,
        micro_batches: int,
        device: torch.device,
        hidden_shape: tuple[int, ...],
        hidden_dtype: torch.dtype,
        zero: int = 0,
    ):
        """chunks: (stage number, model) of this rank, ascending. hidden_shape and hidden_dtype are those of what one
        chunk hands the next, [B, S, H] as this rank holds it. zero says how chunks that FSDP2 wraps are driven: 1
        reduces gradients with the last micro-batch, 2 and 3 with every one; 3 also frees gathered weights every time.
        """
        self.group, self.schedule = group, schedule
        self.stages = len(chunks) * group.size
        self.dtype, self.device = hidden_dtype, device
        self._clock = Clock(device)
        hidden = torch.empty(hidden_shape, dtype=hidden_dtype, device="meta", requires_grad=True)
        self._stages = [
            Stage(model, number, self.stages, group, device, hidden, zero, self._clock) for number, model in chunks
        ]
        made: Any = get_schedule_class(TORCH_NAMES[schedule])
        single = issubclass(made, PipelineScheduleSingle)
        stages = self._stages[0] if single else self._stages
        self._schedule = made(stages, micro_batches, loss_fn=lambda loss, target: loss, scale_grads=False)
        self._targets = torch.arange(micro_batches)

    def step(self, run: Run) -> None:
        """Forward and backward of every micro-batch; gradients are added to those the parameters hold.

        Plain parameters: nothing is reduced over data ranks. Chunks under FSDP2 end with reduced, sharded gradients.
        """
        for stage in self._stages:
            stage.chunk.run = run
        last = self._stages[-1].is_last
        with self._clock.whole():
            self._schedule.step(target=self._targets if last else None, return_outputs=False)
            for stage in self._stages:
                stage.settle()
        for stage in self._stages:
            stage.chunk.run = None

    @torch.no_grad()
    def evaluate(
        self,
        batches: Iterable[Batch],
        run: Callable[[Any, Batch, Tensor | None], Any],
        hidden_shape: Callable[[Batch], tuple[int, ...]],
    ) -> list[Any]:
        """What `run` gives in the last stage for each batch, in order; an empty list on ranks without that stage.

        All ranks of the pipeline bring the same number of batches, of any shapes; a few are in flight at a time.
        Batch i is in stage s in round i + s. Every rank goes through all transfers in this one order, sending or
        receiving where it takes part, so none can wait for another that waits for it.
        """
        models = {stage.stage_index: stage.model for stage in self._stages}
        relay = _Relay(self.group, self.schedule, self.dtype, self.device)
        held: dict[int, Batch] = {}
        results: list[Any] = []
        source, turn = iter(batches), 0
        while turn == 0 or held:
            held.update(zip([turn], source, strict=False))
            for at in sorted(held, reverse=True):
                number = turn - at
                y = run(models[number], held[at], relay.received(at, number)) if number in models else None
                if number == self.stages - 1:
                    results += [y] if number in models else []
                else:
                    relay.hand_over(at, number, y, hidden_shape(held[at]))
            relay.settle()
            held.pop(turn - self.stages + 1, None)
            turn += 1
        return results

    def bubble(self) -> tuple[float, float]:
        """(seconds in which this rank's chunks computed, seconds of the steps) since the last call.

        On a GPU both are read from events, which waits for the device to finish the last step.
        """
        return self._clock.take()


class _Relay:
    """Hidden states on their way from stage to stage during an evaluation."""

    def __init__(self, group: Group, schedule: str, dtype: torch.dtype, device: torch.device):
        self.group, self.schedule, self.dtype, self.device = group, schedule, dtype, device
        self.arriving: dict[tuple[int, int], tuple[Tensor, dist.Work | None]] = {}
        self.leaving: list[tuple[Tensor, dist.Work]] = []
        self.left: list[tuple[Tensor, dist.Work]] = []

    def hand_over(self, at: int, number: int, y: Tensor | None, shape: tuple[int, ...]) -> None:
        """Start moving batch `at` from stage `number`, where it is y, to the next, if this rank has a part in that."""
        size, pipeline = self.group.size, self.group.process_group
        sender, receiver = (rank_of_stage(self.schedule, n, size) for n in (number, number + 1))
        if y is not None:
            y = y.to(self.dtype).contiguous()
            if sender == receiver:
                self.arriving[at, number + 1] = (y, None)
                return
            self.group.traffic.add(y)
            self.leaving.append((y, _started(dist.isend(y, group=pipeline, group_dst=receiver))))
        elif receiver == self.group.rank:
            x = torch.empty(shape, dtype=self.dtype, device=self.device)
            self.arriving[at, number + 1] = (x, _started(dist.irecv(x, group=pipeline, group_src=sender)))

    def received(self, at: int, number: int) -> Tensor | None:
        """Hidden states of batch `at` for stage `number`, when they are there; None for the first stage."""
        if number == 0:
            return None
        x, work = self.arriving.pop((at, number))
        if work is not None:
            work.wait()
        return x

    def settle(self) -> None:
        """A round is over: wait for the sends of the one before, which lets go of what they sent."""
        for _, work in self.left:
            work.wait()
        self.left, self.leaving = self.leaving, []


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this rank is not in the pipeline's group"
    return work
