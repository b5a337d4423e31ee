"""When a rank holds most in a step, and what: memory at the few moments at which it can be at its peak. No torch.

Gradients come while activations go, gathered weights are there for a while, and buffers of communication for a moment: the
sum of all of them is never there. The moments, of a rank with as many activations in flight as its schedule allows:

    head    the backward pass of the head begins: logits and their gradient
    block   the backward pass of the last block begins, with the gradient of the head's weight
    end     that of the first block begins: all gradients are there, but of one micro-batch only a block's activations
    embedding    the gradients of the embedding, and of the weight it shares with the head, are added up
    sum     gradients of a pipeline are summed over the data ranks, in flat copies

Numbers may be arrays of numpy, for many layouts at once. Letters: w and c bytes of an element of a master weight and of what
is multiplied.
"""

from typing import Any, NamedTuple

import numpy as np

from disttrain.costs import ActivationBytes

Number = Any
"""A float, or an array of them."""


class Parameters(NamedTuple):
    """Elements of the parameters of one rank."""

    whole: Number
    """Of all its stages."""
    held: Number
    """What ZeRO leaves of them."""
    block: Number
    """Of one block, norms apart: what is gathered, or copied in low precision."""
    blocks: Number
    """Blocks of all its stages."""
    longest: Number
    """Blocks of its longest stage."""
    rest: Number
    """Outside blocks."""
    head: Number
    """Of the matrices of the head, where it has it."""
    embedding: Number
    """Of the token embedding, where it has it."""
    tied: bool
    """Whether one stage has both, which share their weight."""
    largest: Number
    """Of the largest matrix of a block."""


class Sharing(NamedTuple):
    """What a layout does with parameters, their gradients and hidden states."""

    zero: Number
    accumulates: Number
    """A step has several micro-batches."""
    replicated: bool
    """Several ranks sum their gradients."""
    pipelined: bool
    passing: Number
    """Bytes of hidden states between two stages, of one micro-batch."""
    undecided: Number = 0
    """Bytes of new residuals beside the old ones, until it is known whether a step counts."""


class InFlight(NamedTuple):
    """Activations that a pipeline rank holds at most."""

    chunks: Number
    """Of one micro-batch in one stage each; 1 without a pipeline."""
    heads: Number
    """Of the head."""
    again: Number
    """Share of its stages whose gradients are there already when there are as many."""
    end: Number
    """Chunks when the last of its stages gets its gradients."""
    late: Number
    """Chunks when the gradients of weights of most of them have to wait."""
    waiting: Number
    """Of these: chunks whose gradients of inputs are known, and of weights not yet."""


class Moment(NamedTuple):
    """Bytes beside weights, optimizer and what else is always there."""

    gradients: Number
    copies: Number
    """In low precision, or gathered."""
    activations: Number
    buffers: Number

    @property
    def total(self) -> Number:
        """All of them."""
        return sum(self)


def moments(
    parameters: Parameters, sharing: Sharing, flight: InFlight, block: ActivationBytes, head: ActivationBytes,
    wide: int, narrow: int,
) -> dict[str, Moment]:  # fmt: skip
    """By name. `block` and `head` are of one micro-batch, `wide` and `narrow` w and c."""
    p, zero = parameters, sharing.zero
    ddp = sharing.replicated and not sharing.pipelined
    buckets = wide * p.whole * (zero == 0) * ddp
    # DDP's gradients are views of its buckets, but while they are added up over micro-batches
    whole = np.where((zero == 0) | ((zero == 1) & sharing.accumulates), p.whole, p.held)
    own = wide * whole * ((zero > 0) | sharing.accumulates | (not ddp))
    before = buckets + own * flight.again
    scatters = (zero > 1) | ((zero == 1) & ~np.asarray(sharing.accumulates))
    others = np.maximum(flight.heads - 1, 0)
    most, fewer = (_held(p, flight, chunks, block, head) for chunks in (flight.chunks, flight.end - 1))
    has_head = flight.heads > 0
    # what a stage has handed on is held until its backward pass, and a gradient comes or goes
    passing = sharing.passing * sharing.pipelined * (flight.chunks - flight.heads + 1)
    found = {
        "head": Moment(
            before,
            _copies(p, zero, flight.chunks, flight.heads, 0, wide, narrow),
            most + flight.heads * head.saved + np.maximum(head.working, narrow * p.head) * has_head,
            passing + wide * p.rest * (zero > 1) * sharing.accumulates,
        ),
        "block": Moment(
            before,
            _copies(p, zero, flight.chunks, others, 1, wide, narrow),
            most + others * head.saved + block.working * (p.blocks > 0),
            passing + wide * p.head * p.tied + _in_a_block(p, zero, scatters, sharing.accumulates, wide, narrow),
        ),
        "end": Moment(
            buckets + own,
            _copies(p, zero, flight.end - 1, others, 1, wide, narrow),
            fewer + others * head.saved + (block.saved + block.working) * (p.blocks > 0),
            passing + wide * p.head * p.tied + _in_a_block(p, zero, scatters, sharing.accumulates, wide, narrow)
            + sharing.undecided,
        ),
        "embedding": Moment(
            buckets + own,
            _copies(p, zero, flight.end - 1, others, 0, wide, narrow),
            fewer + others * head.saved,
            passing + wide * (p.embedding * (1 + 2 * p.tied) + p.rest * scatters) + sharing.undecided,
        ),
        "sum": Moment(
            buckets + own, 0, 0,
            wide * p.whole * (zero == 0) * (sharing.replicated and sharing.pipelined) + sharing.undecided,
        ),
    }  # fmt: skip
    return found


def _held(p: Parameters, flight: InFlight, chunks: Number, block: ActivationBytes, head: ActivationBytes) -> Number:
    """Activations of so many chunks, or of fewer with the gradients for which weights wait, whichever is more."""
    late = p.longest * (np.minimum(chunks, flight.late) * block.saved + flight.waiting * block.deferred)
    return np.maximum(chunks * p.longest * block.saved, late + np.minimum(flight.waiting, flight.heads) * head.deferred)


def _copies(p: Parameters, zero: Number, chunks: Number, heads: Number, at_once: int, wide: int, narrow: int) -> Number:
    """In low precision autocast copies weights in every forward pass, and keeps them for its backward pass. ZeRO gathers
    blocks in the type of products, all of them in stages 1 and 2, and the rest in the master type."""
    low = narrow if narrow < wide else 0
    cast = low * heads * p.head
    gathered = np.where(zero == 3, np.minimum(at_once, p.blocks), p.blocks) * p.block
    return np.where(zero == 0, low * chunks * p.longest * p.block + cast, narrow * gathered + wide * p.rest + cast)


def _in_a_block(p: Parameters, zero: Number, scatters: Number, accumulates: Number, wide: int, narrow: int) -> Number:
    """The gradient of a matrix before it is added up; under ZeRO those of the block, what of the last one (or of what is
    outside blocks, in the micro-batch before) is being scattered, and in stage 3 what is on its way for the next one."""
    scattered = wide * np.maximum(p.block * (p.blocks > 1), p.rest * accumulates * (zero > 1)) * scatters
    return np.where(zero == 0, narrow * p.largest, narrow * p.block * (1 + (zero == 3)) + scattered)
