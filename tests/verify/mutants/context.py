"""Faults of context parallelism."""

from typing import Any

import torch
from torch import Tensor

from disttrain.engines import objective
from disttrain.parallel import context, parallelize, ring
from tests.verify.mutants.mutant import Mutant, after, in_backward, needs, replace


def not_summed() -> None:
    def make(replicate: Any) -> Any:
        return lambda module, device, group, *more: (
            module if group.size == 2 else replicate(module, device, group, *more)
        )

    replace(parallelize.data, "replicate", make)


def averaged() -> None:
    from tests.verify.mutants.data import averaged as plant

    plant()


def positions_by_rank() -> None:
    def contiguous(batch: dict[str, Tensor], whole: Any, group: Any, zigzag: bool) -> dict[str, Tensor]:
        count = len(batch["positions"])
        return {**batch, "positions": torch.arange(count) + group.rank * count}

    after(objective, "split_batch", contiguous)


def own_block_only() -> None:
    def make(rounds: Any) -> Any:
        def first(*args: Any) -> Any:
            for number, block in enumerate(rounds(*args)):
                if number == 0:
                    yield block

        return first

    replace(ring, "_rounds", make)


def future_seen() -> None:
    def make(tiles: Any) -> Any:
        def changed(query: Any, source: int, causal: bool, group: Any) -> Any:
            return tiles(query, source, causal and source <= group.rank, group)

        return changed

    replace(ring, "_tiles", make)


def key_gradients_not_sent_home() -> None:
    def make(pass_on: Any) -> Any:
        def changed(tensors: list[Tensor], group: Any, tag: int) -> Any:
            return (lambda: tensors) if tag == 2 else pass_on(tensors, group, tag)

        return changed

    replace(ring, "_pass_on", make)


def padding_attended() -> None:
    def make(attend: Any) -> Any:
        def changed(query: Any, key: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
            return attend(query, key, value, torch.ones_like(mask), *args, **kwargs)

        return changed

    replace(context, "ring_attend", make)


def next_sentence_everywhere() -> None:
    def make(split: Any) -> Any:
        def changed(batch: dict[str, Tensor], group: Any, zigzag: bool) -> dict[str, Tensor]:
            return {**split(batch, group, zigzag), "next_sentence": batch["next_sentence"]}

        return changed

    replace(objective, "split_batch", make)


def local_key_positions() -> None:
    def make(dropout_of: Any) -> Any:
        def changed(dropout: Any, tile: Any, source: int, causal: bool, group: Any) -> Any:
            return dropout_of(dropout, tile, group.rank, causal, group)

        return changed

    replace(ring, "_dropout_of", make)


def heads_exchanged_in_rank_order() -> None:
    """Ulysses forgets that parts are zigzag."""
    context._natural_order = lambda count, zigzag, group, device: torch.arange(count * group.size, device=device)


def exchange_back_twice() -> None:
    def make(apply: Any) -> Any:
        def changed(x: Tensor, split_dim: int, concat_dim: int, group: Any) -> Tensor:
            y = apply(x, split_dim, concat_dim, group)
            if y.requires_grad:
                y.register_hook(lambda grad: grad * group.size)
            return y

        return changed

    assert not in_backward()
    replace(context, "all_to_all", make)


CONTEXT = [
    Mutant("context_not_summed", "gradients are reduced over data ranks but not over context ranks", "cp2-ring on 2",
           not_summed, "gradients", "not summed over the context", needs("context")),
    Mutant("context_averaged", "the loss is averaged over context ranks (wrong divisor)", "cp2-ring on 2", averaged,
           "gradients", "1/2 of what it should be, the number of context ranks", needs("context")),
    Mutant("positions_by_rank", "position embeddings ignore the zigzag split", "cp2-ring on 2", positions_by_rank,
           "forward", "positions do not follow", needs("context")),
    Mutant("own_block_only", "attention does not look past the rank's own part", "cp2-ring on 2", own_block_only,
           "forward", "attention misses keys", needs("context")),
    Mutant("future_seen", "the causal mask is wrong between chunks of different ranks", "cp2-ring.mb4 on 2",
           future_seen, "forward", "sees future ones", needs("context")),
    Mutant("key_gradients_not_sent_home", "the ring's backward pass leaves key and value gradients on the wrong rank",
           "cp2-ring on 2", key_gradients_not_sent_home, "gradients", "backward pass of attention", needs("context")),
    Mutant("local_key_positions", "attention dropout repeats the same mask for every block of the ring",
           "cp2-ring on 2", local_key_positions, "forward", "dropout masks", needs("context", "dropout")),
    Mutant("heads_exchanged_in_rank_order", "Ulysses attends in the order of ranks, not of the sequence",
           "cp2-ulysses on 2", heads_exchanged_in_rank_order, "forward", "context parallelism", needs("context")),
    Mutant("exchange_back_twice", "Ulysses gradients are sp times too large (DeepSpeed)", "cp2-ulysses on 2",
           exchange_back_twice, "gradients", "context parallelism", needs("context")),
    Mutant("padding_attended", "padding masks are dropped under context parallelism", "cp2-ring on 2",
           padding_attended, "forward", "context parallelism", needs("context"), family="bert"),
    Mutant("next_sentence_everywhere", "BERT's sentence loss is counted by every context rank", "cp2-ring on 2",
           next_sentence_everywhere, "counts", "2 times too large, the number of context", needs("context"),
           family="bert"),
]  # fmt: skip
