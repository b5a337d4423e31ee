"""ELMo (Peters et al. 2018, "Deep contextualized word representations"): a bidirectional LSTM language model of characters.

A word is read by a CNN over its characters (Kim et al. 2016), highway layers (Srivastava et al. 2015) and a projection.
LSTM layers with projections read the words forwards, others backwards, with a residual connection from the first layer on;
one softmax predicts the next and the previous word (equation 1). A task takes the layers' mixture (section 3.2).

Shapes: B batch (sentences), S words of the longest sentence, W characters of a word, H size of a word's vector, V
vocabulary, L layers of LSTMs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disttrain.models.cross_entropy import IGNORED, cross_entropy_sum
from disttrain.models.dropout import Dropout, Keys
from disttrain.models.layers import LossSum

PADDING, BEGIN, END = 256, 257, 258
"""Characters beside the 256 bytes of a word in UTF-8: none, and the word's begin and end."""
CHARACTERS = 259


@dataclass(frozen=True)
class ElmoConfig:
    """Shape of the model; the defaults are those of the paper's section 3.4 and of the weights published with it."""

    vocab_size: int
    """Words that the softmax knows."""
    hidden_size: int = 512
    """H: size of a word's vector and of what an LSTM gives on."""
    cell_size: int = 4096
    """Cells of an LSTM layer, of which `hidden_size` numbers are projected."""
    layers: int = 2
    """L: LSTM layers in each direction."""
    character_size: int = 16
    """Size of a character's embedding."""
    filters: tuple[tuple[int, int], ...] = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))
    """(width in characters, number) of the CNN's filters."""
    highways: int = 2
    """Highway layers."""
    word_length: int = 50
    """W: characters of a word with its begin and end; longer words are cut."""
    dropout: float = 0.1
    """Dropout probability of what goes into each LSTM layer."""


def character_ids(sentences: Sequence[Sequence[str]], word_length: int) -> Tensor:
    """The bytes of each word, between BEGIN and END, int64 [B, S, W]; PADDING elsewhere.

    Raises ValueError for words of fewer than 3 characters in all.
    """
    if word_length < 3:
        raise ValueError(f"word_length={word_length} leaves no room for a character between begin and end")
    longest = max((len(sentence) for sentence in sentences), default=0)
    ids = torch.full((len(sentences), longest, word_length), PADDING)
    for row, sentence in enumerate(sentences):
        for place, word in enumerate(sentence):
            characters = [BEGIN, *word.encode()[: word_length - 2], END]
            ids[row, place, : len(characters)] = torch.tensor(characters)
    return ids


class Highway(nn.Module):
    """y = g * relu(A x + b) + (1 - g) * x with the gate g = sigmoid(C x + d) (Srivastava et al. 2015)."""

    def __init__(self, size: int):
        super().__init__()
        self.transform = nn.Linear(size, size)
        self.gate = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        gate = self.gate(x).sigmoid()
        return gate * F.relu(self.transform(x)) + (1 - gate) * x


class CharacterCNN(nn.Module):
    """Words from their characters: convolutions, the maximum over the word, highway layers, a projection to H."""

    def __init__(self, config: ElmoConfig):
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, config.character_size, padding_idx=PADDING)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(config.character_size, number, width) for width, number in config.filters
        )
        size = sum(number for _, number in config.filters)
        self.highways = nn.ModuleList(Highway(size) for _ in range(config.highways))
        self.projection = nn.Linear(size, config.hidden_size)

    def forward(self, characters: Tensor) -> Tensor:
        """int64 [B, S, W] -> [B, S, H]."""
        letters = self.embedding(characters.flatten(0, 1)).transpose(1, 2)
        x = torch.cat([F.relu(convolution(letters).amax(2)) for convolution in self.convolutions], 1)
        for highway in self.highways:
            x = highway(x)
        return self.projection(x).view(*characters.shape[:2], -1)


class OneWay(nn.Module):
    """LSTM layers with projections that read from left to right, a residual connection around each but the first."""

    def __init__(self, config: ElmoConfig, first_site: int):
        super().__init__()
        projected = config.hidden_size if config.hidden_size < config.cell_size else 0
        if not projected and config.hidden_size != config.cell_size:
            raise ValueError(f"hidden_size={config.hidden_size} is above cell_size={config.cell_size}")
        self.layers = nn.ModuleList(
            nn.LSTM(config.hidden_size, config.cell_size, proj_size=projected, batch_first=True)
            for _ in range(config.layers)
        )
        self.dropouts = nn.ModuleList(Dropout(config.dropout, first_site + i) for i in range(config.layers))

    def forward(self, x: Tensor, keys: Keys | None) -> list[Tensor]:
        """[B, S, H] -> what each layer gives, L times [B, S, H]."""
        given = []
        for number, (layer, dropout) in enumerate(zip(self.layers, self.dropouts, strict=True)):
            y = layer(dropout(x, keys))[0]
            x = y + x if number else y
            given.append(x)
        return given


class ELMo(nn.Module):
    """The bidirectional language model; `layers_of` is what `ScalarMix` mixes."""

    SCORES = ("forward", "backward")
    """Names that `loss` gives."""

    def __init__(self, config: ElmoConfig):
        super().__init__()
        self.config = config
        self.characters = CharacterCNN(config)
        self.forwards = OneWay(config, 0)
        self.backwards = OneWay(config, config.layers)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def directions(
        self, characters: Tensor, lengths: Tensor, keys: Keys | None = None
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """characters int64 [B, S, W], lengths int64 [B] words -> (words, forward layers, backward layers), each [B, S, H].

        At place t, forward layers know the words up to t, backward layers those from t to the sentence's end. What
        stands behind a sentence's end means nothing.
        """
        words = self.characters(characters)
        reverse = reversed_places(lengths, words.shape[1])
        backwards = self.backwards(_take(words, reverse), keys)
        return words, self.forwards(words, keys), [_take(layer, reverse) for layer in backwards]

    def layers_of(self, characters: Tensor, lengths: Tensor, keys: Keys | None = None) -> list[Tensor]:
        """The L + 1 layers h_0 to h_L, each [B, S, 2 H]: the word's vector twice, then both directions beside each other."""
        words, forwards, backwards = self.directions(characters, lengths, keys)
        return [torch.cat((words, words), 2)] + [torch.cat(pair, 2) for pair in zip(forwards, backwards, strict=True)]

    def loss(self, batch: dict[str, Tensor], label_smoothing: float = 0.0) -> dict[str, LossSum]:
        """Cross-entropy of the `forward` and of the `backward` model (equation 1 is minus their sum), nats.

        batch: characters int64 [B, S, W], tokens int64 [B, S] (the words' numbers; IGNORED ones are not predicted),
        lengths int64 [B], and dropout_seeds int64 [B] where there is dropout. At place t, the next word t + 1 and the
        previous one t - 1 are predicted, where there are such.
        """
        tokens = batch["tokens"]
        keys = Keys(batch.get("dropout_seeds"), torch.arange(tokens.shape[1], device=tokens.device))
        _, forwards, backwards = self.directions(batch["characters"], batch["lengths"], keys)
        following, preceding = targets_of(tokens, batch["lengths"])
        return {
            "forward": self._loss_of(forwards[-1], following, label_smoothing),
            "backward": self._loss_of(backwards[-1], preceding, label_smoothing),
        }

    def _loss_of(self, x: Tensor, targets: Tensor, label_smoothing: float) -> LossSum:
        counts = targets != IGNORED
        total = cross_entropy_sum(self.decoder(x[counts]), targets[counts], label_smoothing)
        return LossSum(total, counts.sum())


class ScalarMix(nn.Module):
    """gamma * sum_j s_j h_j with s = softmax(weights) (section 3.2); one for each task, learned with it."""

    def __init__(self, layers: int):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(layers))
        self.gamma = nn.Parameter(torch.ones(()))

    def forward(self, layers: Sequence[Tensor]) -> Tensor:
        """As many tensors of one shape as there are weights -> one of this shape. Raises ValueError for another number."""
        if len(layers) != len(self.weights):
            raise ValueError(f"{len(layers)} layers for {len(self.weights)} weights")
        shares = self.weights.softmax(0)
        return self.gamma * sum(share * layer for share, layer in zip(shares, layers, strict=True))


def targets_of(tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(the next, the previous) word at each place, int64 [B, S]; IGNORED at a sentence's ends and behind its end."""
    nothing = tokens.new_full((len(tokens), 1), IGNORED)
    places = torch.arange(tokens.shape[1], device=tokens.device)
    following = torch.cat((tokens[:, 1:], nothing), 1).where(places < lengths[:, None] - 1, IGNORED)
    preceding = torch.cat((nothing, tokens[:, :-1]), 1).where(places < lengths[:, None], IGNORED)
    return following, preceding


def reversed_places(lengths: Tensor, size: int) -> Tensor:
    """int64 [B, S]: place length - 1 - t inside a sentence, t behind its end; taking them twice changes nothing."""
    places = torch.arange(size, device=lengths.device)
    return torch.where(places < lengths[:, None], lengths[:, None] - 1 - places, places)


def _take(x: Tensor, places: Tensor) -> Tensor:
    """x [B, S, H] at places int64 [B, S]."""
    return x.gather(1, places[:, :, None].expand(-1, -1, x.shape[2]))
