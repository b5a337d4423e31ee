"""Faults of data parallelism, accumulation, ZeRO and replicas, and of recomputation."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from disttrain.engines import objective
from disttrain.engines.native import NativeEngine
from disttrain.models.dropout import Dropout
from disttrain.models.layers import LossSum
from disttrain.parallel import data, gradients, parallelize
from tests.verify.mutants.mutant import Mutant, after, gradients_of, in_backward, needs, replace


def future(value: Tensor) -> torch.futures.Future[Tensor]:
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(value)
    return done


def not_summed() -> None:
    data._sum_bucket = lambda group, bucket: future(bucket.buffer())


def averaged() -> None:
    original = data._sum_bucket

    def changed(group: Any, bucket: Any) -> torch.futures.Future[Tensor]:
        return original(group, bucket).then(lambda done: done.value().div_(group.size))

    changed.__annotations__ = original.__annotations__  # DDP looks at them
    data._sum_bucket = changed


def summed_twice() -> None:
    def again(nothing: None, parameters: Any, groups: Any, tied: Any, reduced: bool, *more: Any) -> None:
        if reduced:
            gradients.sum_over(groups.data, gradients_of(parameters))

    after(gradients, "complete", again)


def own_counts(self: NativeEngine, batch: dict[str, Tensor], parts: int) -> Any:
    """Divides by this micro-batch's own count: the mean of `parts` means."""
    counts = self._model.count_targets(batch)

    def scaled(losses: dict[str, LossSum]) -> tuple[Tensor, Tensor]:
        means = [loss.sum / (counts[name].clamp(min=1) * parts) for name, loss in losses.items()]
        kept = torch.stack([loss.sum.detach() for loss in losses.values()])
        return torch.stack(means).sum().mul(self.scale.value), kept

    return scaled


def mean_of_micro_batches() -> None:
    def make(backward: Any) -> Any:
        def changed(self: NativeEngine, batch: dict[str, Tensor], scaled: Any, *rest: Any) -> Tensor:
            parts = self.config.train.global_batch_size // len(batch["tokens"])
            size = self.config.train.micro_batch_size
            return backward(self, batch, own_counts(self, batch, parts) if size else scaled, *rest)

        return changed

    replace(NativeEngine, "_backward", make)


def mean_of_ranks() -> None:
    def make(run: Any) -> Any:
        def changed(self: NativeEngine, batches: list[dict[str, Tensor]], counts: dict[str, Tensor]) -> Tensor:
            own = [self._model.count_targets(batch) for batch in batches]
            ranks = self.groups.data.size
            local = {name: sum(c[name] for c in own) * ranks for name in counts}
            return run(self, batches, local)

        return changed

    replace(NativeEngine, "_forward_and_backward", make)


def divided_by_micro_steps() -> None:
    def scaled_down(nothing: None, parameters: Any, *args: Any) -> None:
        for gradient in gradients_of(parameters):
            gradient /= MICRO_STEPS[0]

    def make(run: Any) -> Any:
        def changed(self: NativeEngine, batches: list[dict[str, Tensor]], counts: dict[str, Tensor]) -> Tensor:
            MICRO_STEPS[0] = len(batches)
            return run(self, batches, counts)

        return changed

    replace(NativeEngine, "_forward_and_backward", make)
    after(gradients, "complete", scaled_down)


MICRO_STEPS = [1]


def only_the_last_micro_batch() -> None:
    def make(backward: Any) -> Any:
        def changed(self: NativeEngine, *args: Any, **kwargs: Any) -> Tensor:
            for p in self.parameters:
                p.parameter.grad = None
            return backward(self, *args, **kwargs)

        return changed

    replace(NativeEngine, "_backward", make)


def reduced_with_every_micro_batch() -> None:
    data.unsynchronised = lambda module, last: nullcontext()


def same_masks_on_all_ranks() -> None:
    """Seeds by the place in the rank's own batch: the second rank repeats the first one's masks."""

    def make(at_site: Any) -> Any:
        def local(samples: Tensor, seed: int) -> Tensor:
            return at_site(samples // 16 * 16 + torch.arange(len(samples)), seed)

        return local

    replace(objective, "at_site", make)


def counted_by_every_rank() -> None:
    def make(count: Any) -> Any:
        def changed(self: NativeEngine, batches: Any) -> Any:
            _, counts, tokens = count(self, batches)
            counts = {name: n * self.groups.tensor.size for name, n in counts.items()}
            return counts, counts, tokens

        return changed

    replace(NativeEngine, "_count", make)


def zero_averages() -> None:
    def make(call: Any) -> Any:
        def changed(self: Any, output_tensor: Tensor, input_tensor: Tensor, group: Any, *args: Any, **kw: Any) -> Any:
            return call(self, output_tensor, input_tensor / group.size(), group, *args, **kw)

        return changed

    replace(data.CountedReduceScatter, "__call__", make)


def replicas_not_summed() -> None:
    def never(nothing: None, model: Any, zero: int, last: bool) -> None:
        if hasattr(model, "set_requires_all_reduce"):
            model.set_requires_all_reduce(False)

    after(data, "synchronise", never)


def replicas_averaged() -> None:
    def halved(nothing: None, model: Any, groups: Any, *args: Any) -> None:
        for module in data.sharded_modules(model):
            module.set_all_reduce_hook(lambda whole: whole.div_(groups.mesh.replicate))

    after(data, "shard", halved)


def norms_not_summed() -> None:
    def make(complete: Any) -> Any:
        return lambda parameters, groups, tied, reduced, *more: complete(parameters, groups, tied, True)

    replace(gradients, "complete", make)


def stale_shard() -> None:
    """The last rank's shard of one matrix is overwritten with what was gathered before the update."""

    def make(update: Any) -> Any:
        def changed(self: NativeEngine, step: int, rate: float) -> None:
            last = self.groups.world.rank == self.groups.world.size - 1 and self.config.parallel.zero > 0
            kept = {p: p.master.detach().clone() for p in self.parameters if last and "mlp.up.weight" in p.shard.name}
            update(self, step, rate)
            with torch.no_grad():
                for p, old in kept.items():
                    p.master.copy_(old)

        return changed

    replace(NativeEngine, "_update", make)


def updates_a_copy() -> None:
    def detached(found: Any, *args: Any) -> Any:
        from dataclasses import replace as changed

        from torch.distributed.tensor import DTensor

        return [
            changed(p, master=torch.nn.Parameter(p.master.detach().clone())) if isinstance(p.parameter, DTensor) else p
            for p in found
        ]

    after(parallelize, "local_parameters", detached)


def other_masks_when_recomputed() -> None:
    def make(forward: Any) -> Any:
        def changed(self: Dropout, x: Tensor, keys: Any) -> Tensor:
            if in_backward() and keys is not None and keys.seeds is not None:
                keys = keys._replace(seeds=keys.seeds + 1)
            return forward(self, x, keys)

        return changed

    replace(Dropout, "forward", make)


def one_rank_waits() -> None:
    def make(count: Any) -> Any:
        def changed(self: NativeEngine, batches: Any) -> Any:
            if self.groups.world.rank == 1:
                dist.barrier()
            return count(self, batches)

        return changed

    replace(NativeEngine, "_count", make)


def one_rank_raises() -> None:
    def make(count: Any) -> Any:
        def changed(self: NativeEngine, batches: Any) -> Any:
            if self.groups.data.rank == 1:
                raise RuntimeError("expected all tensors to be on the same device")
            return count(self, batches)

        return changed

    replace(NativeEngine, "_count", make)


DATA = [
    Mutant("not_summed", "every rank trains on its own gradients (no_sync was never left)", "dp2 on 2", not_summed,
           "gradients", "not summed over all data ranks", needs("data")),
    Mutant("averaged", "gradients are averaged although the loss is divided by the global count", "dp4.mb2 on 4",
           averaged, "gradients", "1/4 of what it should be, the number of data ranks", needs("data")),
    Mutant("summed_twice", "gradients are all-reduced by DDP and once more by the trainer", "dp2 on 2", summed_twice,
           "gradients", "2 times too large, the number of data ranks", needs("data")),
    Mutant("mean_of_micro_batches", "accumulation averages the means of micro-batches (transformers 34191)",
           "mb2 on 1", mean_of_micro_batches, "gradients", "mean of means", needs("micro_batch")),
    Mutant("mean_of_ranks", "each rank divides by its own token count, then ranks are averaged", "dp2 on 2",
           mean_of_ranks, "gradients", "mean of means", needs("data")),
    Mutant("divided_by_micro_steps", "the loss is divided by the accumulation steps once more", "dp2.mb2 on 2",
           divided_by_micro_steps, "gradients", "the number of micro-batches", needs("micro_batch")),
    Mutant("only_the_last_micro_batch", "gradients are zeroed between micro-batches", "mb4 on 1",
           only_the_last_micro_batch, "gradients", "replace those of another", needs("micro_batch")),
    Mutant("reduced_with_every_micro_batch", "accumulated gradients are reduced again with each micro-batch",
           "dp2.mb4 on 2", reduced_with_every_micro_batch, "gradients", "data", needs("data", "micro_batch")),
    Mutant("same_masks_on_all_ranks", "dropout masks are identical on all data ranks", "dp2 on 2",
           same_masks_on_all_ranks, "forward", "dropout masks", needs("data", "dropout")),
    Mutant("counted_by_every_rank", "tokens are summed over the whole world, tensor ranks included", "tp2 on 2",
           counted_by_every_rank, "counts", "2 times too large", needs("tensor")),
    Mutant("zero_averages", "FSDP divides by the number of shards although the loss is normalised", "dp2.zero2 on 2",
           zero_averages, "gradients", "1/2 of what it should be, the number of data ranks", needs("data", "zero")),
    Mutant("replicas_not_summed", "HSDP does not all-reduce between replicas", "dp4.zero2.rep2 on 4",
           replicas_not_summed, "gradients", "not summed over all data ranks", needs("data", "zero", "replicate")),
    Mutant("replicas_averaged", "HSDP divides by the replicas", "dp4.zero3.rep2 on 4", replicas_averaged,
           "gradients", "1/2 of what it should be, the number of replicas", needs("data", "zero", "replicate")),
    Mutant("norms_not_summed", "parameters kept out of FSDP are not reduced at all", "dp2.zero3 on 2",
           norms_not_summed, "gradients", "stay whole under ZeRO", needs("data", "zero")),
    Mutant("stale_shard", "one rank's optimizer shard is stale after the step", "dp2.zero1 on 2", stale_shard,
           "weights", "stale", needs("data", "zero")),
    Mutant("updates_a_copy", "the optimizer updates a copy of the flat shard, the model keeps the old one",
           "dp2.zero2 on 2", updates_a_copy, "weights", "stale", needs("data", "zero")),
    Mutant("other_masks_when_recomputed", "recomputation draws new dropout masks", "full on 1",
           other_masks_when_recomputed, "gradients", "recomputation draws other dropout",
           needs("recompute", "dropout")),
    Mutant("one_rank_waits", "one rank enters a collective that the others never call", "dp2 on 2", one_rank_waits,
           "run", "ranks wait for each other", needs("data")),
    Mutant("one_rank_raises", "one rank fails while the others wait for it", "dp2.mb4 on 2", one_rank_raises,
           "run", "fails outright", needs("data")),
]  # fmt: skip
