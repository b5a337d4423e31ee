"""Local steps: workers update weights of their own and meet now and then (local SGD, DiLoCo, Adasum; decision 0008)."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from disttrain.config.schema import OuterConfig
from disttrain.grad_compression.adasum import adasum
from disttrain.grad_compression.compressor import Compressor
from disttrain.parallel.collectives import GroupLink, reduce_over
from disttrain.parallel.gradients import sum_over
from disttrain.parallel.groups import Group, Groups
from disttrain.parallel.sharding import LocalParameter, as_whole, local, placed
from disttrain.parallel.thread import one_thread

State = dict[str, Tensor]
Saved = Mapping[str, Sequence[int]]
"""Names and shapes of the tensors of a checkpoint."""
Moments = Mapping[Tensor, dict[str, Tensor]]
"""An optimizer's state by parameter."""
_PREFIX = "outer."


@dataclass
class Fragment:
    """Parameters that meet together."""

    parameters: list[LocalParameter]
    offset: int
    """They meet after steps that leave this rest by `every`."""
    arriving: Future[list[Tensor]] | None = None
    """Changes of all workers together, on their way or here."""
    arrives: int = 0
    """The step after which they count."""


class OuterSteps:
    """The weights that the workers share, and their way to each other. All ranks call each method together."""

    def __init__(
        self, config: OuterConfig, parameters: list[LocalParameter], groups: Groups, link: Group,
        compressor: Compressor | None, moments: Moments,
    ):  # fmt: skip
        """`link`: the ranks that hold the same part of the model, one for each worker, for changes only; `compressor` codes
        on it. `moments` is the optimizer's state."""
        self._config, self._parameters, self._groups = config, parameters, groups
        self.link, self._compressor, self._moments_of = link, compressor, moments
        self.weight = {p.shard.name: p.master.detach().clone() for p in parameters}
        """The outer weights."""
        nesterov = config.method == "nesterov"
        self.momentum = {name: torch.zeros_like(weight) for name, weight in self.weight.items() if nesterov}
        """Of the outer optimizer."""
        self._fragments = fragments(parameters, config)
        self._thread = one_thread("outer") if config.overlap else None

    @torch.no_grad()
    def after(self, step: int, last: bool) -> None:
        """What there is to do after the workers' own step number `step`; they all meet after the run's last one."""
        for fragment in self._fragments:
            if fragment.arriving is not None and (last or fragment.arrives <= step):
                self._arrive(fragment, late=not last)
        for fragment in self._fragments:
            if last or step % self._config.every == fragment.offset:
                self._depart(fragment, step)
                if last or not self._config.overlap:
                    self._arrive(fragment, late=False)

    def _depart(self, fragment: Fragment, step: int) -> None:
        names = [p.shard.name for p in fragment.parameters]
        changes = [self.weight[p.shard.name] - p.master for p in fragment.parameters]
        fragment.arrives = step + self._config.overlap
        if self._thread is None:
            fragment.arriving = arrived(self._together(names, changes, step))
        else:
            fragment.arriving = self._thread.submit(self._together, names, changes, step)

    @torch.no_grad()
    def _together(self, names: list[str], changes: list[Tensor], step: int) -> list[Tensor]:
        """The mean of all workers' changes, or Adasum's of them; in their memory."""
        if self.link.size == 1 or not changes:
            return changes
        if self._config.method == "adasum":
            combined = adasum([x.view(-1) for x in changes], GroupLink(self.link), self._total)
            return [x.view_as(change) for x, change in zip(combined, changes, strict=True)]
        if self._compressor is None:
            sum_over(self.link, changes)
        else:
            self._compressor.begin(step, 1.0, may_skip=False)
            self._compressor.sum_(list(zip(names, changes, strict=True)))
            self._compressor.keep()
        torch._foreach_div_(changes, self.link.size)
        return changes

    def _total(self, products: Tensor) -> Tensor:
        """Over all ranks with chunks of the parameters. Where tensor ranks hold copies every product counts as often."""
        return reduce_over(self._groups.tensor, reduce_over(self.link, products))

    def _arrive(self, fragment: Fragment, late: bool) -> None:
        """Step on the outer weights and take them over; `late` ones are mixed with the worker's own."""
        assert fragment.arriving is not None
        kept = self._config.mixing if late else 0.0
        for p, change in zip(fragment.parameters, fragment.arriving.result(), strict=True):
            weight = self.weight[p.shard.name]
            if self._config.method == "nesterov":  # torch.optim.SGD's
                momentum = self.momentum[p.shard.name]
                momentum.mul_(self._config.momentum).add_(change)
                weight.sub_(change.add(momentum, alpha=self._config.momentum), alpha=self._config.lr)
            else:
                weight.sub_(change)
            p.master.lerp_(weight, 1.0 - kept) if kept else p.master.copy_(weight)
        fragment.arriving = None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model computes with the outer weights."""
        own = [p.master.detach().clone() for p in self._parameters]
        with torch.no_grad():
            for p in self._parameters:
                p.master.copy_(self.weight[p.shard.name])
            yield
            for p, weight in zip(self._parameters, own, strict=True):
                p.master.copy_(weight)

    def saved_state(self, mesh: DeviceMesh) -> State:
        """Outer momentum, changes on their way, and this worker's own weights and moments: copies, since some worker's are
        the checkpoint's moments too, and no file holds a tensor's memory twice."""
        state: State = {}
        pending = {}
        for fragment in self._fragments:
            if fragment.arriving is not None:
                pending |= dict(
                    zip([p.shard.name for p in fragment.parameters], fragment.arriving.result(), strict=True)
                )
        for p in self._parameters:
            if p.master.numel() == 0:
                continue
            name = p.shard.tied_to or p.shard.name
            common = {"momentum": self.momentum.get(p.shard.name), "pending": pending.get(p.shard.name)}
            state |= {f"{key}.{name}": as_whole(p.shard, x, mesh) for key, x in common.items() if x is not None}
            own = {"weight": p.master.detach(), **{key: x.clone() for key, x in self._moments(p).items()}}
            state |= {f"worker.{self.link.rank}.{key}.{name}": placed(p.shard, key, x, mesh) for key, x in own.items()}
        return state

    @property
    def arrives(self) -> list[int]:
        """For each fragment the step after which its changes count; 0 where none are on their way."""
        return [0 if fragment.arriving is None else fragment.arrives for fragment in self._fragments]

    def _moments(self, p: LocalParameter) -> State:
        return {key: x for key, x in self._moments_of.get(p.master, {}).items() if x.ndim > 0}

    def to_fill(self, saved: Saved, mesh: DeviceMesh) -> State:
        """Tensors for what this rank takes from a checkpoint, to be filled."""
        state: State = {}
        workers: dict[tuple[str, str], list[str]] = {}  # what there is of every worker
        for key in (key.removeprefix(_PREFIX) for key in saved if key.startswith(_PREFIX)):
            if (own := _own(key)) is not None:
                workers.setdefault(own, []).append(key)
        for p in self._parameters:
            name = p.shard.tied_to or p.shard.name
            like = {("weight", f"{key}.{name}"): p.master for key in ("momentum", "pending")}
            for kind, x in (("weight", p.master), *self._moments(p).items()):
                like |= {(kind, key): x for key in self._mine(workers.get((kind, name), []))}
            for (kind, key), x in like.items():
                if _PREFIX + key in saved and p.master.numel():
                    state[key] = placed(p.shard, kind, torch.zeros_like(x, requires_grad=False), mesh)
        return state

    def _mine(self, keys: Sequence[str]) -> list[str]:
        """Of the same thing of all workers that were saved, what this one takes: its own, or a share, or some one's."""
        saved = sorted((int(key.split(".")[1]), key) for key in keys)
        mine = [key for rank, key in saved if rank % self.link.size == self.link.rank]
        return mine or [key for _, key in saved[self.link.rank % max(len(saved), 1) :][:1]]

    @torch.no_grad()
    def take(self, state: State, arrives: Sequence[int]) -> None:
        """Go on from what `to_fill` had filled, and `arrives`; the outer weights are the model's now."""
        terms: dict[tuple[str, str], list[Tensor]] = {}
        for key, tensor in state.items():
            if (own := _own(key)) is not None:
                terms.setdefault(own, []).append(local(tensor))
        for p in self._parameters:
            name = p.shard.tied_to or p.shard.name
            self.weight[p.shard.name].copy_(p.master)
            if p.shard.name in self.momentum and (momentum := state.get(f"momentum.{name}")) is not None:
                self.momentum[p.shard.name].copy_(local(momentum))
            for kind, tensor in (("weight", p.master), *self._moments(p).items()):
                if found := terms.get((kind, name)):
                    tensor.copy_(found[0] if len(found) == 1 else torch.stack(found).mean(0))
        for number, fragment in enumerate(self._fragments):
            self._resume(fragment, arrives[number] if number < len(arrives) else 0, state)

    def _resume(self, fragment: Fragment, arrives: int, state: State) -> None:
        """Wait for changes as before; where the fragments are cut otherwise now, they count at once."""
        found = [state.get(f"pending.{p.shard.tied_to or p.shard.name}") for p in fragment.parameters]
        here = [(p, local(change)) for p, change in zip(fragment.parameters, found, strict=True) if change is not None]
        if arrives and not here and not found:  # a stage without a block of this fragment
            fragment.arriving, fragment.arrives = arrived([]), arrives
        if not here:
            return
        waiting = fragment
        if len(here) < len(found):
            waiting = Fragment([p for p, _ in here], 0)
        waiting.arriving, waiting.arrives = arrived([change for _, change in here]), arrives
        if waiting is not fragment:
            self._arrive(waiting, late=True)

    def close(self) -> None:
        """Wait for what is on its way."""
        if self._thread is not None:
            self._thread.shutdown()


def fragments(parameters: Sequence[LocalParameter], config: OuterConfig) -> list[Fragment]:
    """Blocks are dealt out in turn, the second first: embedding, head and what else there is go with the first fragment."""
    count = config.fragments
    found = [Fragment([], number * config.every // count) for number in range(count)]
    for p in parameters:
        parts = p.shard.name.split(".")
        number = (int(parts[1]) + 1) % count if parts[0] == "blocks" else 0
        found[number].parameters.append(p)
    return found


def _own(key: str) -> tuple[str, str] | None:
    """What of which parameter, where it is a worker's own: worker.RANK.KIND.NAME."""
    start, *rest = key.split(".", 3)
    return (rest[1], rest[2]) if start == "worker" else None


def arrived(changes: list[Tensor]) -> Future[list[Tensor]]:
    """What needs no waiting for."""
    future: Future[list[Tensor]] = Future()
    future.set_result(changes)
    return future
