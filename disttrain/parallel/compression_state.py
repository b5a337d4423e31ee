"""What coded gradients have left behind, in checkpoints: for any number of ranks and any layout.

A residual is saved for each rank of a link, as a part of the whole parameter. Only their sum matters, so rank r of R takes
over those of ranks r, r + R, r + 2 R, ... of whoever saved them: all of theirs when there were as many.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from disttrain.grad_compression.compressor import Compressor
from disttrain.parallel.collectives import gather_objects, reduce_over
from disttrain.parallel.groups import Group, Groups
from disttrain.parallel.sharding import LocalParameter, Shard, as_whole, local

State = dict[str, Tensor]
Saved = Mapping[str, Sequence[int]]
"""Names and shapes of the tensors of a checkpoint."""
_PREFIX = "compression."


def saved_state(parameters: list[LocalParameter], compressor: Compressor, groups: Groups, mesh: DeviceMesh) -> State:
    """Residuals and factors of this rank."""
    state: State = {}
    for p in parameters:
        name, shard = p.shard.name, p.shard.in_link(groups)
        if (residual := compressor.residual.get(name)) is not None and residual.numel():
            state[f"residual.{compressor.link.rank}.{name}"] = as_whole(shard, residual, mesh)
        if (factor := compressor.factor.get(name)) is not None:
            state[_factor(shard)] = factor
    return state


def to_fill(
    saved: Saved, parameters: list[LocalParameter], compressor: Compressor | None, link: Group, tied: Mapping[str, str],
    groups: Groups, mesh: DeviceMesh,
) -> State:  # fmt: skip
    """Tensors for what this rank of a link takes from a checkpoint, to be filled."""
    state: State = {}
    gone, residuals = _gone(tied, groups), _residuals_of(saved)
    for p in parameters:
        shard = p.shard.in_link(groups)
        empty = torch.zeros(shard.local_shape, dtype=p.master.dtype, device=p.master.device)
        if empty.numel():
            for key in _terms(residuals, p.shard, link, gone):
                state[key] = as_whole(shard, empty.clone(), mesh)
        key = _factor(shard)
        if compressor is not None and compressor.low_rank is not None and empty.ndim > 1:
            shape = empty.shape[1:].numel(), min(compressor.low_rank.rank, *empty.shape)
            if tuple(saved.get(_PREFIX + key, ())) == shape:
                state[key] = empty.new_zeros(shape)
    return state


def take(
    state: State, parameters: list[LocalParameter], compressor: Compressor, link: Group, tied: Mapping[str, str],
    groups: Groups,
) -> None:  # fmt: skip
    """Go on from what `to_fill` had filled."""
    compressor.residual = _residuals(state, parameters, link, tied, groups)
    compressor.factor = {}
    for p in parameters:
        if (factor := state.get(_factor(p.shard.in_link(groups)))) is not None:
            compressor.factor[p.shard.name] = factor


def take_late(
    state: State, parameters: list[LocalParameter], link: Group, tied: Mapping[str, str], groups: Groups
) -> State:
    """What `to_fill` had filled, summed over the link, this rank's part of each parameter: for an engine that sums
    gradients whole from now on. All ranks call it together."""
    own = _residuals(state, parameters, link, tied, groups)
    held = set().union(*gather_objects(sorted(own)))
    late: State = {}
    for p in parameters:
        if p.shard.name not in held:
            continue
        shape = p.shard.in_link(groups).local_shape
        total = own.get(p.shard.name, torch.zeros(shape, dtype=p.master.dtype, device=p.master.device))
        whole = reduce_over(link, total.contiguous())
        starts = [s.start for s in p.shard.in_link(groups).slices]
        here = tuple(slice(s.start - start, s.stop - start) for s, start in zip(p.shard.slices, starts, strict=True))
        late[p.shard.name] = whole[here].clone()
    return late


def saved_late(late: State, parameters: list[LocalParameter], mesh: DeviceMesh) -> State:
    """The same for a checkpoint that is written before a step has used it: one rank's residuals."""
    return {
        f"residual.0.{p.shard.name}": as_whole(p.shard, late[p.shard.name], mesh)
        for p in parameters
        if p.shard.name in late and p.master.numel()
    }


def _residuals(
    state: State, parameters: list[LocalParameter], link: Group, tied: Mapping[str, str], groups: Groups
) -> State:
    """By parameter, what this rank of the link takes over."""
    found: State = {}
    gone, residuals = _gone(tied, groups), _residuals_of(_PREFIX + key for key in state)
    for p in parameters:
        for key in _terms(residuals, p.shard, link, gone):
            term, name = local(state[key]), p.shard.name
            found[name] = found[name] + term if name in found else term
    return found


def add_frozen(
    moments: dict[str, State], saved: Saved, parameters: list[LocalParameter], keys: Sequence[str], mesh: DeviceMesh
) -> None:
    """Of what 1-bit optimizers keep beside AdamW's state under these keys, room for exactly what a checkpoint has."""
    for p in parameters:
        name = p.shard.tied_to or p.shard.name
        for key in keys if name in moments else ():
            moments[name].pop(key, None)
            shape = saved.get(f"optimizer.{name}.{key}")
            if shape is None:
                continue
            empty = torch.zeros_like(p.master) if shape else p.master.detach().new_zeros(())
            empty = empty.float() if key == "frozen_step" else empty
            moments[name][key] = as_whole(p.shard, empty, mesh) if shape else empty


def _gone(tied: Mapping[str, str], groups: Groups) -> Mapping[str, str]:
    """Tied copies that are parameters of their own on other layouts: those of a pipeline's last stage."""
    return tied if groups.pipeline.size == 1 else {}


def _residuals_of(saved: Iterable[str]) -> list[tuple[int, str]]:
    """Rank and parameter of every residual among the names of a checkpoint, in the order of their names."""
    start = _PREFIX + "residual."
    parts = (name.removeprefix(start).partition(".") for name in sorted(saved) if name.startswith(start))
    return [(int(rank), parameter) for rank, _, parameter in parts if rank.isdecimal()]


def _terms(residuals: list[tuple[int, str]], shard: Shard, link: Group, gone: Mapping[str, str]) -> Iterator[str]:
    """Names of the residuals that belong to a parameter of this rank, those of tied copies that are gone too."""
    if not residuals:
        return
    names = {shard.name, *(copy for copy, source in gone.items() if source == shard.name)}
    for rank, parameter in residuals:
        if parameter in names and rank % link.size == link.rank:
            yield f"residual.{rank}.{parameter}"


def _factor(shard: Shard) -> str:
    """A factor belongs to one part of a parameter: another layout starts anew."""
    return f"factor.{shard.name}.{'x'.join(f'{s.start}-{s.stop}' for s in shard.slices)}"
