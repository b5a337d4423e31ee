"""ELMo: each direction sees its own side only, the loss by hand, the mixture of layers, the highway, the characters."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from disttrain.models.elmo import (
    BEGIN,
    END,
    PADDING,
    ELMo,
    ElmoConfig,
    Highway,
    ScalarMix,
    character_ids,
    reversed_places,
    targets_of,
)

SENTENCES = [["The", "cat", "sat", "é", "."], ["a", "dog", "barked"], ["yes"]]
LENGTHS = torch.tensor([5, 3, 1])
V = 9
SMALL = ElmoConfig(
    vocab_size=V, hidden_size=6, cell_size=10, character_size=4, filters=((1, 3), (2, 5)), highways=2, word_length=8,
    dropout=0.0,
)  # fmt: skip


def elmo(**changes: object) -> ELMo:
    torch.manual_seed(0)
    return ELMo(SMALL if not changes else ElmoConfig(**{**SMALL.__dict__, **changes})).double()


def batch(sentences: list[list[str]] = SENTENCES) -> dict[str, Tensor]:
    return {
        "characters": character_ids(sentences, SMALL.word_length),
        "tokens": torch.randint(0, V, (3, 5), generator=torch.Generator().manual_seed(2)),
        "lengths": LENGTHS,
        "dropout_seeds": torch.tensor([11, 12, 13]),
    }


def test_characters_are_the_words_bytes() -> None:
    ids = character_ids([["ab", "é"], ["far too long"]], 6)
    assert ids.shape == (2, 2, 6)
    assert ids[0, 0].tolist() == [BEGIN, 97, 98, END, PADDING, PADDING]
    assert ids[0, 1].tolist() == [BEGIN, 0xC3, 0xA9, END, PADDING, PADDING]
    assert ids[1, 0].tolist() == [BEGIN, *b"far ", END]
    assert (ids[1, 1] == PADDING).all()
    with pytest.raises(ValueError, match="word_length=2"):
        character_ids([["a"]], 2)


def test_a_highway_by_hand() -> None:
    layer = Highway(1).double()
    with torch.no_grad():
        for linear, weight, bias in ((layer.transform, 2.0, -1.0), (layer.gate, 0.0, 1.0)):
            linear.weight.fill_(weight)
            linear.bias.fill_(bias)
    gate = torch.sigmoid(torch.tensor(1.0, dtype=torch.float64))
    given = layer(torch.tensor([[3.0], [0.25]], dtype=torch.float64))
    expected = torch.stack([gate * 5 + (1 - gate) * 3, (1 - gate) * 0.25])[:, None]
    torch.testing.assert_close(given, expected, atol=1e-15, rtol=0)


def test_a_word_is_the_maximum_over_its_characters() -> None:
    model, ids = elmo().characters, character_ids([["cat"]], SMALL.word_length)
    letters = model.embedding(ids[0, 0])
    features = []
    for convolution in model.convolutions:
        weight, bias = convolution.weight, convolution.bias
        width = weight.shape[2]
        windows = [
            sum(weight[:, :, k] @ letters[i + k] for k in range(width)) + bias for i in range(len(letters) - width + 1)
        ]
        features.append(F.relu(torch.stack(windows).amax(0)))
    x = torch.cat(features)
    for highway in model.highways:
        x = highway(x)
    torch.testing.assert_close(model(ids)[0, 0], model.projection(x), atol=1e-12, rtol=0)


def test_directions_see_their_own_side_only() -> None:
    model = elmo()
    other = [["The", "cat", "ran", "é", "."], ["a", "fox", "barked"], ["yes"]]
    _, ahead, back = model.directions(batch()["characters"], LENGTHS)
    _, ahead_now, back_now = model.directions(batch(other)["characters"], LENGTHS)
    for layer in range(2):
        forward = (ahead_now[layer] - ahead[layer]).abs().amax(2) > 1e-12
        backward = (back_now[layer] - back[layer]).abs().amax(2) > 1e-12
        assert forward[0].tolist() == [False, False, True, True, True]
        assert backward[0].tolist() == [True, True, True, False, False]
        assert forward[1, :3].tolist() == [False, True, True] and backward[1, :3].tolist() == [True, True, False]
        assert not forward[2, :1].any() and not backward[2, :1].any()


def test_padding_means_nothing_and_sentences_are_alone() -> None:
    model = elmo()
    whole = model.layers_of(batch()["characters"], LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = model.layers_of(character_ids([SENTENCES[row]], SMALL.word_length), torch.tensor([length]))
        for layer, single in zip(whole, alone, strict=True):
            torch.testing.assert_close(layer[row, :length], single[0], atol=1e-13, rtol=0)


def test_targets_and_reversed_places_by_hand() -> None:
    following, preceding = targets_of(torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]), torch.tensor([4, 2]))
    assert following.tolist() == [[2, 3, 4, -100], [6, -100, -100, -100]]
    assert preceding.tolist() == [[-100, 1, 2, 3], [-100, 5, -100, -100]]
    places = reversed_places(torch.tensor([4, 2]), 4)
    assert places.tolist() == [[3, 2, 1, 0], [1, 0, 2, 3]]


def test_loss_by_hand() -> None:
    model, b = elmo(), batch()
    _, ahead, back = model.directions(b["characters"], LENGTHS)
    losses, count = {"forward": 0.0, "backward": 0.0}, 0
    for row, length in enumerate(LENGTHS.tolist()):
        for t in range(length - 1):
            count += 1
            forward = model.decoder(ahead[-1][row, t]).log_softmax(0)[b["tokens"][row, t + 1]]
            backward = model.decoder(back[-1][row, t + 1]).log_softmax(0)[b["tokens"][row, t]]
            losses["forward"] -= forward.item()
            losses["backward"] -= backward.item()
    found = model.loss(b)
    assert found.keys() == set(model.SCORES)
    for name, loss in found.items():
        assert loss.sum.item() == pytest.approx(losses[name], rel=1e-12) and loss.count.item() == count == 6


def test_an_unknown_word_is_no_target() -> None:
    model, b = elmo(), batch()
    b["tokens"][0, 2] = -100
    assert [loss.count.item() for loss in model.loss(b).values()] == [5, 5]


def test_layers_are_the_words_twice_and_both_directions_with_residuals() -> None:
    model, b = elmo(), batch()
    words, ahead, back = model.directions(b["characters"], LENGTHS)
    layers = model.layers_of(b["characters"], LENGTHS)
    assert len(layers) == 3 and all(layer.shape == (3, 5, 12) for layer in layers)
    assert torch.equal(layers[0], torch.cat((words, words), 2))
    assert torch.equal(layers[2], torch.cat((ahead[1], back[1]), 2))
    second = model.forwards.layers[1](ahead[0])[0]
    torch.testing.assert_close(ahead[1], second + ahead[0], atol=1e-14, rtol=0)
    torch.testing.assert_close(ahead[0], model.forwards.layers[0](words)[0], atol=1e-14, rtol=0)


def test_the_mixture() -> None:
    mix = ScalarMix(3).double()
    layers = [torch.full((2, 4), value, dtype=torch.float64) for value in (1.0, 2.0, 6.0)]
    assert mix(layers).unique().item() == pytest.approx(3.0, rel=1e-14)
    with torch.no_grad():
        mix.weights.copy_(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64).log())
        mix.gamma.fill_(0.5)
    assert mix(layers).unique().item() == pytest.approx(0.5 * (1 * 1 + 2 * 2 + 5 * 6) / 8, rel=1e-14)
    mix(layers).sum().backward()
    assert mix.weights.grad is not None and mix.gamma.grad is not None
    with pytest.raises(ValueError, match="2 layers for 3 weights"):
        mix(layers[:2])


def test_dropout_does_not_depend_on_the_cut_into_micro_batches() -> None:
    model, b = elmo(dropout=0.3).train(), batch()
    parts = [model.loss({k: v[rows] for k, v in b.items()}) for rows in (slice(0, 1), slice(1, 3))]
    whole = model.loss(b)
    for name, loss in whole.items():
        assert sum(part[name].sum for part in parts).item() == pytest.approx(loss.sum.item(), rel=1e-12)
    assert whole["forward"].sum != model.eval().loss(b)["forward"].sum


def test_shapes_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="hidden_size=12 is above cell_size=10"):
        elmo(hidden_size=12)
    assert elmo(hidden_size=10).loss(batch())["forward"].count == 6


def test_it_learns() -> None:
    model, b = elmo().float(), batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        found = model.loss(b)
        loss = sum(part.sum / part.count for part in found.values())
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 2
