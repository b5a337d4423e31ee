"""Context parallelism: every rank holds a part of each sequence, and attention alone looks across the parts.

Two ways to the same result: the ring (`disttrain.parallel.ring`), and Ulysses (Jacobs et al. 2023), which exchanges
sequence parts for heads before attention and back after it. GPT's sequences are split zigzag (see the ring), BERT's
contiguously, whichever way is taken.
"""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from disttrain.models.cross_entropy import IGNORED
from disttrain.models.dropout import WeightDropout
from disttrain.models.layers import attend, attending
from disttrain.parallel.conjugate import all_to_all, gather_from
from disttrain.parallel.groups import Group
from disttrain.parallel.ring import positions_of, ring_attend

_OF_TOKENS = ("tokens", "targets", "attention_mask", "token_types")


def apply_context_parallel(model: nn.Module, group: Group, method: Literal["ring", "ulysses"]) -> None:
    """Let every attention of a model, or of a part of one, look over all ranks of the group; in place.

    The model then takes batches that `split_batch` cut (zigzag where attention is causal). Ulysses raises ValueError
    in the forward pass where the ranks do not divide the heads that a rank holds.
    """
    if group.size == 1:
        return
    across = {"ring": ring_attend, "ulysses": ulysses_attend}[method]
    # Traced graphs cannot hold the exchange: torch.compile breaks them here. One object, so that blocks stay alike.
    untraced: Any = torch.compiler.disable(partial(across, group=group))
    for module in attending(model):
        module.attend = untraced


def split_batch(batch: dict[str, Tensor], group: Group, zigzag: bool) -> dict[str, Tensor]:
    """This rank's part of a batch of whole sequences, with `positions` int64 [S / size]: which tokens they are.

    Every [B, S] entry is cut. `next_sentence` is ignored (-100) on all ranks but the one that holds the first token,
    which alone predicts it. Other entries pass. Raises ValueError for a length that does not divide by the ranks
    (zigzag: twice the ranks), and for a batch that `prepare_batch` has seen already.
    """
    if "mlm_positions" in batch:
        raise ValueError("split a batch before prepare_batch: mlm_positions count the tokens of this rank's part")
    length, parts = batch["tokens"].shape[1], group.size * (2 if zigzag and group.size > 1 else 1)
    if length % parts:
        raise ValueError(f"{length} tokens do not divide into {parts} chunks for {group.size} context ranks")
    positions = positions_of(group.rank, group.size, length // group.size, zigzag, batch["tokens"].device)
    if group.size == 1:
        return {**batch, "positions": positions}
    cut = {name: batch[name][:, positions] for name in _OF_TOKENS if name in batch}
    if group.rank and "next_sentence" in batch:
        cut["next_sentence"] = torch.full_like(batch["next_sentence"], IGNORED)
    return {**batch, **cut, "positions": positions}


def ulysses_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    dropout: WeightDropout | None,
    group: Group,
) -> Tensor:
    """`layers.attend` of the whole sequence for this rank's queries; all [B, A, S, D], mask bool [B, S] over its keys.

    Between two exchanges each rank holds the whole sequence of A / size heads, in natural order. Raises ValueError
    where that does not divide.
    """
    heads, count = query.shape[1:3]
    if heads % group.size:
        raise ValueError(f"{heads} heads a rank do not divide by {group.size} context ranks")
    natural = _natural_order(count, causal, group, query.device)
    query, key, value = all_to_all(torch.stack((query, key, value)), 2, 3, group)[..., natural, :]
    if mask is not None:
        mask = gather_from(mask, 1, group)[:, natural]
    if dropout is not None:
        own = dropout.heads.chunk(group.size)[group.rank]
        whole = torch.arange(count * group.size, device=query.device)
        dropout = dropout._replace(heads=own, queries=whole, keys=whole)
    output = attend(query, key, value, mask, causal, dropout)
    return all_to_all(output[..., natural.argsort(), :], 2, 1, group)


def _natural_order(count: int, zigzag: bool, group: Group, device: torch.device) -> Tensor:
    """Where each position is in the ranks' parts put one after the other, int64 [count * size]."""
    parts = [positions_of(rank, group.size, count, zigzag, device) for rank in range(group.size)]
    return torch.cat(parts).argsort()
