"""Codecs: vectors of gradients become bytes and vectors again. Each is a value; what it needs to remember is elsewhere.

A codec works on rows, float32 or float64 [rows, n], each coded by itself. A row of NaN must not come out finite.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Carried = Literal["sum", "exchange", "gather"]


class Codec(Protocol):
    """How vectors travel."""

    @property
    def carried(self) -> Carried:
        """sum: codes can be added on the way. exchange: each rank adds one chunk and codes the sum again. gather: every
        rank gets the codes of all."""
        ...

    @property
    def unbiased(self) -> bool:
        """Whether the mean over the randomness of what comes out is what went in."""
        ...

    @property
    def block(self) -> int:
        """Vectors are cut into blocks of so many elements, each with a scale of its own; n is a multiple of it."""
        ...

    def nbytes(self, n: int) -> int:
        """Bytes of the code of n elements; the most it can be where that depends on them (Threshold)."""
        ...

    def encode(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The code of each row: numbers that may be added for "sum", else uint8 [rows, nbytes(n)]."""
        ...

    def decode(self, code: Tensor, n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """[rows, n] from the codes of rows. The generator is at the same point as when they were coded."""
        ...


@dataclass(frozen=True)
class Cast:
    """Half precision: half the bytes. Added in full precision, since half would lose what nobody could feed back."""

    dtype: torch.dtype
    carried: Carried = "exchange"
    unbiased: bool = False
    block: int = 1

    def nbytes(self, n: int) -> int:
        """Two bytes an element."""
        return 2 * n

    def encode(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Round to nearest."""
        return x.to(self.dtype).view(torch.uint8)

    def decode(self, code: Tensor, n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """Exact."""
        return _as(code, self.dtype).to(dtype)


@dataclass(frozen=True)
class RandomK:
    """One element of every group of 1 / ratio, drawn anew each time, the same on all ranks: values alone travel.

    `unbiased` multiplies them by the size of their group; with feedback (Stich et al. 2018) that must not be.
    """

    every: int
    unbiased: bool
    carried: Carried = "sum"
    block: int = 1

    def nbytes(self, n: int) -> int:
        """Four bytes a value that is sent, in float32."""
        return 4 * math.ceil(n / self.every)

    def encode(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The chosen values."""
        places, sizes = self._draw(x.shape[1], generator, x.device)
        chosen = x.gather(1, places.expand(len(x), -1))
        return chosen * sizes if self.unbiased else chosen

    def decode(self, code: Tensor, n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """Zero where nothing was chosen."""
        places, _ = self._draw(n, generator, code.device)
        zeros = torch.zeros(len(code), n, dtype=dtype, device=code.device)
        return zeros.scatter_(1, places.expand(len(code), -1), code)

    def _draw(self, n: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
        """Place of the chosen element of each group, and the groups' sizes: the last one may be smaller."""
        starts = torch.arange(0, n, self.every)
        sizes = (n - starts).clamp(max=self.every)
        places = starts + (torch.rand(len(starts), generator=generator) * sizes).long()
        return places.to(device).unsqueeze(0), sizes.to(device)


@dataclass(frozen=True)
class Quantiser:
    """Integers of 2, 4 or 8 bits a value and a scale a block.

    `unbiased` rounds up or down at random so that the mean is right. With feedback that must not be: small values would
    come out much too large now and then, and the error could grow; they are rounded to the nearest. With norm "max" the
    scale is the block's largest magnitude; with "l2" its norm, which is QSGD (Alistarh et al. 2017, section 3.1) with
    fixed-length codes.
    """

    bits: Literal[2, 4, 8]
    norm: Literal["max", "l2"]
    unbiased: bool
    block: int = 256
    carried: Carried = "exchange"

    @property
    def levels(self) -> int:
        """Steps between zero and the scale."""
        return 2 ** (self.bits - 1) - 1

    def nbytes(self, n: int) -> int:
        """The codes, and four bytes a block."""
        return n * self.bits // 8 + 4 * (n // self.block)

    def encode(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Scales, then codes."""
        blocks = x.view(len(x), -1, self.block)
        scale = (blocks.abs().amax(-1) if self.norm == "max" else blocks.norm(dim=-1)).float()
        steps = torch.where(scale > 0, self.levels / scale, scale)
        codes = blocks.float() * steps.unsqueeze(-1)
        if self.unbiased:
            codes = codes.add_(torch.rand(blocks.shape, generator=generator).to(x.device)).floor_()
        else:
            codes = codes.round_()
        codes = codes.add_(self.levels).nan_to_num_(0.0).clamp_(0, 2 * self.levels).to(torch.uint8).view(len(x), -1)
        return torch.cat([scale.view(torch.uint8).view(len(x), -1), pack(codes, self.bits)], 1)

    def decode(self, code: Tensor, n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """Code times scale."""
        head = 4 * (n // self.block)
        scale = _as(code[:, :head], torch.float32)
        codes = unpack(code[:, head:], self.bits, n).to(dtype).view(len(code), -1, self.block)
        return codes.sub_(self.levels).mul_((scale.to(dtype) / self.levels).unsqueeze(-1)).view(len(code), n)


@dataclass(frozen=True)
class Sign:
    """One bit a value, and the block's mean magnitude (Bernstein et al. 2018; Karimireddy et al. 2019: with feedback)."""

    block: int = 1024
    carried: Carried = "exchange"
    unbiased: bool = False

    def nbytes(self, n: int) -> int:
        """One bit an element, and four bytes a block."""
        return n // 8 + 4 * (n // self.block)

    def encode(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Scales, then bits."""
        scale = x.view(len(x), -1, self.block).abs().mean(-1).float()
        return torch.cat([scale.view(torch.uint8).view(len(x), -1), pack((x >= 0).to(torch.uint8), 1)], 1)

    def decode(self, code: Tensor, n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """Plus or minus the scale."""
        head = 4 * (n // self.block)
        scale = _as(code[:, :head], torch.float32).to(dtype).unsqueeze(-1)
        signs = unpack(code[:, head:], 1, n).to(dtype).mul_(2).sub_(1).view(len(code), -1, self.block)
        return signs.mul_(scale).view(len(code), n)


@dataclass(frozen=True)
class TopK:
    """The largest magnitudes, a share `ratio` of all, with their places (Aji and Heafield 2017; Stich et al. 2018)."""

    ratio: float
    carried: Carried = "gather"
    unbiased: bool = False
    block: int = 1

    def count(self, n: int) -> int:
        """How many of n values are sent."""
        return max(1, round(self.ratio * n))

    def nbytes(self, n: int) -> int:
        """Four bytes a place and two (bfloat16) a value."""
        return 6 * self.count(n)

    def encode(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Places, then values."""
        places = x.abs().topk(self.count(x.shape[1]), dim=1, sorted=False).indices
        return places_and_values(x, places)

    def decode(self, code: Tensor, n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """Zero elsewhere."""
        return scattered(code, self.count(n), n, dtype)


@dataclass(frozen=True)
class Threshold:
    """Values of at least `times` the vector's root mean square, as many as there are.

    After Strom 2015, with a threshold that follows the gradient. By Chebyshev at most n / times^2 are.
    """

    times: float
    carried: Carried = "gather"
    unbiased: bool = False
    block: int = 1

    def nbytes(self, n: int) -> int:
        """At most: four bytes a place and two (bfloat16) a value."""
        return 6 * int(n / self.times**2)

    def encode(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Places, then values, of one row; of all where it is not finite."""
        rms = x.square().mean().sqrt()
        return places_and_values(x, (~(x[0].abs() < self.times * rms)).nonzero().view(1, -1))

    def decode(self, code: Tensor, n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """Zero elsewhere."""
        return scattered(code, code.shape[1] // 6, n, dtype)


def places_and_values(x: Tensor, places: Tensor) -> Tensor:
    """Bytes [rows, 6 k]: int32 places, then bfloat16 values."""
    values = x.gather(1, places).to(torch.bfloat16)
    return torch.cat([places.int().view(torch.uint8), values.view(torch.uint8)], 1)


def scattered(code: Tensor, count: int, n: int, dtype: torch.dtype) -> Tensor:
    """[rows, n] with the values at their places."""
    places = _as(code[:, : 4 * count], torch.int32).long()
    values = _as(code[:, 4 * count :], torch.bfloat16).to(dtype)
    return torch.zeros(len(code), n, dtype=dtype, device=code.device).scatter_(1, places, values)


def _as(code: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes read as numbers; copied, since they may begin anywhere."""
    return code.clone(memory_format=torch.contiguous_format).view(dtype)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, n] of values below 2 ** bits into [rows, n * bits / 8]."""
    if bits == 8:
        return codes
    each = 8 // bits
    parts = codes.view(len(codes), -1, each).unbind(-1)
    packed = parts[0].clone()
    for place, part in enumerate(parts[1:], start=1):
        packed |= part << (bits * place)
    return packed


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack`: uint8 [rows, n]."""
    if bits == 8:
        return packed
    mask, each = 2**bits - 1, 8 // bits
    parts = [(packed >> (bits * place)) & mask for place in range(each)]
    return torch.stack(parts, -1).view(len(packed), n)


Maker = Callable[..., Codec]

CODECS: dict[str, Maker] = {
    "fp16": lambda c: Cast(torch.float16),
    "bf16": lambda c: Cast(torch.bfloat16),
    "int8": lambda c: Quantiser(8, "max", not c.feeds_back),
    "int4": lambda c: Quantiser(4, "max", not c.feeds_back),
    "qsgd": lambda c: Quantiser(c.bits, "l2", not c.feeds_back, 512),
    "topk": lambda c: TopK(c.ratio),
    "randomk": lambda c: RandomK(max(1, round(1 / c.ratio)), not c.feeds_back),
    "threshold": lambda c: Threshold(c.threshold),
    "sign": lambda c: Sign(),
}
"""Names of `compression.codec` and what they make of the settings."""
