"""How codes become sums on every rank, for each kind of codec."""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from disttrain.grad_compression.codecs import Codec
from disttrain.grad_compression.link import Arrival, Link
from disttrain.grad_compression.sparse import add_values

Drawn = Callable[[int], torch.Generator]
"""A generator for the vector or piece of this number, or -1 - number for the second coding of the sum: new, at its start."""


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
        lengths = link.gather(torch.tensor(lengths[0], device=message.device))().tolist()
        message = torch.nn.functional.pad(message, (0, max(map(sum, lengths)) - len(message)))
    sums = [torch.zeros_like(x) for x in vectors]
    for got, sizes in zip(link.gather(message)(), lengths, strict=True):
        for total, code in zip(sums, got[: sum(sizes)].split(sizes), strict=True):
            add_values(total.unsqueeze(0), code.unsqueeze(0))
    return sums, list(vectors)


def by_exchange(
    codec: Codec, vectors: Sequence[Tensor], link: Link, drawn: Drawn, lost: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Each rank adds the codes of one chunk and sends the code of the sum to all (Seide et al. 2014, Tang et al. 2021).

    So with each piece of the vectors that lie one after the other. What the second coding loses is lost by the rank that
    made it.
    """
    flat = joined(vectors, link.size * codec.block)
    whole = torch.empty_like(flat) if lost else flat
    width = link.size * piece_width(codec, flat)

    def piece(number: int, rows: Tensor, out: Tensor) -> Piece:
        n, dtype = rows.shape[1], rows.dtype
        codes = yield link.exchange(codec.encode(rows, drawn(number), lost))
        chunk = codec.decode(codes, n, dtype, drawn(number)).sum(0, keepdim=True)
        code = codec.encode(chunk, drawn(-1 - number), lost)
        if lost:
            rows[link.rank] += chunk[0]
        codes = yield link.gather(code[0])
        out.copy_(codec.decode(codes, n, dtype, drawn(-1 - number)))

    parts = zip(flat.split(width), whole.split(width), strict=True)
    overlap(piece(i, x.view(link.size, -1), out.view(link.size, -1)) for i, (x, out) in enumerate(parts))
    sizes = [x.numel() for x in vectors]
    sizes.append(len(flat) - sum(sizes))
    return list(whole.split(sizes)[:-1]), list(flat.split(sizes)[:-1])


def scatter_rows(codec: Codec, rows: Tensor, link: Link, drawn: Drawn, lost: bool) -> Tensor:
    """Row r of [ranks, n] summed over the ranks on rank r; n is a multiple of the codec's block."""
    mine = torch.empty_like(rows[0])
    width = piece_width(codec, rows)

    def piece(number: int, columns: Tensor, out: Tensor) -> Piece:
        x = columns.contiguous()
        codes = yield link.exchange(codec.encode(x, drawn(number), lost))
        if lost:
            columns.copy_(x)
        torch.sum(codec.decode(codes, len(out), out.dtype, drawn(number)), 0, out=out)

    parts = zip(rows.split(width, 1), mine.split(width), strict=True)
    overlap(piece(i, columns, out) for i, (columns, out) in enumerate(parts))
    return mine


PIECE_BYTES = 1 << 17
"""About how much of a row's code is made at a time on a CPU, while what was made before travels."""


def piece_width(codec: Codec, x: Tensor) -> int:
    """Elements of a row in one piece; all where the processor is not the one that waits for the link."""
    return codec.block * max(1, PIECE_BYTES // codec.nbytes(codec.block)) if x.device.type == "cpu" else x.numel()


Piece = Generator[Arrival, Tensor, None]
"""One piece on its way: yields what it waits for and is sent what came."""


def overlap(pieces: Iterable[Piece]) -> None:
    """Take pieces through their messages, each one message behind the next: while one is coded, those before it travel.

    The order of messages does not depend on when they come.
    """
    on_way: list[tuple[Piece, Arrival]] = []

    def go_on() -> list[tuple[Piece, Arrival]]:
        """Those that wait for one more message."""
        waiting = []
        for piece, arrival in on_way:
            with suppress(StopIteration):
                waiting.append((piece, piece.send(arrival())))
        return waiting

    for piece in pieces:
        on_way = [(piece, next(piece)), *go_on()]
    while on_way:
        on_way = go_on()


def joined(vectors: Sequence[Tensor], multiple: int) -> Tensor:
    """One after the other, filled up with zeros."""
    total = sum(x.numel() for x in vectors)
    flat = vectors[0].new_empty(-(-total // multiple) * multiple)
    torch.cat([x.view(-1) for x in vectors], out=flat[:total])
    flat[total:] = 0
    return flat
