"""Faults of tensor and sequence parallelism."""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from disttrain.models.dropout import Dropout
from disttrain.models.layers import Attention
from disttrain.parallel import gradients, parallelize, tensor
from disttrain.parallel.vocabulary import ShardedVocabulary
from tests.verify.mutants.mutant import Mutant, after, in_backward, needs, replace


def row_not_reduced() -> None:
    tensor._row = lambda x, weight, bias, group, sequence: F.linear(x, weight, bias)


def bias_on_every_rank() -> None:
    def make(row: Any) -> Any:
        return lambda x, weight, bias, group, sequence: row(x, weight, bias * group.size, group, sequence)

    replace(tensor, "_row", make)


def backward_not_reduced() -> None:
    def make(start: Any) -> Any:
        return lambda x, group: (lambda: x) if in_backward() else start(x, group)

    replace(tensor, "start_all_reduce", make)


def backward_reduced_twice() -> None:
    def twice(start: Any) -> Any:
        return lambda x, group: start(start(x, group)(), group) if in_backward() else start(x, group)

    replace(tensor, "start_all_reduce", twice)


def embedding_not_reduced() -> None:
    tensor.conjugate.reduce_from = lambda x, group: x


def loss_off_by_log() -> None:
    def counted_again(gathered: Tensor, self: ShardedVocabulary, rows: Tensor) -> Tensor:
        if rows.shape[0] == 2 and gathered.ndim == 3:
            gathered[:, 0] += math.log(self.group.size)
        return gathered

    after(ShardedVocabulary, "gather", counted_again)


def smoothing_over_the_shard() -> None:
    def local(nothing: None, self: ShardedVocabulary, *args: Any) -> None:
        self.size = len(self.part)

    after(ShardedVocabulary, "__init__", local)


def loss_counted_by_every_rank() -> None:
    from disttrain.engines.native import NativeEngine

    def everywhere(total: Tensor, self: NativeEngine, *args: Any) -> Tensor:
        group = self.groups.tensor
        return tensor.start_all_reduce(total.clone(), group)() if group.size > 1 else total

    after(NativeEngine, "_forward_and_backward", everywhere)


def heads_numbered_locally() -> None:
    def renumber(shards: Any, model: Any, *args: Any) -> Any:
        for module in model.modules():
            if isinstance(module, Attention):
                module.first_head = 0
        return shards

    after(parallelize, "apply_tensor_parallel", renumber)


def residual_masks_of_the_rank() -> None:
    def reseed(shards: Any, model: Any, group: Any, sequence: bool) -> Any:
        for module in model.modules():
            if isinstance(module, Dropout):
                module.site += 1000 * group.rank
        return shards

    after(parallelize, "apply_tensor_parallel", reseed)


def every_chunk_the_first() -> None:
    def first(shards: Any, model: Any, group: Any, sequence: bool) -> Any:
        for module in model.modules():
            if isinstance(module, Dropout) and module.part[1] > 1:
                module.part = (0, group.size)
        return shards

    after(parallelize, "apply_tensor_parallel", first)


def partial_not_summed() -> None:
    after(parallelize, "apply_tensor_parallel", lambda shards, *args: shards._replace(partial=set()))


def partial_summed_twice() -> None:
    def again(nothing: None, parameters: Any, groups: Any, *args: Any) -> None:
        gradients.sum_over(groups.tensor, gradients._present(p for p in parameters if p.shard.partial))

    after(gradients, "complete", again)


def weights_drawn_by_shard() -> None:
    def make(original: Any) -> Any:
        def local(config: Any, name: str, shape: Any, seed: int) -> Tensor:
            import torch.distributed as dist

            return original(config, name, shape, seed + dist.get_rank() * (".mlp." in name))

        return local

    replace(parallelize, "initial_value", make)


def copies_drawn_by_rank() -> None:
    def make(original: Any) -> Any:
        def local(config: Any, name: str, shape: Any, seed: int) -> Tensor:
            import torch.distributed as dist

            return original(config, name, shape, seed + dist.get_rank() * ("positions" in name))

        return local

    replace(parallelize, "initial_value", make)


TENSOR = [
    Mutant("row_not_reduced", "the all-reduce after a row-parallel layer is missing", "tp2 on 2", row_not_reduced,
           "forward", "tensor parallelism: a sum over shards", needs("tensor")),
    Mutant("bias_on_every_rank", "a row-parallel bias is added before the reduction, once for each rank", "tp2 on 2",
           bias_on_every_rank, "gradients", "2 times too large, the number of tensor ranks", needs("tensor")),
    Mutant("backward_not_reduced", "the all-reduce in the backward pass of column-parallel layers is missing",
           "tp2.dp2 on 4", backward_not_reduced, "gradients", "backward pass at the entry of a column-parallel",
           needs("tensor")),
    Mutant("backward_reduced_twice", "gradients of column-parallel inputs are all-reduced twice", "tp2 on 2",
           backward_reduced_twice, "gradients", "all-reduce of the backward pass", needs("tensor")),
    Mutant("embedding_not_reduced", "the vocabulary-parallel embedding returns zeros for other ranks' rows",
           "tp2 on 2", embedding_not_reduced, "forward", "tensor parallelism: a sum over shards", needs("tensor")),
    Mutant("loss_off_by_log", "the loss is higher by log(TP) than on one GPU, gradients look fine", "tp4.mb4 on 4",
           loss_off_by_log, "forward", "logarithm of the number of tensor ranks", needs("tensor")),
    Mutant("smoothing_over_the_shard", "label smoothing divides by the local vocabulary shard", "tp2 on 2",
           smoothing_over_the_shard, "forward", "label smoothing", needs("tensor", "label_smoothing")),
    Mutant("loss_counted_by_every_rank", "the reported loss is TP times too large", "tp2 on 2",
           loss_counted_by_every_rank, "forward", "2 times too large", needs("tensor")),
    Mutant("heads_numbered_locally", "attention dropout draws the same mask on every tensor rank", "tp2 on 2",
           heads_numbered_locally, "forward", "dropout masks", needs("tensor", "dropout")),
    Mutant("residual_masks_of_the_rank", "residual dropout differs between tensor ranks, which hold copies",
           "tp2 on 2", residual_masks_of_the_rank, "forward", "dropout masks", needs("tensor", "dropout")),
    Mutant("every_chunk_the_first", "under sequence parallelism all ranks use one dropout mask", "tp2.sp on 2",
           every_chunk_the_first, "forward", "dropout masks", needs("tensor", "sequence", "dropout")),
    Mutant("partial_not_summed", "layer-norm gradients are not summed under sequence parallelism",
           "tp2.sp.dp2.mb2 on 4", partial_not_summed, "gradients", "sequence parallelism", needs("tensor", "sequence")),
    Mutant("partial_summed_twice", "layer-norm gradients are all-reduced by the optimizer and by a hook",
           "tp2.sp on 2", partial_summed_twice, "gradients", "sequence parallelism", needs("tensor", "sequence")),
    Mutant("weights_drawn_by_shard", "initial weights change with the tensor-parallel size", "tp2 on 2",
           weights_drawn_by_shard, "initial_weights", "depend on the layout", needs("tensor")),
    Mutant("copies_drawn_by_rank", "each tensor rank starts its position embeddings from a seed of its own", "tp2 on 2",
           copies_drawn_by_rank, "replicas", "ranks start from different weights", needs("tensor")),
]  # fmt: skip
