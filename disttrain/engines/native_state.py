"""What the native engine has in checkpoints: weights, moments, residuals and outer steps, by parameter name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from disttrain.config.schema import Config
from disttrain.engines import Saved, State
from disttrain.grad_compression.compressor import Compressor
from disttrain.optim import OneBitAdamW, OneBitLamb, begin
from disttrain.parallel import compression_state, sharding
from disttrain.parallel.collectives import GroupLink
from disttrain.parallel.groups import Group, Groups
from disttrain.parallel.outer import OuterSteps
from disttrain.parallel.sharding import LocalParameter


@dataclass(frozen=True)
class NativeState:
    """Where an engine's tensors are. All ranks call each method together."""

    parameters: list[LocalParameter]
    optimizer: torch.optim.Optimizer
    compressor: Compressor | None
    link: Group
    """The ranks between which gradients, or changes, are coded, if they are."""
    outer: OuterSteps | None
    tied: Mapping[str, str]
    groups: Groups
    device_type: str
    late: dict[str, Tensor] = field(default_factory=dict)
    """What an earlier run's codec had left behind and no step has used yet, where nothing is coded any more."""

    def kept(self) -> dict[str, list[Tensor]]:
        """What is held in memory, by kind; tensors that share memory may come twice."""
        weights = [sharding.local(p.parameter) for p in self.parameters] + [p.master for p in self.parameters]
        moments = [x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        if self.outer is not None:
            moments += [*self.outer.weight.values(), *self.outer.momentum.values()]
        if self.compressor is not None:
            moments += [*self.compressor.residual.values(), *self.compressor.factor.values()]
        gradients = [p.parameter.grad for p in self.parameters] + [p.gradient for p in self.parameters]
        present = [sharding.local(gradient) for gradient in gradients if gradient is not None]
        return {"weights": weights, "optimizer": moments, "gradients": present}

    def tensors(self) -> State:
        """For a checkpoint: each tensor knows its place in the whole."""
        mesh = sharding.state_mesh(self.groups, self.device_type)
        model: dict[str, Tensor] = {}
        moments: dict[str, dict[str, Tensor]] = {}
        begin(self.optimizer)
        for p in self.parameters:
            name = p.shard.tied_to or p.shard.name
            if p.master.numel() == 0:
                continue  # nothing of it is here
            weight = p.master.detach() if self.outer is None else self.outer.weight[p.shard.name]
            model[name] = sharding.as_whole(p.shard, weight, mesh)
            moments[name] = {
                key: sharding.placed(p.shard, key, value, mesh) for key, value in self.optimizer.state[p.master].items()
            }
        found: State = {"model": model, "optimizer": moments}
        if self.outer is not None:
            found["outer"] = self.outer.saved_state(mesh)  # waits for residuals on its thread, too
        if self.compressor is not None:
            found["compression"] = compression_state.saved_state(self.parameters, self.compressor, self.groups, mesh)
        elif self.late:
            found["compression"] = compression_state.saved_late(self.late, self.parameters, mesh)
        return found

    def to_fill(self, saved: Saved) -> State:
        """Room for what `tensors` gives, and for what only the checkpoint has."""
        state, there = self.tensors(), saved()
        mesh = sharding.state_mesh(self.groups, self.device_type)
        if self.outer is not None:
            state["outer"] = self.outer.to_fill(there, mesh)
        if isinstance(self.optimizer, OneBitAdamW | OneBitLamb):
            compression_state.add_frozen(state["optimizer"], there, self.parameters, self.optimizer.MORE, mesh)
        changes = any(name.startswith("outer.") for name in there)  # what was coded, and not gradients
        if changes == (self.outer is not None):
            state["compression"] = compression_state.to_fill(
                there, self.parameters, self.compressor, self.link, self.tied, self.groups, mesh
            )
        else:
            state.pop("compression", None)
        return state

    def take(self, state: State, outer_arrives: Sequence[int]) -> dict[str, Tensor]:
        """Go on from what `to_fill` gave, filled; what is to be `late` from now on."""
        with torch.no_grad():
            for p in self.parameters:
                name = p.shard.tied_to or p.shard.name
                if p.master.numel() == 0:
                    continue
                p.master.copy_(sharding.local(state["model"][name]))
                saved = {key: sharding.local(value).clone() for key, value in state["optimizer"][name].items()}
                self.optimizer.state[p.master] = saved
        if self.outer is not None:
            self.outer.take(state.get("outer", {}), outer_arrives)
        found = state.get("compression", {})
        if self.compressor is not None:
            compression_state.take(found, self.parameters, self.compressor, self.link, self.tied, self.groups)
        elif self.outer is None:
            return compression_state.take_late(found, self.parameters, self.link, self.tied, self.groups)
        return {}


def make_compressor(config: Config, group: Group) -> Compressor | None:
    """What sums gradients, or changes, in a group; None where they stay whole, or where there is nobody to send them to."""
    if config.compression.codec == "none" or group.size == 1:
        return None
    return Compressor(config.compression, GroupLink(group), config.run.seed)
