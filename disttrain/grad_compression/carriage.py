"""How codes become sums on every rank, for each kind of codec."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from disttrain.grad_compression.codecs import Codec, add_values
from disttrain.grad_compression.link import Link

Drawn = Callable[[int], torch.Generator]
"""A generator for the vector of this number, or for the sum's second coding (-1): new, at its start."""


def carry(
    codec: Codec, vectors: Sequence[Tensor], link: Link, common: Drawn, own: Drawn, lost: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """The sums of vectors over the link as they came through, the same bits on every rank; and, with `lost`, what this
    rank put in and is not in them, which may be the vectors' own memory.

    Generators `common` are the same on all ranks, `own` differ.
    """
    carried = {"sum": by_sum, "exchange": by_exchange, "gather": by_gather}[codec.carried]
    return carried(codec, vectors, link, common if codec.carried == "sum" else own, lost)


def by_sum(
    codec: Codec, vectors: Sequence[Tensor], link: Link, drawn: Drawn, lost: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """One message whose numbers are added on the way."""
    codes = [codec.encode(x.unsqueeze(0), drawn(i), lost)[0] for i, x in enumerate(vectors)]
    message = link.sum(torch.cat(codes))
    parts = enumerate(zip(message.split([code.numel() for code in codes]), vectors, strict=True))
    return [codec.decode(code.view(1, -1), x.numel(), x.dtype, drawn(i))[0] for i, (code, x) in parts], list(vectors)


def by_gather(
    codec: Codec, vectors: Sequence[Tensor], link: Link, drawn: Drawn, lost: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """One message of places and values that everybody gets from everybody.

    Where the codec does not fix its length, the lengths go before it, and it is filled up to the longest.
    """
    codes = [codec.encode(x.unsqueeze(0), drawn(i), lost)[0] for i, x in enumerate(vectors)]
    message, lengths = torch.cat(codes), [[code.numel() for code in codes]] * link.size
    if not codec.fixed:
        lengths = link.gather(torch.tensor(lengths[0], device=message.device)).tolist()
        message = torch.nn.functional.pad(message, (0, max(map(sum, lengths)) - len(message)))
    sums = [torch.zeros_like(x) for x in vectors]
    for got, sizes in zip(link.gather(message), lengths, strict=True):
        for total, code in zip(sums, got[: sum(sizes)].split(sizes), strict=True):
            add_values(total.unsqueeze(0), code.unsqueeze(0))
    return sums, list(vectors)


def by_exchange(
    codec: Codec, vectors: Sequence[Tensor], link: Link, drawn: Drawn, lost: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Each rank adds the codes of one chunk and sends the code of the sum to all (Seide et al. 2014, Tang et al. 2021).

    What the second coding loses is lost by the rank that made it.
    """
    rows = in_rows(vectors, link.size, codec.block)
    n, dtype = rows.shape[1], rows.dtype
    chunk = scatter_rows(codec, rows, link, drawn, lost).unsqueeze(0)
    code = codec.encode(chunk, drawn(-1), lost)
    if lost:
        rows[link.rank] += chunk[0]
    whole = codec.decode(link.gather(code[0]), n, dtype, drawn(-1)).view(-1)
    sizes = [x.numel() for x in vectors]
    sizes.append(rows.numel() - sum(sizes))
    return list(whole.split(sizes)[:-1]), list(rows.view(-1).split(sizes)[:-1])


def scatter_rows(codec: Codec, rows: Tensor, link: Link, drawn: Drawn, lost: bool) -> Tensor:
    """Row r of [ranks, n] summed over the ranks on rank r; n is a multiple of the codec's block."""
    codes = codec.encode(rows, drawn(0), lost)
    return codec.decode(link.exchange(codes), rows.shape[1], rows.dtype, drawn(0)).sum(0)


def in_rows(vectors: Sequence[Tensor], ranks: int, block: int) -> Tensor:
    """One after the other in [ranks, n], filled up with zeros to whole blocks."""
    total = sum(x.numel() for x in vectors)
    rows = vectors[0].new_empty(ranks, -(-total // (ranks * block)) * block)
    torch.cat([x.view(-1) for x in vectors], out=rows.view(-1)[:total])
    rows.view(-1)[total:] = 0
    return rows
