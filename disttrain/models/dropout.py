"""Dropout (Srivastava et al. 2014) without random state: every mask is a pure function of what it falls on.

An element is dropped by an integer hash of (the sample's seed, the layer's site, position, feature), for attention
weights of (seed, site, head, query, key). Counter-based random numbers in the sense of Salmon et al. 2011. So a mask
does not depend on how a batch is cut into micro-batches, sequences into chunks or heads over ranks, nor on device,
dtype, recomputation or resume.

A row (sample and position; sample, head and query) and a column (feature; key) are mixed well in 64 bits, which is
cheap since they are few. An element then costs three multiplications of 32 bits and two shifts on the xor of the two.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Keys(NamedTuple):
    """What the masks of one batch depend on, beside the site of each layer."""

    seeds: Tensor | None
    """int64 [B]: one of each sample; None where nothing is dropped."""
    positions: Tensor
    """int64 [S]: place of each token in the whole sequence."""


class WeightDropout(NamedTuple):
    """Dropout of the attention weights [B, A, Sq, Sk] of some heads, queries and keys."""

    p: float
    rows: Tensor
    """int64 [B]: the samples' seeds mixed with the site, by `at_site`."""
    heads: Tensor
    """int64 [A]: number of each head among all heads of the layer."""
    queries: Tensor
    """int64 [Sq]: positions in the whole sequence."""
    keys: Tensor
    """int64 [Sk]: positions in the whole sequence."""

    def kept(self) -> Tensor:
        """bool [B, A, Sq, Sk], False where dropped."""
        rows = _mix(_mix(self.rows[:, None] + _mix(self.heads))[..., None] + _mix(self.queries))
        return _kept(rows, _mix(self.keys ^ _COLUMN), self.p)

    def factors(self, dtype: torch.dtype) -> Tensor:
        """[B, A, Sq, Sk]: 0 where dropped, 1 / (1 - p) where kept."""
        return self.kept().to(dtype).mul_(1 / (1 - self.p))

    def apply(self, weights: Tensor) -> Tensor:
        """weights [B, A, Sq, Sk] times the factors; a backward pass needs the bool mask alone."""
        return _drop(weights, self.kept(), self.p)


class Dropout(nn.Module):
    """Dropout of hidden states; `site` numbers the dropout layers of a model, each its own."""

    def __init__(self, p: float, site: int):
        super().__init__()
        self.p = _probability(p)
        self.site: int | Tensor = site
        self.part: tuple[int, int] = (0, 1)
        """(i, n): x holds chunk i of the n equal chunks of the keys' positions (sequence parallelism)."""

    def forward(self, x: Tensor, keys: Keys | None) -> Tensor:
        """x [B, S, H] -> [B, S, H]; x [B, H] belongs to the first position. The identity in eval mode or at p = 0.

        Raises ValueError when it should drop and has no keys.
        """
        if not self.training or self.p == 0:
            return x
        seeds, positions = _needed(keys, self.p)
        index, parts = self.part
        positions = positions[:1] if x.ndim == 2 else positions.chunk(parts)[index]
        rows = _mix(at_site(seeds, self.site)[:, None] + _mix(positions))
        features = torch.arange(x.shape[-1], device=x.device)
        return _drop(x, _kept(rows, _mix(features ^ _COLUMN), self.p).view(x.shape), self.p)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"p={self.p}, site={self.site}"


class WordDropout(nn.Module):
    """Embedding dropout (Gal and Ghahramani 2016, section 4.2): whole words of the vocabulary are dropped, a sequence each.

    A word that is dropped in a sequence is so at all its places there, and other sequences drop other words: rows of the
    embedding matrix are dropped, not places of a text. Its mask is a function of (the sample's seed, site, word).
    """

    def __init__(self, p: float, site: int):
        super().__init__()
        self.p, self.site = _probability(p), site

    def forward(self, x: Tensor, tokens: Tensor, keys: Keys | None) -> Tensor:
        """Embedded words x [B, S, H] of tokens int64 [B, S] -> [B, S, H]. The identity in eval mode or at p = 0.

        Raises ValueError when it should drop and has no keys.
        """
        if not self.training or self.p == 0:
            return x
        seeds, _ = _needed(keys, self.p)
        rows = _mix(at_site(seeds, self.site)[:, None] + _mix(tokens))
        return _drop(x, _kept(rows, _mix(tokens.new_tensor([_COLUMN])), self.p), self.p)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"p={self.p}, site={self.site}"


class LockedDropout(nn.Module):
    """Variational dropout of recurrent networks (Gal and Ghahramani 2016, section 4.1): one mask for all positions.

    Its mask is a function of (the sample's seed, site, feature). Between layers call it; within a recurrence multiply the
    hidden state of each step by `factors`, taken once a sequence.
    """

    def __init__(self, p: float, site: int):
        super().__init__()
        self.p, self.site = _probability(p), site

    def forward(self, x: Tensor, keys: Keys | None) -> Tensor:
        """x [B, S, H] -> [B, S, H], whatever positions it holds. The identity in eval mode or at p = 0.

        Raises ValueError when it should drop and has no keys.
        """
        if not self.training or self.p == 0:
            return x
        return _drop(x, self._mask(x.shape[-1], keys)[:, None], self.p)

    def factors(self, x: Tensor, keys: Keys | None) -> Tensor:
        """For a state x [B, H]: 0 where dropped, 1 / (1 - p) where kept, in its type. Ones in eval mode or at p = 0."""
        if not self.training or self.p == 0:
            return torch.ones_like(x)
        return self._mask(x.shape[-1], keys).to(x.dtype).mul_(1 / (1 - self.p))

    def _mask(self, features: int, keys: Keys | None) -> Tensor:
        rows = at_site(_needed(keys, self.p)[0], self.site)
        return _kept(rows, _mix(torch.arange(features, device=rows.device) ^ _COLUMN), self.p)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"p={self.p}, site={self.site}"


def at_site(seeds: Tensor, site: int | Tensor) -> Tensor:
    """The samples' seeds int64 [B] mixed with a site's number, or with what `as_tensor` made of it; int64 [B]."""
    return _mix(seeds + (_salt(site) if isinstance(site, int) else site))


def as_tensor(site: int) -> Tensor:
    """A site for a module that is compiled: torch.compile makes one graph for each value of an integer attribute."""
    return torch.tensor(_salt(site), device="cpu")


def _probability(p: float) -> float:
    if not 0 <= p < 1:
        raise ValueError(f"dropout={p} is outside 0 to below 1")
    return p


def _needed(keys: Keys | None, p: float) -> tuple[Tensor, Tensor]:
    if keys is None or keys.seeds is None:
        raise ValueError(f"dropout={p} while training needs keys: the batch has no dropout_seeds")
    return keys.seeds, keys.positions


def _salt(site: int) -> int:
    return _signed(site * _STEP + _SITE)


def _signed(number: int) -> int:
    """The int64 that a Python integer wraps to."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


_STEP = _signed(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio: the increment of SplitMix64
_SITE, _COLUMN = _signed(0xD1B54A32D192ED03), _signed(0xABC98388FB8FAC03)  # keep sites and columns apart from rows
_ROUND1, _ROUND2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele et al. 2014) of int64 numbers.

    torch.compile must not look inside: its C++ for a CPU multiplies signed numbers, and where it sees an arange the
    compiler concludes that the product overflows and may make of it what it likes. That gave other masks.
    """
    return _opaque_mix(x) if torch.compiler.is_compiling() else _finalise(x)


def _finalise(x: Tensor) -> Tensor:
    x = x + _STEP  # 0 would stay 0
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _ROUND1  # shifts of signed numbers are arithmetic: mask what they bring
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _ROUND2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


@torch.library.custom_op("disttrain::mix", mutates_args=())
def _opaque_mix(x: Tensor) -> Tensor:
    return _finalise(x)


@_opaque_mix.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _kept(rows: Tensor, columns: Tensor, p: float) -> Tensor:
    """Mixed int64 rows [...] and columns [C] -> bool [..., C], False with probability p.

    The shifts are arithmetic, so x and ~x meet in the same hash: harmless here, and it saves a mask each.
    """
    x = (rows >> 32).to(torch.int32)[..., None] ^ (columns >> 32).to(torch.int32)
    x *= 0x7FEB352D
    x ^= x >> 16
    x *= 0x2C1B3C6D
    x ^= x >> 15
    x *= 0x297A2D39
    return x >= min(round(p * (1 << 32)) - (1 << 31), (1 << 31) - 1)


def _drop(x: Tensor, kept: Tensor, p: float) -> Tensor:
    return torch.where(kept, x * (1 / (1 - p)), 0.0)
