"""How codes become sums on every rank, for each kind of codec: (sums, what got lost on this rank)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from disttrain.grad_compression.codecs import Codec
from disttrain.grad_compression.link import Link

Drawn = Callable[[int], torch.Generator]
"""A generator for the vector of this number, or for the sum's second coding (-1): new, at its start."""


class Carried(NamedTuple):
    """What a link made of this rank's vectors."""

    sums: list[Tensor]
    """Their sums over the ranks as they came through; the same bits on every rank."""
    lost: list[Tensor]
    """What this rank put in and is not in them."""


def carry(codec: Codec, vectors: Sequence[Tensor], link: Link, common: Drawn, own: Drawn) -> Carried:
    """Sum vectors over the link. Generators `common` are the same on all ranks, `own` differ."""
    carried = {"sum": by_sum, "exchange": by_exchange, "gather": by_gather}[codec.carried]
    return carried(codec, vectors, link, common if codec.carried == "sum" else own)


def by_sum(codec: Codec, vectors: Sequence[Tensor], link: Link, drawn: Drawn) -> Carried:
    """One message whose numbers are added on the way."""
    codes = [codec.encode(x.unsqueeze(0), drawn(i)) for i, x in enumerate(vectors)]

    def decoded(codes: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(codes, vectors, strict=True)
        return [codec.decode(code.view(1, -1), x.numel(), x.dtype, drawn(i))[0] for i, (code, x) in enumerate(pairs)]

    lost = [x - mine for x, mine in zip(vectors, decoded(codes), strict=True)]
    message = link.sum(torch.cat([code.view(-1) for code in codes]))
    return Carried(decoded(message.split([code.numel() for code in codes])), lost)


def by_gather(codec: Codec, vectors: Sequence[Tensor], link: Link, drawn: Drawn) -> Carried:
    """One message that everybody gets from everybody. Messages of different lengths are filled up to the longest."""
    codes = [codec.encode(x.unsqueeze(0), drawn(i))[0] for i, x in enumerate(vectors)]
    lengths = link.gather(torch.tensor([code.numel() for code in codes], device=vectors[0].device))
    longest = int(lengths.sum(1).max())
    message = torch.zeros(longest, dtype=torch.uint8, device=vectors[0].device)
    message[: sum(code.numel() for code in codes)] = torch.cat(codes)
    sums = [torch.zeros_like(x) for x in vectors]
    lost = []
    for rank, (got, sizes) in enumerate(zip(link.gather(message), lengths.tolist(), strict=True)):
        for i, code in enumerate(got[: sum(sizes)].split(sizes)):
            x = vectors[i]
            theirs = codec.decode(code.view(1, -1), x.numel(), x.dtype, drawn(i))[0]
            sums[i] += theirs
            if rank == link.rank:
                lost.append(x - theirs)
    return Carried(sums, lost)


def by_exchange(codec: Codec, vectors: Sequence[Tensor], link: Link, drawn: Drawn) -> Carried:
    """Each rank adds the codes of one chunk and sends the code of the sum to all (Seide et al. 2014, Tang et al. 2021).

    What the second coding loses is lost by the rank that made it.
    """
    rows = in_rows(vectors, link.size, codec.block)
    chunk, lost = scatter_rows(codec, rows, link, drawn)
    n, dtype = rows.shape[1], rows.dtype
    code = codec.encode(chunk.unsqueeze(0), drawn(-1))
    lost[link.rank] += chunk - codec.decode(code, n, dtype, drawn(-1))[0]
    whole = codec.decode(link.gather(code[0]), n, dtype, drawn(-1)).view(-1)
    sizes = [x.numel() for x in vectors]
    rest = whole.numel() - sum(sizes)
    return Carried(list(whole.split([*sizes, rest])[:-1]), list(lost.view(-1).split([*sizes, rest])[:-1]))


def scatter_rows(codec: Codec, rows: Tensor, link: Link, drawn: Drawn) -> tuple[Tensor, Tensor]:
    """Row r summed over the ranks on rank r, and what this rank lost [ranks, n]; n is a multiple of the codec's block."""
    n = rows.shape[1]
    codes = codec.encode(rows, drawn(0))
    lost = rows - codec.decode(codes, n, rows.dtype, drawn(0))
    return codec.decode(link.exchange(codes), n, rows.dtype, drawn(0)).sum(0), lost


def in_rows(vectors: Sequence[Tensor], ranks: int, block: int) -> Tensor:
    """One after the other in [ranks, n], filled up with zeros to whole blocks."""
    total = sum(x.numel() for x in vectors)
    n = -(-total // (ranks * block)) * block
    rows = vectors[0].new_zeros(ranks, n)
    torch.cat([x.view(-1) for x in vectors], out=rows.view(-1)[:total])
    return rows
