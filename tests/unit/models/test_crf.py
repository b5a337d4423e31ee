"""The CRF against every sequence of tags written out, in float64."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from disttrain.models.crf import CRF, Allowed, allowed_transitions
from disttrain.models.cross_entropy import IGNORED
from disttrain.models.losses import focal

B, S, T = 6, 5, 4
IOB2 = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
BIOES = ["O", "B-X", "I-X", "E-X", "S-X", "B-Y", "E-Y"]


def crf(tags: int = T, allowed: Allowed | None = None, seed: int = 0) -> CRF:
    found = CRF(tags, allowed).double()
    with torch.no_grad():
        for i, parameter in enumerate(found.parameters()):
            generator = torch.Generator().manual_seed(seed + i)
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return found


def batch(tags: int = T, seed: int = 7) -> tuple[Tensor, Tensor]:
    """Emissions, and tags: a whole row, two that end early, one of a single tag, one with gaps, one empty."""
    generator = torch.Generator().manual_seed(seed)
    emissions = 2 * torch.randn(B, S, tags, generator=generator, dtype=torch.float64)
    gold = torch.randint(0, tags, (B, S), generator=generator)
    gold[1, 3:] = gold[2, 2:] = gold[3, 1:] = gold[4, [0, 2]] = gold[5] = IGNORED
    return emissions.requires_grad_(), gold


def paths(model: CRF, emissions: Tensor) -> dict[tuple[int, ...], float]:
    """Score of every sequence of tags that is allowed, for emissions [n, T]."""
    n, tags = emissions.shape
    x, trans = emissions.tolist(), model.transitions.tolist()
    start, end = model.start.tolist(), model.end.tolist()
    every, found = itertools.product(range(tags), repeat=n), {}
    if model.allowed is not None:
        may, first, last = (rule.tolist() for rule in model.allowed)
        legal = [path for path in every if first[path[0]] and last[path[-1]]]
        every = [path for path in legal if all(may[i][j] for i, j in itertools.pairwise(path))]
    for path in every:
        score = start[path[0]] + end[path[-1]] + sum(x[t][y] for t, y in enumerate(path))
        found[path] = score + sum(trans[i][j] for i, j in itertools.pairwise(path))
    return found


def log_sum(scores) -> float:
    scores = list(scores)
    top = max(scores)
    return top + math.log(math.fsum(math.exp(score - top) for score in scores))


def test_by_hand():
    """Two tags, two positions, all scores 0 but a transition of log 3 from 0 to 1: 0 1 has the probability 3 / 6."""
    model = CRF(2).double()
    with torch.no_grad():
        model.transitions[0, 1] = math.log(3)
    emissions = torch.zeros(1, 2, 2, dtype=torch.float64)
    assert model(emissions, torch.tensor([[0, 1]])).sum.item() == pytest.approx(math.log(2), rel=1e-12)
    assert model(emissions, torch.tensor([[1, 1]])).sum.item() == pytest.approx(math.log(6), rel=1e-12)
    assert model.decode(emissions).tolist() == [[0, 1]]
    torch.testing.assert_close(
        model.log_marginals(emissions).exp(), torch.tensor([[[4 / 6, 2 / 6], [2 / 6, 4 / 6]]], dtype=torch.float64)
    )


@pytest.mark.parametrize("scheme", [None, "IOB2", "BIOES"])
def test_equals_every_sequence_written_out(scheme):
    labels = {None: list("abcd"), "IOB2": IOB2, "BIOES": BIOES}[scheme]
    model = crf(len(labels), allowed_transitions(labels, scheme) if scheme else None)
    emissions, gold = batch(len(labels))
    decoded = model.decode(emissions, gold != IGNORED)
    marginals = model.log_marginals(emissions, gold != IGNORED).exp()
    gold = decoded if scheme else gold  # a sequence that the scheme allows
    likelihoods = model.log_likelihood(emissions, gold)
    for row in range(B):
        here = (gold[row] != IGNORED).nonzero().flatten()
        if not len(here):
            assert likelihoods[row] == 0 and (decoded[row] == IGNORED).all()
            continue
        scores = paths(model, emissions.detach()[row, here])
        total = log_sum(scores.values())
        mine = tuple(gold[row, here].tolist())
        assert likelihoods[row].item() == pytest.approx(scores[mine] - total, rel=1e-10, abs=1e-10)
        assert tuple(decoded[row, here].tolist()) == max(scores, key=lambda path: scores[path])
        assert (decoded[row] == IGNORED).sum() == S - len(here)
        for t, place in enumerate(here):
            for tag in range(len(labels)):
                some = [math.exp(score - total) for path, score in scores.items() if path[t] == tag]
                assert marginals[row, place, tag].item() == pytest.approx(math.fsum(some), rel=1e-9, abs=1e-12)


def test_gradients_are_derivatives():
    model = crf(3)
    emissions, gold = (x[[1, 4, 5]] for x in batch(3))
    parameters = list(model.parameters())

    def loss(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (x, gold)).sum

    names = [name for name, _ in model.named_parameters()]
    assert torch.autograd.gradcheck(loss, (emissions, *parameters))
    mask = gold != IGNORED
    assert torch.autograd.gradcheck(lambda x: focal(model.log_marginals(x, mask)[mask], gold[mask]).sum, (emissions,))


def test_gradient_by_emissions_is_expected_minus_observed():
    model, (emissions, gold) = crf(), batch()
    (gradient,) = torch.autograd.grad(model(emissions, gold).sum, emissions)
    mask = gold != IGNORED
    observed = torch.nn.functional.one_hot(gold.where(mask, 0), T)
    expected = (model.log_marginals(emissions, mask).exp() - observed).where(mask[..., None], 0)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_probabilities_of_all_sequences_sum_to_one():
    model, (emissions, _) = crf(), batch()
    every = torch.tensor(list(itertools.product(range(T), repeat=S)))
    log_p = model.log_likelihood(emissions[:1].expand(len(every), S, T), every)
    assert log_p.exp().sum().item() == pytest.approx(1, rel=1e-12)


def test_parts_of_a_batch_add_up_and_padding_changes_nothing():
    model, (emissions, gold) = crf(), batch()
    whole = model(emissions, gold)
    assert whole.count == (gold != IGNORED).sum() == 14
    one, two = model(emissions[:2], gold[:2]), model(emissions[2:], gold[2:])
    torch.testing.assert_close(one.sum + two.sum, whole.sum, rtol=1e-12, atol=0)
    assert one.count + two.count == whole.count
    more = torch.cat([emissions, torch.full((B, 3, T), 1e6, dtype=torch.float64)], 1)
    padded = torch.cat([gold, torch.full((B, 3), IGNORED)], 1)
    torch.testing.assert_close(model(more, padded).sum, whole.sum, rtol=1e-12, atol=0)
    assert torch.equal(model.decode(more, padded != IGNORED)[:, :S], model.decode(emissions, gold != IGNORED))
    (gradient,) = torch.autograd.grad(model(more, padded).sum, emissions)
    assert gradient[gold == IGNORED].count_nonzero() == 0


def test_without_transitions_it_is_cross_entropy():
    model, (emissions, gold) = CRF(T).double(), batch()
    expected = torch.nn.functional.cross_entropy(emissions.flatten(0, 1), gold.flatten(), reduction="sum")
    torch.testing.assert_close(model(emissions, gold).sum, expected, rtol=1e-12, atol=0)
    assert torch.equal(model.decode(emissions), emissions.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_has_float32s_accuracy(dtype: torch.dtype):
    model = crf(len(IOB2), allowed_transitions(IOB2, "IOB2"))
    emissions, gold = batch(len(IOB2))
    gold = model.decode(emissions, gold != IGNORED)
    half = (20 * emissions.detach()).to(dtype).requires_grad_()
    single = crf(len(IOB2), model.allowed).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = single(half, gold).sum
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(model(half.double(), gold).sum.item(), rel=1e-5, abs=1e-4)
    (gradient,) = torch.autograd.grad(found, half)
    assert gradient.dtype == dtype and gradient.isfinite().all()


def test_what_schemes_allow():
    def pairs(labels: list[str], scheme) -> set[tuple[str, str]]:
        allowed = allowed_transitions(labels, scheme)
        names = [(a, b) for a in labels for b in labels if allowed.transitions[labels.index(a), labels.index(b)]]
        return (
            {("", b) for b, ok in zip(labels, allowed.start, strict=True) if ok}
            | set(names)
            | {(a, "") for a, ok in zip(labels, allowed.end, strict=True) if ok}
        )

    iob = pairs(IOB2, "IOB2")
    everywhere = {(a, b) for a in [*IOB2, ""] for b in ("O", "B-PER", "B-LOC")}
    inside = {(f"{a}-{kind}", f"I-{kind}") for a in "BI" for kind in ("PER", "LOC")}
    assert iob == everywhere | inside | {(a, "") for a in IOB2}
    bioes = pairs(BIOES, "BIOES")
    outside = {(a, b) for a in ("", "O", "E-X", "S-X", "E-Y") for b in ("", "O", "B-X", "S-X", "B-Y")} - {("", "")}
    assert bioes == outside | {("B-X", "I-X"), ("B-X", "E-X"), ("I-X", "I-X"), ("I-X", "E-X"), ("B-Y", "E-Y")}


@pytest.mark.parametrize(("label", "scheme"), [("E-PER", "IOB2"), ("PER", "BIOES"), ("B-", "IOB2"), ("BI-X", "IOB2")])
def test_labels_of_no_scheme_are_refused(label: str, scheme):
    with pytest.raises(ValueError, match=label):
        allowed_transitions(["O", label], scheme)
    with pytest.raises(ValueError, match="2 tags"):
        CRF(3, allowed_transitions(["O", "B-X"], "IOB2"))


def test_it_learns_the_transitions_of_a_chain():
    """Tags alternate whatever the emissions say: a CRF learns it, a tagger without transitions cannot."""
    model = CRF(2)
    gold = (torch.arange(12) % 2).expand(4, 12)
    emissions = torch.randn(4, 12, 2, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.3)
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(emissions, gold)
        (loss.sum / loss.count).backward()
        optimizer.step()
    assert torch.equal(model.decode(emissions), gold) and not torch.equal(emissions.argmax(-1), gold)
