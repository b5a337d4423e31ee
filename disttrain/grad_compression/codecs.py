"""Codecs: vectors of gradients become bytes and vectors again. Each is a value; what it needs to remember is elsewhere.

A codec works on rows, float32 or float64 [rows, n], each coded by itself. A row of NaN must not come out finite. Coders of
blocks work on `PART` elements at a time, which stay in the processor's cache.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from disttrain.grad_compression.packing import numbers, pack, unpack
from disttrain.grad_compression.sparse import Threshold, TopK

Carried = Literal["sum", "exchange", "gather"]


class Codec(Protocol):
    """How vectors travel."""

    @property
    def carried(self) -> Carried:
        """sum: codes can be added on the way. exchange: each rank adds one chunk and codes the sum again. gather: every
        rank gets the codes of all, which are places and values (`add_values`)."""
        ...

    @property
    def unbiased(self) -> bool:
        """Whether the mean over the randomness of what comes out is what went in."""
        ...

    @property
    def block(self) -> int:
        """Vectors are cut into blocks of so many elements, each with a scale of its own; n is a multiple of it."""
        ...

    @property
    def fixed(self) -> bool:
        """Whether the code of n elements has nbytes(n) whatever they are, so that nobody need be told."""
        ...

    @property
    def added(self) -> torch.dtype | None:
        """As numbers of which type codes can be added on the way, where the errors of that are not fed back."""
        ...

    def nbytes(self, n: int) -> int:
        """Bytes of the code of n elements; the most it can be where it is not `fixed`."""
        ...

    def encode(self, x: Tensor, generator: torch.Generator, lost: bool) -> Tensor:
        """The code of each row: numbers that may be added for "sum", else uint8 [rows, nbytes(n)].

        With `lost`, x is left with what the code lacks: x before = decoded + x after.
        """
        ...

    def decode(self, code: Tensor, n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """[rows, n] from the codes of rows. The generator is at the same point as when they were coded."""
        ...


@dataclass(frozen=True)
class Cast:
    """Half precision: half the bytes. Added on the way, or, where errors are fed back, in full precision."""

    dtype: torch.dtype
    carried: Carried = "exchange"
    unbiased: bool = False
    block: int = 1
    fixed: bool = True

    @property
    def added(self) -> torch.dtype:
        """The type itself."""
        return self.dtype

    def nbytes(self, n: int) -> int:
        """Two bytes an element."""
        return 2 * n

    def encode(self, x: Tensor, generator: torch.Generator, lost: bool) -> Tensor:
        """Round to nearest."""
        code = x.to(self.dtype)
        if lost:
            x.sub_(code)
        return code.view(torch.uint8)

    def decode(self, code: Tensor, n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """Exact."""
        return code.view(self.dtype).to(dtype)


@dataclass(frozen=True)
class RandomK:
    """One element of every group of 1 / ratio, drawn anew each time, the same on all ranks: values alone travel.

    `unbiased` multiplies them by the size of their group; with feedback (Stich et al. 2018) that must not be.
    """

    every: int
    unbiased: bool
    carried: Carried = "sum"
    block: int = 1
    fixed: bool = True
    added = None

    def nbytes(self, n: int) -> int:
        """Four bytes a value that is sent, in float32."""
        return 4 * math.ceil(n / self.every)

    def encode(self, x: Tensor, generator: torch.Generator, lost: bool) -> Tensor:
        """The chosen values."""
        places, sizes = self._draw(x.shape[1], generator, x.device)
        chosen = x.gather(1, places.expand(len(x), -1))
        code = chosen * sizes if self.unbiased else chosen
        if lost:
            x.scatter_(1, places.expand(len(x), -1), chosen - code)
        return code

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
    fixed: bool = True
    added = None

    @property
    def levels(self) -> int:
        """Steps between zero and the scale."""
        return 2 ** (self.bits - 1) - 1

    def nbytes(self, n: int) -> int:
        """The codes, and four bytes a block."""
        return n * self.bits // 8 + 4 * (n // self.block)

    def encode(self, x: Tensor, generator: torch.Generator, lost: bool) -> Tensor:
        """Scales, then codes. Blocks that are a quarter of a `PART` apart are rounded by the same random numbers."""
        rounding = torch.full((1, self.block), 0.5).to(x)  # what is added before decimals are cut off
        if self.unbiased:
            rounding = torch.rand(PART // 4 // self.block, self.block, generator=generator).repeat(4, 1).to(x)
        rounding += self.levels  # so that codes are not negative

        def part(blocks: Tensor) -> tuple[Tensor, Tensor]:
            scale = blocks.abs().amax(1) if self.norm == "max" else torch.linalg.vector_norm(blocks, dim=1)
            steps = torch.where(scale > 0, self.levels / scale, scale).unsqueeze(1)
            codes = torch.addcmul(rounding[: len(blocks)], blocks, steps).clamp_(min=0)
            codes = codes.to(torch.int16).to(torch.uint8)  # torch has vector code for this way only
            return scale.float(), pack(codes, self.bits)

        return encode_blocks(self, x, part, lost)

    def decode(self, code: Tensor, n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """Code times scale."""
        return decode_blocks(self, code, n, dtype)

    def values(self, scale: Tensor, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """[blocks, block]."""
        codes = unpack(packed, self.bits, self.block).to(dtype)
        return codes.sub_(self.levels).mul_((scale.to(dtype) / self.levels).unsqueeze(1))


@dataclass(frozen=True)
class Sign:
    """One bit a value, and the block's mean magnitude (Bernstein et al. 2018; Karimireddy et al. 2019: with feedback)."""

    block: int = 1024
    bits: int = 1
    carried: Carried = "exchange"
    unbiased: bool = False
    fixed: bool = True
    added = None

    def nbytes(self, n: int) -> int:
        """One bit an element, and four bytes a block."""
        return n // 8 + 4 * (n // self.block)

    def encode(self, x: Tensor, generator: torch.Generator, lost: bool) -> Tensor:
        """Scales, then bits."""

        def part(blocks: Tensor) -> tuple[Tensor, Tensor]:
            bits = blocks.view(torch.int32 if blocks.itemsize == 4 else torch.int64)
            negative = (bits >> (8 * blocks.itemsize - 1)).to(torch.uint8)  # 255 or 0
            return blocks.abs().mean(1).float(), pack(negative & 1, 1)

        return encode_blocks(self, x, part, lost)

    def decode(self, code: Tensor, n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """Plus or minus the scale."""
        return decode_blocks(self, code, n, dtype)

    def values(self, scale: Tensor, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """[blocks, block]."""
        scale = scale.to(dtype).unsqueeze(1)
        return unpack(packed, 1, self.block).to(dtype).mul_(-2 * scale).add_(scale)


PART = 1 << 16
"""Elements that are coded at a time."""


def encode_blocks(
    codec: Quantiser | Sign, x: Tensor, part: Callable[[Tensor], tuple[Tensor, Tensor]], lost: bool
) -> Tensor:
    """Each row's scales, then its packed values. `part` makes both of [blocks, block]."""
    blocks = x.view(-1, codec.block)
    scales = torch.empty(len(blocks), dtype=torch.float32, device=x.device)
    packed = torch.empty(len(blocks), codec.block * codec.bits // 8, dtype=torch.uint8, device=x.device)
    for start in range(0, len(blocks), PART // codec.block):
        here = slice(start, start + PART // codec.block)
        scales[here], packed[here] = part(blocks[here])
        if lost:
            blocks[here] -= codec.values(scales[here], packed[here], x.dtype)
    return torch.cat([scales.view(torch.uint8).view(len(x), -1), packed.view(len(x), -1)], 1)


def decode_blocks(codec: Quantiser | Sign, code: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `encode_blocks`, but for what is lost: [rows, n]."""
    head = 4 * (n // codec.block)
    scales = numbers(code[:, :head], torch.float32).view(-1)
    packed = code[:, head:].reshape(len(scales), -1)
    x = torch.empty(len(scales), codec.block, dtype=dtype, device=code.device)
    for start in range(0, len(scales), PART // codec.block):
        here = slice(start, start + PART // codec.block)
        x[here] = codec.values(scales[here], packed[here], dtype)
    return x.view(len(code), n)


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
    "onebit_adam": lambda c: Sign(),
    "onebit_lamb": lambda c: Sign(),
}
"""Names of `compression.codec` and what they make of the settings."""
