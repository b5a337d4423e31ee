"""BERT's sequences: two segments, masked tokens, next-sentence prediction (Devlin et al. 2019, section 3.1)."""

from dataclasses import dataclass

import numpy as np

from disttrain.data.shards import ShardView, TokenSet
from disttrain.data.tokenizer import Tokenizer

IGNORED = -100
"""Target of a token that is not predicted."""

_SPECIALS = 3  # [CLS] A [SEP] B [SEP]


@dataclass(frozen=True)
class Recipe:
    """How sequences are made."""

    length: int
    mlm_probability: float
    short_sequence_probability: float
    vocab_size: int
    cls: int
    sep: int
    pad: int
    mask: int
    specials: tuple[int, ...]
    """Ids, sorted, that are never put in place of a masked token."""


def recipe(tokenizer: Tokenizer, length: int, mlm_probability: float, short_sequence_probability: float) -> Recipe:
    """The recipe for a tokenizer with cls, sep, pad and mask (ValueError without)."""
    ids = tokenizer.special_ids
    if missing := {"cls", "sep", "pad", "mask"} - set(ids):
        raise ValueError(f"the tokenizer has no {', '.join(sorted(missing))}")
    return Recipe(length, mlm_probability, short_sequence_probability, tokenizer.vocab_size,
                  ids["cls"], ids["sep"], ids["pad"], ids["mask"], tuple(sorted(set(ids.values()))))  # fmt: skip


def sequences(tokens: TokenSet, length: int) -> int:
    """How many sequences a token set gives: one per `length - 3` tokens, up to the start of the last sentence."""
    if not tokens.shards:
        return 0
    last = int(tokens.token_starts[-2]) + int(tokens.shard(len(tokens.shards) - 1).sentences[-1])
    return last // (length - _SPECIALS) + 1


def batch(samples: list[tuple[TokenSet, int, tuple[int, ...]]], recipe: Recipe) -> dict[str, np.ndarray]:
    """The sequences named by (token set, sequence number, key of its random numbers).

    `tokens`, `targets` (-100 where nothing is predicted), `token_types`: int64 [n, length]; `attention_mask`: bool
    [n, length]; `next_sentence`: int64 [n], 0 where B follows A, 1 where it is from elsewhere.
    """
    shape = (len(samples), recipe.length)
    tokens = np.full(shape, recipe.pad, np.int64)
    targets = np.full(shape, IGNORED, np.int64)
    token_types = np.zeros(shape, np.int64)
    attention_mask = np.zeros(shape, bool)
    next_sentence = np.zeros(len(samples), np.int64)
    for row, (token_set, number, key) in enumerate(samples):
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
        a, b, next_sentence[row] = segments(token_set, number, recipe, rng)
        used = len(a) + len(b) + _SPECIALS
        tokens[row, :used] = np.concatenate([[recipe.cls], a, [recipe.sep], b, [recipe.sep]])
        token_types[row, len(a) + 2 : used] = 1
        attention_mask[row, :used] = True
        places = np.concatenate([np.arange(1, len(a) + 1), np.arange(len(a) + 2, used - 1)])
        _mask(tokens[row], targets[row], places, recipe, rng)
    return {"tokens": tokens, "targets": targets, "token_types": token_types, "attention_mask": attention_mask,
            "next_sentence": next_sentence}  # fmt: skip


def segments(token_set: TokenSet, number: int, recipe: Recipe,
             rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int]:  # fmt: skip
    """Segment A, segment B (int64, at least one token each, together at most length - 3) and the next-sentence label.

    Sentences are taken from the first that starts at or after token number * (length - 3), in one document, until
    they fill the sequence (or, now and then, a shorter one). A is some of them; B the rest, or, half the time,
    sentences of another document. A sentence alone in its document is cut in its middle, so that both labels stay
    possible; with one document only, another part of it stands for another document.
    """
    room = recipe.length - _SPECIALS
    short = rng.random() < recipe.short_sequence_probability
    target = int(rng.integers(2, room + 1)) if short else room
    shard, first = _sentence_from(token_set, number * room)
    view = token_set.shard(shard)
    document = int(np.searchsorted(view.documents, view.sentences[first], side="right")) - 1
    begin, stop = _sentences_of(view, document)
    first = max(begin, min(first, stop - 2))  # the last sentence is taken with the one before it
    count = _sentences_for(view, first, stop, target)
    chunk = _sentence_tokens(view, first, first + count)
    if count > 1:
        cut = _token_at(view, first + int(rng.integers(1, count))) - _token_at(view, first)
    else:
        cut = max(1, len(chunk) // 2)
    a, b, label = chunk[:cut], chunk[cut:], 0
    if rng.random() < 0.5 or not len(b):
        wanted = max(1, target - len(a))
        other = _random_segment(token_set, (shard, document), (begin, first, first + count, stop), wanted, rng)
        if other is not None:
            b, label = other, 1
        elif not len(b):
            b = a  # one token is all there is
    a, b = _truncated(a, b, room, rng)
    return a, b, label


def _token_at(view: ShardView, sentence: int) -> int:
    return int(view.sentences[sentence]) if sentence < len(view.sentences) else len(view.tokens)


def _sentence_tokens(view: ShardView, first: int, stop: int) -> np.ndarray:
    return view.tokens[_token_at(view, first) : _token_at(view, stop)].astype(np.int64)


def _sentences_of(view: ShardView, document: int) -> tuple[int, int]:
    begin = int(np.searchsorted(view.sentences, view.documents[document]))
    if document + 1 == len(view.documents):
        return begin, len(view.sentences)
    return begin, int(np.searchsorted(view.sentences, view.documents[document + 1]))


def _sentences_for(view: ShardView, first: int, stop: int, target: int) -> int:
    """How many sentences from `first` give `target` tokens: at least two, where the document has them."""
    enough = int(np.searchsorted(view.sentences[first:stop], _token_at(view, first) + target))
    return min(max(enough, 2), stop - first)


def _sentence_from(token_set: TokenSet, token: int) -> tuple[int, int]:
    """Shard and number in it of the first sentence that starts at or after a token; the set has one."""
    shard, at = token_set.find(token)
    sentence = int(np.searchsorted(token_set.shard(shard).sentences, at))
    return (shard, sentence) if sentence < len(token_set.shard(shard).sentences) else (shard + 1, 0)


def _random_segment(token_set: TokenSet, own: tuple[int, int], taken: tuple[int, int, int, int], wanted: int,
                    rng: np.random.Generator) -> np.ndarray | None:  # fmt: skip
    """About `wanted` tokens from a random sentence of another document on; of this one where there is no other."""
    if token_set.documents > 1:
        pick = int(rng.integers(token_set.documents - 1))
        pick += pick >= int(token_set.document_starts[own[0]]) + own[1]
        shard = int(np.searchsorted(token_set.document_starts, pick, side="right")) - 1
        view = token_set.shard(shard)
        begin, stop = _sentences_of(view, pick - int(token_set.document_starts[shard]))
        start = int(rng.integers(begin, stop))
    else:
        view = token_set.shard(own[0])
        begin, first, after, end = taken
        others = (first - begin) + (end - after)
        if others == 0:
            return None
        start = begin + int(rng.integers(others))
        start, stop = (start, first) if start < first else (start + after - first, end)
    count = int(np.searchsorted(view.sentences[start:stop], _token_at(view, start) + wanted))
    return _sentence_tokens(view, start, start + max(1, count))


def _truncated(a: np.ndarray, b: np.ndarray, room: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Shorten the longer segment until both fit, each token off its front or its back with equal chance."""
    excess = len(a) + len(b) - room
    if excess <= 0:
        return a, b
    keep_a, keep_b = len(a), len(b)
    level = min(excess, abs(keep_a - keep_b))  # first the longer one down to the other, then both in turn
    if keep_a > keep_b:
        keep_a -= level
    else:
        keep_b -= level
    keep_a, keep_b = keep_a - (excess - level) // 2, keep_b - (excess - level + 1) // 2
    return _shortened(a, keep_a, rng), _shortened(b, keep_b, rng)


def _shortened(segment: np.ndarray, keep: int, rng: np.random.Generator) -> np.ndarray:
    front = int(rng.binomial(len(segment) - keep, 0.5))
    return segment[front : front + keep]


def _mask(tokens: np.ndarray, targets: np.ndarray, places: np.ndarray, recipe: Recipe,
          rng: np.random.Generator) -> None:  # fmt: skip
    """Choose what is predicted and hide it, in place: 80 % become mask, 10 % a random ordinary token, 10 % stay."""
    count = max(1, round(len(places) * recipe.mlm_probability))
    chosen = rng.permutation(places)[:count]
    targets[chosen] = tokens[chosen]
    fate = rng.random(count)
    random_ids = rng.integers(recipe.vocab_size - len(recipe.specials), size=count)
    for special in recipe.specials:  # sorted: number k of the ordinary ids is k plus the specials up to it
        random_ids += random_ids >= special
    tokens[chosen] = np.where(fate < 0.8, recipe.mask, np.where(fate < 0.9, random_ids, tokens[chosen]))
