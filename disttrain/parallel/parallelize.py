"""The one place that says in which order a model is made parallel. Each step changes the model in place.

The model has no storage until the last step, so that no rank ever holds more than its part and one block.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from disttrain.config.schema import Config, Precision
from disttrain.grad_compression.compressor import Compressor
from disttrain.models import Model, TaskModel, build_model, initial_value, tie_weights
from disttrain.models.rounding import round_in_training
from disttrain.parallel import data
from disttrain.parallel.collectives import reduce_over
from disttrain.parallel.context import apply_context_parallel
from disttrain.parallel.groups import Groups
from disttrain.parallel.pipeline import keep_stage
from disttrain.parallel.recompute import apply_recompute, compile_blocks
from disttrain.parallel.sharding import Cutting, LocalParameter, local_parameters
from disttrain.parallel.tensor import apply_tensor_parallel
from disttrain.precision import master_dtype
from disttrain.stages import layers_of_stages, stage_numbers, virtual_stages


@dataclass(frozen=True)
class Chunk:
    """One pipeline stage on this rank, or the whole model."""

    number: int
    """Number of the stage, from 0."""
    model: Model
    module: nn.Module
    """Called with (batch, label_smoothing) it gives the model's loss sums; reduces gradients where it can by itself."""
    parameters: list[LocalParameter]


def parallelize(
    config: Config, groups: Groups, device: torch.device, precision: Precision, replicated: bool = True,
    compressor: Compressor | None = None, apart: bool = False,
) -> list[Chunk]:  # fmt: skip
    """This rank's stages, filled with their initial weights. All ranks call it together.

    With `replicated` whole gradients are summed over the data ranks by DDP, or ZeRO's by FSDP2, through the `compressor`
    if there is one; otherwise by whoever called. Replicas that are `apart` keep weights of their own.
    """
    parallel, at, ranks = config.parallel, groups.pipeline.rank, groups.pipeline.size
    numbers, layers = [0], [range(config.model.layers)]
    if ranks > 1:
        virtual = virtual_stages(parallel.schedule, parallel.virtual_stages)
        numbers = stage_numbers(parallel.schedule, at, ranks, virtual)
        layers = layers_of_stages(config.model, config.data.sequence_length, ranks * virtual)
    chunks = []
    for number in numbers:
        model = build_model(config.model, config.run.seed, master_dtype(precision), "meta")
        keep_stage(model, layers[number], number == 0, number == len(layers) - 1)
        cut = apply_tensor_parallel(model, groups.tensor, parallel.sequence)
        apply_context_parallel(model, groups.context, parallel.context_method)
        _adapt(model, config, groups)
        names = dict(model.named_parameters())
        tied_to = {name: source for name, source in model.tied.items() if name in names and source not in names}
        cutting = Cutting(cut.shapes, cut.splits, frozenset(cut.partial), tied_to)

        def fill(module: nn.Module, name: str, model: Model = model, cutting: Cutting = cutting) -> None:
            _fill(model, module, name, cutting, config.run.seed, groups, device)

        if parallel.zero:
            data.shard(model, groups, parallel.zero, precision, parallel.offload, fill, compressor, apart)
        else:
            fill(model, "")
        module: nn.Module = data.LossModule(model)
        if replicated and not parallel.zero and groups.pipeline.size == 1:
            module = data.replicate(module, device, groups.data, compressor)
        chunk = Chunk(number, model, module, local_parameters(model, groups, cutting, device))
        if compressor is not None:
            held = {p.shard.name: p.shard.in_link(groups).local_shape for p in chunk.parameters}
            copied = held.keys() - cut.splits.keys() if groups.tensor.size > 1 else set()
            if apart:  # gradients of a weight on two stages are added after the sum; its changes are not
                copied |= {n for pair in model.tied.items() if (pair[0] in names) != (pair[1] in names) for n in pair}
            compressor.cover(held, copied)
        chunks.append(chunk)
    return chunks


def _adapt(model: Model, config: Config, groups: Groups) -> None:
    """What depends on no axis that cuts the model: rounding, sums over data ranks, recomputation, compilation."""
    if config.quantization.aware:
        round_in_training(model)
    if isinstance(model, TaskModel):
        model.over_data = partial(reduce_over, groups.data)
    apply_recompute(model, config.parallel.recompute)
    if config.run.compile:
        compile_blocks(model)


@torch.no_grad()
def _fill(
    model: Model, module: nn.Module, name: str, cutting: Cutting, seed: int, groups: Groups, device: torch.device
) -> None:
    """Give every parameter of a module of the model that has no storage yet its initial values."""
    whole = {path for path, _ in model.named_parameters(remove_duplicate=False)}
    for path, owner in module.named_modules(prefix=name):
        for leaf, parameter in owner.named_parameters(recurse=False):
            if not parameter.is_meta:
                continue
            full = f"{path}.{leaf}" if path else leaf
            if model.tied.get(full) in whole:
                continue  # tied below
            shard = cutting.tensor_shard(full, groups)
            values = initial_value(model.config, full, shard.shape, seed)[shard.slices]
            setattr(owner, leaf, nn.Parameter(values.to(device, parameter.dtype, copy=True).contiguous()))
    tie_weights(model)
