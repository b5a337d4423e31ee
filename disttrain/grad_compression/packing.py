"""Bytes and the numbers in them."""

import torch
from torch import Tensor


def numbers(code: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes read as numbers; copied, since they may begin anywhere."""
    return code.reshape(-1).clone().view(dtype).view(len(code), code.shape[1] // dtype.itemsize)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [blocks, n] of values below 2 ** bits into [blocks, n * bits / 8]: a byte holds values n * bits / 8 apart."""
    parts = codes.view(len(codes), 8 // bits, -1).unbind(1)
    packed = parts[0].clone() if bits < 8 else codes
    for place, part in enumerate(parts[1:], start=1):
        packed |= part << (bits * place)
    return packed


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack`: uint8 [blocks, n]."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device).view(1, -1, 1)
    return ((packed.unsqueeze(1) >> shifts) & (2**bits - 1)).view(-1, n)
