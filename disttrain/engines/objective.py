"""What every engine does alike: a micro-batch's tensors, the targets of the whole step, the loss to descend, the scores."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from disttrain.config.schema import Config
from disttrain.engines import Batch
from disttrain.models import Model
from disttrain.models.dropout import at_site
from disttrain.models.layers import LossSum
from disttrain.parallel.collectives import reduce_over
from disttrain.parallel.context import split_batch
from disttrain.parallel.groups import Group, Groups


def prepare(batch: Batch, model: Model, config: Config, groups: Groups, device: torch.device) -> dict[str, Tensor]:
    """This rank's part of a micro-batch on its device; what the model derives on the host is added before."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}
    samples = tensors.pop("samples", None)
    if samples is not None and (config.model.dropout or config.model.embedding_dropout):
        tensors["dropout_seeds"] = at_site(samples, config.run.seed)
    tensors = split_batch(tensors, groups.context, zigzag=model.causal)
    tensors = model.prepare_batch(tensors)
    if device.type == "cpu":
        return tensors
    return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}


def count(batches: Sequence[dict[str, Tensor]], model: Model, data: Group) -> tuple[dict[str, Tensor], Tensor]:
    """Targets of each objective and real tokens of the whole step, over all data ranks: known before any backward pass."""
    counted = [model.count_targets(batch) for batch in batches]
    names = list(counted[0])
    rows = [[c[name] for name in names] + [real_tokens(b)] for c, b in zip(counted, batches, strict=True)]
    totals = reduce_over(data, torch.stack([torch.stack(row) for row in rows]).sum(0))
    return {name: totals[i] for i, name in enumerate(names)}, totals[-1]


def real_tokens(batch: dict[str, Tensor]) -> Tensor:
    """Number of tokens that are not padding."""
    mask = batch.get("attention_mask")
    tokens = batch["tokens"]
    return tokens.new_full((), tokens.numel()) if mask is None else mask.sum()


def descended(losses: Mapping[str, LossSum], counts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(scalar whose gradients, **summed** over ranks and micro-batches, are the step's; detached loss sums [objectives]).

    Each sum is divided once, by the count of the whole step.
    """
    means = [loss.sum / counts[name].clamp(min=1) for name, loss in losses.items()]
    return torch.stack(means).sum(), torch.stack([loss.sum.detach() for loss in losses.values()])


def total_scores(
    scores: Iterable[Mapping[str, LossSum]], names: Sequence[str], groups: Groups, device: torch.device
) -> dict[str, LossSum]:
    """Sum scores of this rank's batches over the world; ranks of one tensor group hold the same ones."""
    totals = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
    for found in scores:
        totals += torch.stack([torch.stack([found[n].sum.double(), found[n].count.double()]) for n in names])
    if groups.tensor.rank > 0:
        totals.zero_()
    reduce_over(groups.world, totals)
    return {name: LossSum(totals[i, 0], totals[i, 1]) for i, name in enumerate(names)}
