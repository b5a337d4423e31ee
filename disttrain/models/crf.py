"""A linear-chain conditional random field over tags (Lafferty et al. 2001; for taggers Lample et al. 2016, section 2.2).

The score of tags y of a sequence with emissions x is start[y_1] + sum of x[t, y_t] + sum of transitions[y_t, y_t+1] +
end[y_n], and its probability exp(score) over the sum for all sequences of tags.

Shapes: B batch, S sequence, T tags. Everything is computed in float32 (float64 for float64 emissions), in log space, at
once for a batch, with a loop over positions only. Bfloat16 emissions give the numbers of the rounded emissions.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from disttrain.models.cross_entropy import IGNORED
from disttrain.models.layers import LossSum
from disttrain.models.losses import widened

Scheme = Literal["IOB2", "BIOES"]

FORBIDDEN = -1e4
"""Score of a transition that the scheme does not allow: exp of it is 0, and its gradient is a number."""


class Allowed(NamedTuple):
    """Which tags may follow each other, begin and end a sequence; on the CPU."""

    transitions: Tensor
    """bool [T, T], from row to column."""
    start: Tensor
    """bool [T]."""
    end: Tensor
    """bool [T]."""


def allowed_transitions(labels: Sequence[str], scheme: Scheme) -> Allowed:
    """What a tag scheme allows between labels O and B-, I- (IOB2), E-, S- (BIOES) before a type, B-PER say.

    IOB2 (Tjong Kim Sang and Veenstra 1999): I- only after B- or I- of its type. BIOES (Ratinov and Roth 2009): B- and I-
    only before I- or E- of their type, which come nowhere else; S- is a chunk of one word. Raises ValueError for a label
    that is not of the scheme.
    """
    parts = [_parts(label, scheme) for label in labels]
    begins = torch.tensor([prefix in "OBS" for prefix, _ in parts], device="cpu")
    ends = torch.tensor([scheme == "IOB2" or prefix in "OES" for prefix, _ in parts], device="cpu")
    goes_on = torch.tensor([[one[1] == two[1] and one[0] in "BI" and two[0] in "IE" for two in parts] for one in parts],
                           device="cpu")  # fmt: skip
    return Allowed((ends[:, None] & begins) | goes_on, begins, ends)


def _parts(label: str, scheme: Scheme) -> tuple[str, str]:
    prefix, dash, kind = label.partition("-")
    if label == "O":
        return "O", ""
    if not (dash and kind and prefix in tuple("BI" if scheme == "IOB2" else "BIES")):
        raise ValueError(f"{label!r} is not a label of {scheme}: it is neither O nor a prefix, a dash and a type")
    return prefix, kind


class CRF(nn.Module):
    """Transition scores and what follows from them. They start at zero, where every sequence is judged by emissions alone.

    Positions without a tag (padding, word pieces after a word's first, [CLS]) may be anywhere: the chain goes over the
    others in their order. With `allowed` a sequence that breaks the scheme has a score of about -10,000, so that it is
    never decoded and has no probability; training tags must keep to the scheme.
    """

    def __init__(self, tags: int, allowed: Allowed | None = None):
        super().__init__()
        if allowed is not None and len(allowed.start) != tags:
            raise ValueError(f"{len(allowed.start)} tags may be allowed, but there are {tags}")
        self.allowed = allowed
        self.transitions = nn.Parameter(torch.zeros(tags, tags))
        self.start = nn.Parameter(torch.zeros(tags))
        self.end = nn.Parameter(torch.zeros(tags))

    def forward(self, emissions: Tensor, tags: Tensor) -> LossSum:
        """Negative log-likelihood of tags int64 [B, S] given emissions [B, S, T], nats; -100 is no tag.

        Summed over sequences; the count is of tags, so that the mean is in nats per tag as cross-entropy's is. Sum
        `log_likelihood` for a mean over sequences.
        """
        return LossSum(-self.log_likelihood(emissions, tags).sum(), (tags != IGNORED).sum())

    def log_likelihood(self, emissions: Tensor, tags: Tensor) -> Tensor:
        """log p of each sequence's tags int64 [B, S], -100 where there is none, given emissions [B, S, T]: nats, [B].

        0 for a sequence without tags.
        """
        chain = _chain(emissions, tags != IGNORED)
        scores = self._scores(chain.emissions.dtype)
        last = _alphas(chain, scores)[-1]
        found = _score(chain, scores, tags.gather(1, chain.order)) - (last + scores.end).logsumexp(1)
        return found.where(chain.lengths > 0, 0)

    def log_marginals(self, emissions: Tensor, mask: Tensor | None = None) -> Tensor:
        """log p(y_t | x) of every tag at every position by the forward-backward algorithm: [B, S, T] -> [B, S, T].

        Losses of single tags (focal, GHM) take them for logits. mask, bool [B, S], is True where there is a tag; a
        uniform distribution stands elsewhere.
        """
        mask = _all(emissions) if mask is None else mask
        chain = _chain(emissions, mask)
        scores = self._scores(chain.emissions.dtype)
        alphas, betas = _alphas(chain, scores), _betas(chain, scores)
        norm = (alphas[-1] + scores.end).logsumexp(1)[:, None, None]
        marginals = (torch.stack(alphas, 1) + torch.stack(betas, 1)) - norm
        order = chain.order[..., None].expand_as(marginals)
        placed = torch.zeros_like(marginals).scatter(1, order, marginals)
        return placed.where(mask[..., None], -math.log(emissions.shape[2]))

    @torch.no_grad()
    def decode(self, emissions: Tensor, mask: Tensor | None = None) -> Tensor:
        """The likeliest tags (Viterbi 1967): emissions [B, S, T] -> int64 [B, S], -100 where the mask, bool, is False."""
        mask = _all(emissions) if mask is None else mask
        chain = _chain(emissions, mask)
        scores = self._scores(chain.emissions.dtype)
        best, pointers = scores.start + chain.emissions[:, 0], []
        here = torch.arange(emissions.shape[2], device=emissions.device).expand_as(best)
        for t in range(1, emissions.shape[1]):
            step, came_from = (best[:, :, None] + scores.transitions).max(1)
            inside = (t < chain.lengths)[:, None]
            best = torch.where(inside, step + chain.emissions[:, t], best)
            pointers.append(torch.where(inside, came_from, here))
        path = [(best + scores.end).argmax(1)]
        for pointer in reversed(pointers):
            path.append(pointer.gather(1, path[-1][:, None]).squeeze(1))
        tags = torch.stack(path[::-1], 1)
        return torch.zeros_like(tags).scatter(1, chain.order, tags).where(mask, IGNORED)

    def _scores(self, dtype: torch.dtype) -> "_Scores":
        found = _Scores(*(p.to(dtype) for p in (self.transitions, self.start, self.end)))
        if self.allowed is None:
            return found
        pairs = zip(found, self.allowed, strict=True)
        return _Scores(*(s.masked_fill(~allowed.to(s.device), FORBIDDEN) for s, allowed in pairs))


class _Scores(NamedTuple):
    transitions: Tensor
    start: Tensor
    end: Tensor


class _Chain(NamedTuple):
    """A batch whose positions with a tag come first."""

    emissions: Tensor
    order: Tensor
    """int64 [B, S]: where each position comes from."""
    lengths: Tensor


def _all(emissions: Tensor) -> Tensor:
    return torch.ones(emissions.shape[:2], dtype=torch.bool, device=emissions.device)


def _chain(emissions: Tensor, mask: Tensor) -> _Chain:
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
    return _Chain(widened(emissions).gather(1, order[..., None].expand_as(emissions)), order, mask.sum(1))


def _alphas(chain: _Chain, scores: _Scores) -> list[Tensor]:
    """log of the summed exp(scores) of all beginnings that end in each tag, [B, T] for each position.

    Beyond its end a sequence keeps its last ones.
    """
    alphas = [scores.start + chain.emissions[:, 0]]
    for t in range(1, chain.emissions.shape[1]):
        step = (alphas[-1][:, :, None] + scores.transitions).logsumexp(1) + chain.emissions[:, t]
        alphas.append(torch.where((t < chain.lengths)[:, None], step, alphas[-1]))
    return alphas


def _betas(chain: _Chain, scores: _Scores) -> list[Tensor]:
    """The same of all continuations after each tag."""
    betas = [scores.end.expand_as(chain.emissions[:, 0])]
    for t in range(chain.emissions.shape[1] - 1, 0, -1):
        step = (scores.transitions + (chain.emissions[:, t] + betas[-1])[:, None]).logsumexp(2)
        betas.append(torch.where((t < chain.lengths)[:, None], step, betas[-1]))
    return betas[::-1]


def _score(chain: _Chain, scores: _Scores, tags: Tensor) -> Tensor:
    """Scores [B] of tags [B, S] in the chain's order."""
    real = torch.arange(tags.shape[1], device=tags.device) < chain.lengths[:, None]
    tags = tags.where(real, 0)
    emitted = chain.emissions.gather(2, tags[..., None]).squeeze(2).where(real, 0)
    moved = scores.transitions[tags[:, :-1], tags[:, 1:]].where(real[:, 1:], 0)
    last = tags.gather(1, (chain.lengths - 1).clamp(min=0)[:, None]).squeeze(1)
    return scores.start[tags[:, 0]] + emitted.sum(1) + moved.sum(1) + scores.end[last]
