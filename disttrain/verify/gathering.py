"""Every parameter's pieces brought to rank 0, each once, and checksums of all their copies: one message a step.

Ranks outnumber cores in a proof, and each message between all of them costs more than what is in it.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from disttrain.parallel.groups import Groups
from disttrain.parallel.sharding import Shard
from disttrain.verify.compare import SMALL_TENSOR

Parts = Sequence[tuple[Shard, Tensor]]


@dataclass(frozen=True)
class Piece:
    """One rank's part of one parameter."""

    name: str
    """Of the parameter that has these values: a tied one's source."""
    shape: torch.Size
    slices: tuple[slice, ...]
    copy: bool
    """Whether it only repeats a parameter of another stage."""

    @property
    def place(self) -> tuple[str, str]:
        """Pieces of one place are copies of each other."""
        return self.name, str(self.slices)


@dataclass(frozen=True)
class Brought:
    """What reached rank 0; empty on the others."""

    said: list[Any]
    """What each rank sent along."""
    whole: dict[str, dict[str, Tensor]]
    """Kind, parameter: the whole tensor."""
    apart: dict[str, dict[str, float]]
    """Kind, parameter: how far its copies are apart, relative to its largest element; those that are equal to the bit
    are left out."""


class Gathering:
    """Where the pieces of one engine's parameters are. All ranks make it, and call `bring`, together."""

    def __init__(self, held: Parts, groups: Groups) -> None:
        self.groups = groups
        self._bounds = list(pairwise(accumulate((part.numel() for _, part in held), initial=0)))
        pieces = [Piece(s.tied_to or s.name, s.shape, s.slices, s.tied_to is not None) for s, _ in held]
        self._pieces: list[list[Piece]] = self._to_first(pieces)
        self._wanted: list[list[int]] = self._from_first(_first_of_each(self._pieces))
        self._mine = self._wanted[groups.rank]

    def flat(self, held: Parts) -> np.ndarray:
        """A copy of this rank's pieces, one after the other."""
        return torch.cat([part.detach().flatten().cpu() for _, part in held]).numpy()

    def bring(self, said: Any, values: Mapping[str, np.ndarray], copies: Mapping[str, np.ndarray]) -> Brought:
        """Gather what each rank says, the whole tensors of each kind of `values`, and whether `copies` are equal.

        The arrays are from `flat`; every kind of `copies` is also one of `values`.
        """
        sent = {kind: [flat[slice(*self._bounds[i])] for i in self._mine] for kind, flat in values.items()}
        sums = {
            kind: [zlib.crc32(flat[slice(*bounds)].data) for bounds in self._bounds] for kind, flat in copies.items()
        }
        received: list[tuple[Any, dict[str, list], dict[str, list]]] = self._to_first((said, sent, sums))
        first = self.groups.rank == 0
        whole = {kind: self._assemble([sent[kind] for _, sent, _ in received]) for kind in values} if first else {}
        differ = {kind: self._differing([sums[kind] for *_, sums in received]) for kind in copies}
        apart: dict[str, dict[str, float]] = {kind: {} for kind in copies}
        if agreed(any(differ.values()), self.groups):
            for kind, names in self._from_first(differ).items():
                apart[kind] = self._distances(copies[kind], names, whole.get(kind, {}))
        return Brought([said for said, *_ in received], whole, apart)

    def _assemble(self, of_ranks: list[list[np.ndarray]]) -> dict[str, Tensor]:
        whole: dict[str, np.ndarray] = {}
        for pieces, wanted, values in zip(self._pieces, self._wanted, of_ranks, strict=True):
            for piece, value in zip((pieces[i] for i in wanted), values, strict=True):
                if piece.name not in whole:
                    whole[piece.name] = np.full(piece.shape, math.nan, value.dtype)
                target = whole[piece.name][piece.slices]
                target[...] = value.reshape(target.shape)
        return {name: torch.from_numpy(array) for name, array in whole.items()}

    def _differing(self, of_ranks: list[list[int]]) -> list[str]:
        """Names of the parameters that have copies with other checksums."""
        seen: dict[tuple[str, str], int] = {}
        return sorted({
            piece.name
            for pieces, sums in zip(self._pieces, of_ranks, strict=False)
            for piece, checksum in zip(pieces, sums, strict=True)
            if seen.setdefault(piece.place, checksum) != checksum
        })  # fmt: skip

    def _distances(self, flat: np.ndarray, names: list[str], whole: dict[str, Tensor]) -> dict[str, float]:
        """How far the copies of these are apart. They are added up in the same order on ranks with equal shards only: an
        uneven vocabulary leaves rounding errors."""
        received = self._to_first(flat)
        largest = max((float(tensor.abs().max()) for tensor in whole.values() if tensor.numel()), default=0.0)
        first: dict[tuple[str, str], np.ndarray] = {}
        found: dict[str, float] = {}
        for pieces, values in zip(self._pieces, received, strict=False):
            sizes = [int(np.prod([s.stop - s.start for s in piece.slices])) for piece in pieces]
            for piece, bounds in zip(pieces, pairwise(accumulate(sizes, initial=0)), strict=True):
                if piece.name in names and bounds[1] > bounds[0]:
                    part = values[slice(*bounds)]
                    one = first.setdefault(piece.place, part)
                    size = float(abs(one).max()) + SMALL_TENSOR * largest + 1e-30
                    found[piece.name] = max(found.get(piece.name, 0.0), float(abs(part - one).max()) / size)
        return found

    def _to_first(self, value: Any) -> list:
        """The value of every rank on rank 0, [] elsewhere."""
        if self.groups.world.size == 1:
            return [value]
        gathered: list | None = [None] * self.groups.world.size if self.groups.rank == 0 else None
        dist.gather_object(value, gathered)
        return gathered or []

    def _from_first(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        boxed = [value]
        if self.groups.world.size > 1:
            dist.broadcast_object_list(boxed)
        return boxed[0]


def agreed(flag: bool, groups: Groups) -> bool:
    """Rank 0's flag on every rank."""
    if groups.world.size == 1:
        return flag
    told = torch.tensor(flag, dtype=torch.uint8)
    dist.broadcast(told, src=0)
    return bool(told)


def _first_of_each(of_ranks: list[list[Piece]]) -> list[list[int]]:
    """Which of its pieces each rank sends: of copies, the lowest rank's."""
    seen: set[tuple[str, str]] = set()
    wanted: list[list[int]] = []
    for pieces in of_ranks:
        wanted.append([])
        for index, piece in enumerate(pieces):
            if not piece.copy and piece.place not in seen:
                seen.add(piece.place)
                wanted[-1].append(index)
    return wanted
