"""Matrices of few values on disk, as Deep Compression stores them (Han et al. 2015, sections 2 to 4).

A matrix is its codebook and the Huffman code of which value each weight has. Where zeros are many, only the others are
coded, with the distance of each from the one before; a distance that is too long is bridged by zeros that are coded.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from disttrain.model_compression import huffman
from disttrain.model_compression.huffman import Coded
from disttrain.model_compression.kmeans import Shared

GAP_BITS = 8
"""Bits of a distance before it is Huffman-coded."""


def written(name: str, shared: Shared) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors of a file, what JSON says of them) of one matrix; the shorter of both forms is taken."""
    dense = {"codes": huffman.encode(shared.codes.ravel(), len(shared.codebook))}
    forms = [dense]
    if (shared.codebook == 0).any():
        forms.append(_sparse(shared))
    best = min(forms, key=lambda parts: sum(coded.nbytes for coded in parts.values()))
    tensors = {f"{name}.codebook": torch.from_numpy(shared.codebook)}
    for part, coded in best.items():
        for leaf, array in (
            ("data", coded.data),
            ("lengths", coded.lengths),
            ("blocks", coded.blocks.astype(np.int64)),
        ):
            tensors[f"{name}.{part}.{leaf}"] = _narrow(array)
    counts = {part: coded.count for part, coded in best.items()}
    return tensors, {"shape": list(shared.codes.shape), "symbols": counts}


def read(name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Shared:
    """The matrix that `written` wrote. Raises KeyError or ValueError for what it did not write."""
    parts = {}
    for part, count in about["symbols"].items():
        data, lengths, blocks = (tensors[f"{name}.{part}.{leaf}"].numpy() for leaf in ("data", "lengths", "blocks"))
        parts[part] = huffman.decode(Coded(data, lengths, blocks, count))
    codebook, shape = tensors[f"{name}.codebook"].numpy(), tuple(about["shape"])
    size = int(np.prod(shape))
    codes = parts["codes"]
    if "gaps" in parts:
        zero = int(np.flatnonzero(codebook == 0)[0])
        whole = np.full(size, zero)
        whole[np.cumsum(parts["gaps"] + 1) - 1] = codes
        codes = whole
    if codes.size != size or (size and codes.max() >= len(codebook)):
        raise ValueError(f"{name} has {codes.size} codes, and its shape {shape} takes {size}")
    return Shared(codebook, codes.reshape(shape))


def _sparse(shared: Shared) -> dict[str, Coded]:
    """Codes of what is not zero, and of the zeros that bridge a long distance; and how many zeros are before each."""
    zero, flat = int(np.flatnonzero(shared.codebook == 0)[0]), shared.codes.ravel()
    places = np.flatnonzero(flat != zero)
    gaps = np.diff(places, prepend=-1) - 1
    bridges, left = np.divmod(gaps, 1 << GAP_BITS)
    last = np.cumsum(bridges + 1) - 1
    all_gaps = np.full(int(last[-1]) + 1 if len(last) else 0, (1 << GAP_BITS) - 1)
    codes = np.full(len(all_gaps), zero)
    all_gaps[last], codes[last] = left, flat[places]
    return {"codes": huffman.encode(codes, len(shared.codebook)), "gaps": huffman.encode(all_gaps, 1 << GAP_BITS)}


def _narrow(array: np.ndarray) -> Tensor:
    """A tensor, int32 in place of int64 where that is enough."""
    if array.dtype == np.int64 and (not array.size or array.max() < 1 << 31):
        array = array.astype(np.int32)
    return torch.from_numpy(np.ascontiguousarray(array))
