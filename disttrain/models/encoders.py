"""Small encoders of the papers' baselines: words, with their characters, through convolutions or a recurrent network.

Shapes: B batch, S words, E word vector, H hidden size, L characters of a word. Padding comes last and never matters: what is
computed for a word does not depend on how far a sequence is padded.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from disttrain.config.presets import shape_of
from disttrain.config.schema import ModelConfig
from disttrain.models.dropout import Dropout, Keys, WordDropout
from disttrain.task_shapes import CHARACTERS, WINDOW, embedding_size, width

WORDS_SITE = 1 << 16
"""Site of the dropout of words, beyond those of layers."""
CELLS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


class WordEmbedding(nn.Module):
    """Word vectors, and beside them what a convolution over each word's characters finds (Ma and Hovy 2016)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.tokens = nn.Embedding(shape_of(config).vocab_size, config.embedding_size or config.hidden_size)
        self.characters: nn.Embedding | None = None
        if config.character_size:
            self.characters = nn.Embedding(CHARACTERS, config.character_size)
            self.filters = nn.Conv1d(config.character_size, config.character_channels, WINDOW, padding=1)
        self.words = WordDropout(config.embedding_dropout, WORDS_SITE)
        self.dropout = Dropout(config.dropout, 0)

    def forward(self, tokens: Tensor, characters: Tensor | None, mask: Tensor, keys: Keys) -> Tensor:
        """int64 [B, S] and [B, S, L] -> [B, S, E], zeros where mask [B, S] is False."""
        x = self.words(self.tokens(tokens), tokens, keys)
        if self.characters is not None:
            assert characters is not None  # the batches of a model with characters have them
            x = torch.cat([x, self._of_characters(characters)], -1)
        return self.dropout(x, keys) * mask[..., None]

    def _of_characters(self, characters: Tensor) -> Tensor:
        assert self.characters is not None
        there = (characters > 0)[..., None].flatten(0, 1)
        x = (self.characters(characters.flatten(0, 1)) * there).transpose(1, 2)
        x = self.filters(x).masked_fill(~there.transpose(1, 2), -torch.inf).amax(2)
        return torch.where(x.isfinite(), x, 0.0).unflatten(0, characters.shape[:2])  # padding has no characters


class Convolutions(nn.Module):
    """TextCNN (Kim 2014): filters of several widths, ReLU, each filter's largest value in the sequence."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        reads = embedding_size(config)
        self.filters = nn.ModuleList(nn.Conv1d(reads, config.channels, kernel) for kernel in config.kernels)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, S, E], zeros where mask [B, S] is False -> [B, channels x widths]; windows begin at words and may reach over
        the end."""
        found = []
        for convolution in self.filters:
            reach = convolution.kernel_size[0] - 1  # pyright: ignore[reportOptionalSubscript, reportIndexIssue]
            y = F.relu(convolution(F.pad(x.transpose(1, 2), (0, reach))))  # pyright: ignore[reportArgumentType]
            found.append((y * mask[:, None]).amax(2))  # after ReLU 0 is the least
        return torch.cat(found, 1)


class Recurrent(nn.Module):
    """One layer of a recurrent network, from left to right and, if it is bidirectional, back (Schuster and Paliwal 1997)."""

    def __init__(self, config: ModelConfig, number: int):
        super().__init__()
        reads = width(config) if number else embedding_size(config)
        self.cell = CELLS[config.cell](reads, config.hidden_size, batch_first=True, bidirectional=config.bidirectional)
        self.dropout = Dropout(config.dropout, 1 + number)

    def forward(self, x: Tensor, mask: Tensor, keys: Keys) -> Tensor:
        """[B, S, E] -> [B, S, H], or 2 H if bidirectional; zeros where mask is False."""
        lengths = mask.sum(1).clamp(min=1).cpu()
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, _ = pad_packed_sequence(self.cell(packed)[0], batch_first=True, total_length=x.shape[1])
        return self.dropout(y, keys)
