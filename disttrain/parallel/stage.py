"""One pipeline stage as torch.distributed.pipelining's schedules drive it, and the seconds it computes.

Written for torch 2.11 to 2.13: what is overridden has the same meaning in all of them.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _batch_p2p

from disttrain import ranges
from disttrain.parallel.data import sharded_modules
from disttrain.parallel.groups import Group

Run = Callable[[Any, int, Tensor | None], Tensor]
"""(chunk, micro-batch number, x [B, S, H] or None) -> [B, S, H], or the scalar to differentiate."""


UNDER_WAY = 2
"""Messages in one direction that a stage has sent and may not be received yet, where it is one of several on its rank."""


class Clock:
    """Seconds of the steps, and of the chunks' work inside them."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.seconds = [0.0, 0.0]
        self.events: deque[tuple[int, Any, Any]] = deque()

    def busy(self) -> Any:
        """Work of a chunk."""
        return self._span(0)

    def whole(self) -> Any:
        """A step."""
        self._fold(lambda end: end.query())
        return self._span(1)

    @contextmanager
    def _span(self, kind: int) -> Iterator[None]:
        if not self.cuda:
            start = time.perf_counter()
            yield
            self.seconds[kind] += time.perf_counter() - start
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self.events.append((kind, start, end))

    def take(self) -> tuple[float, float]:
        """(busy, whole) since the last call."""
        self._fold(lambda end: end.synchronize() is None)
        taken = (self.seconds[0], self.seconds[1])
        self.seconds = [0.0, 0.0]
        return taken

    def _fold(self, over: Callable[[Any], bool]) -> None:
        """Turn events into seconds, in order, up to the first that is not over."""
        while self.events and over(self.events[0][2]):
            kind, start, end = self.events.popleft()
            self.seconds[kind] += start.elapsed_time(end) / 1000


class _Chunk(nn.Module):
    """What torch's schedule calls: the model through the step's function. It hides FSDP2 from the schedule."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, last: bool):
        super().__init__()
        self.model, self.dtype, self.last = model, dtype, last
        self.run: Run | None = None
        self.micro_batch = 0

    def forward(self, x: Tensor | None = None) -> Tensor:
        """Hidden states [B, S, H] in the dtype that is sent, or the last stage's scalar."""
        assert self.run is not None
        y = self.run(self.model, self.micro_batch, x)
        return y if self.last else y.to(self.dtype).contiguous()


class Stage(PipelineStage):
    """torch's stage, which here also counts bytes and seconds, drives FSDP2 and holds no buffer longer than needed.

    Shapes are given, so torch need not run the model to find them (drawing nothing, sending nothing).
    """

    def __init__(
        self,
        model: nn.Module,
        number: int,
        stages: int,
        group: Group,
        device: torch.device,
        hidden: Tensor,
        zero: int,
        clock: Clock,
    ):
        last = number == stages - 1
        self.model, self.chunk = model, _Chunk(model, hidden.dtype, last)
        self._hidden, self._zero, self._clock, self._traffic = hidden, zero, clock, group.traffic
        self._sharded = sharded_modules(model)
        self._nothing = torch.empty(0, device=device)
        self._alone = stages == group.size  # on its rank
        self._leaving: dict[str, deque[list[dist.Work]]] = {"forward": deque(), "backward": deque()}
        output = torch.empty((), dtype=hidden.dtype, device="meta", requires_grad=True) if last else hidden
        super().__init__(
            self.chunk,
            number,
            stages,
            device,
            input_args=(hidden,) if number else (),
            output_args=(output,),
            group=group.process_group,
        )

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Forward of one micro-batch."""
        self.chunk.micro_batch = fwd_chunk_id
        with self._named("forward", fwd_chunk_id), self._clock.busy():
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """Backward of one micro-batch, or the half of it that gives the gradient of the inputs."""
        with self._named("backward" if full_backward else "backward inputs", bwd_chunk_id), self._clock.busy():
            self._drive(full_backward, last_backward)
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        gradients = self.bwd_cache[bwd_chunk_id]
        self.bwd_cache[bwd_chunk_id] = tuple(g if g is None else g.contiguous() for g in gradients)
        self._let_go(bwd_chunk_id)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """The other half: gradients of the weights."""
        with self._named("backward weights", bwd_chunk_id), self._clock.busy():
            self._drive(self.is_first, last_backward)  # torch gives the first stage a whole backward here
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
            if self._sharded and not self.is_first and (last_backward or self._zero > 1):
                self._reduce()

    def _named(self, kind: str, micro_batch: int) -> Any:
        return ranges.named(kind, "stage", self.stage_index, "micro-batch", micro_batch)

    def _drive(self, whole: bool, last: bool) -> None:
        """Set what FSDP2 does in the coming backward; one for half the gradients needs the weights gathered before."""
        for module in self._sharded:
            module.set_requires_gradient_sync(whole and (last or self._zero > 1), recurse=False)
            module.set_requires_all_reduce(last, recurse=False)  # between replicas
            module.set_reshard_after_backward(whole and (last or self._zero > 2), recurse=False)
            if not whole:
                module.unshard()
        if self._sharded:
            self._sharded[0].set_is_last_backward(last)

    def _reduce(self) -> None:
        """Reduce gradients that were not made by a backward pass FSDP2 has hooks in. Weights are sharded after it."""
        self.submod = self.model
        super().perform_reduce_grad(1)
        self.submod = self.chunk

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Nothing is left to do when the schedule asks for this."""

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """torch 2.11 greets both neighbours before the first step, also a stage on its own rank, which gloo cannot."""
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        """torch makes a buffer for every micro-batch here: they are made when something is received instead."""
        prepared = super()._prepare_forward_infra(*args, **kwargs)
        for micro_batch in self.args_recv_info:
            self._let_go(micro_batch)
        return prepared

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        """The same for gradients."""
        prepared = super()._prepare_backward_infra(*args, **kwargs)
        for micro_batch in self.args_recv_info:
            self._let_go(micro_batch)
        return prepared

    def _let_go(self, micro_batch: int) -> None:
        """Hold what one micro-batch received no longer: 1F1B then keeps P of them, however many there are."""
        for info in self._received(micro_batch):
            info.buffer = self._nothing

    def _received(self, micro_batch: int) -> list[Any]:
        """Where torch keeps hidden states and gradients that came for a micro-batch."""
        hidden = () if self.is_first else self.args_recv_info[micro_batch]
        return [*hidden, *self.grad_recv_info.get(micro_batch, ())]

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Receives of hidden states, into new memory."""
        if not self.is_first:
            for info in self.args_recv_info[fwd_chunk_id]:
                info.buffer = self._new().requires_grad_()
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Receives of gradients, into new memory."""
        for info in self.grad_recv_info.get(bwd_chunk_id, ()):
            info.buffer = self._new()
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def _new(self) -> Tensor:
        return torch.empty(self._hidden.shape, dtype=self._hidden.dtype, device=self.device)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Sends of hidden states, counted."""
        return self._sent("forward", super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Sends of gradients, counted."""
        return self._sent("backward", super().get_bwd_send_ops(bwd_chunk_id))

    def _sent(self, direction: str, ops: list[dist.P2POp]) -> list[dist.P2POp]:
        """Those that torch has yet to start. Schedules of several stages a rank would hold all that a step sends, tensors
        included, until the step ends: theirs are started here, and waited for when `UNDER_WAY` more have been.

        That waits for no rank that waits for this one: torch puts a receive into the list of its rank when it puts the send
        into this one's, so that what comes before it there needs nothing that this rank does later.
        """
        for op in ops:
            self._traffic.add(op.tensor)
        if self._alone or not ops:
            return ops
        self._leaving[direction].append(_batch_p2p(ops))
        self._settle(direction, UNDER_WAY)
        return []

    def settle(self) -> None:
        """The step is over: wait for what it has sent last."""
        for direction in self._leaving:
            self._settle(direction, 0)

    def _settle(self, direction: str, under_way: int) -> None:
        leaving = self._leaving[direction]
        while len(leaving) > under_way:
            for work in leaving.popleft():
                work.wait()
