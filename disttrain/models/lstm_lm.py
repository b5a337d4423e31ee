"""LSTM language model (Hochreiter and Schmidhuber 1997; Zaremba et al. 2014, "Recurrent neural network regularization").

Gets GPT's batches and has GPT's interface and loss; only the layers are its own. Sequences are independent: each begins
with a state of zeros, and nothing is carried from one batch to the next, so a batch is trained alike wherever it stands.

Shapes: B batch (sequences), S sequence (tokens), H hidden size, V vocabulary.
"""

import math

from torch import Tensor, nn

from disttrain.config.presets import shape_of
from disttrain.config.schema import ModelConfig
from disttrain.models.dropout import Dropout, Keys
from disttrain.models.gpt import GPT

EMBEDDING_STD = 0.1 / math.sqrt(3)
"""Deviation of initial embeddings: that of the uniform numbers from -0.1 to 0.1 of Merity et al. 2018, section 5."""


class TokenEmbedding(nn.Module):
    """Token embedding without positions, then dropout."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        shape = shape_of(config)
        self.dropout = Dropout(config.dropout, 0)
        self.tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)

    def forward(self, tokens: Tensor, keys: Keys | None) -> Tensor:
        """int64 [B, S] -> [B, S, H]; keys are dropout's."""
        return self.dropout(self.tokens(tokens), keys)


class LSTMBlock(nn.Module):
    """One layer of LSTM cells, then dropout of what goes up, never of what goes on in time (Zaremba et al. 2014)."""

    def __init__(self, config: ModelConfig, number: int):
        super().__init__()
        self.lstm = nn.LSTM(config.hidden_size, config.hidden_size, batch_first=True)
        self.dropout = Dropout(config.dropout, 1 + number)

    def forward(self, x: Tensor, mask: Tensor | None = None, keys: Keys | None = None) -> Tensor:
        """[B, S, H] -> [B, S, H]; a mask is not read, since nothing after a token changes what stands at it."""
        return self.dropout(self.lstm(x)[0], keys)


class LSTMHead(nn.Module):
    """The projection to the vocabulary: `decoder` has the embedding's weights (Press and Wolf 2017), `output` its own."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        shape = shape_of(config)
        linear = nn.Linear(shape.hidden_size, shape.vocab_size)
        self.tied = tied_head(config)
        if self.tied:
            self.decoder = linear
        else:
            self.output = linear

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, H] -> logits [B, S, V]."""
        return self.decoder(x) if self.tied else self.output(x)


class LSTMLM(GPT):
    """The whole model, or a pipeline stage of it; `layers` and `hidden_size` are read, and the option `tied` (true).

    The layers are whole on every tensor-parallel rank, and take whole sequences: there is no sequence or context
    parallelism.
    """

    tensor_plan = {
        "embed.tokens": "vocab",
        "blocks.*.lstm": "replicate",
        "head.decoder": "vocab",
        "head.output": "vocab",
    }

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.embed: TokenEmbedding | None = TokenEmbedding(config)
        self.blocks = nn.ModuleDict({str(i): LSTMBlock(config, i) for i in range(config.layers)})
        self.head: LSTMHead | None = LSTMHead(config)

    @classmethod
    def initial(cls, config: ModelConfig, name: str) -> tuple[float, float]:
        """Mean and deviation of a parameter's initial values: normal, biases 0.

        Embeddings and head have `EMBEDDING_STD`; the layers 1 / sqrt(3 H), the deviation of torch's uniform ones.
        """
        leaf = name.rpartition(".")[2]
        if leaf.startswith("bias"):
            return (0.0, 0.0)
        return (0.0, 1 / math.sqrt(3 * config.hidden_size) if ".lstm." in name else EMBEDDING_STD)


def tied_head(config: ModelConfig) -> bool:
    """Whether the head shares the embedding's weights: the model's option `tied`, true where it is not given.

    Raises ValueError where it is neither true nor false.
    """
    tied = config.options.get("tied", True)
    if not isinstance(tied, bool):
        raise ValueError(f"model.options tied={tied!r} is neither true nor false")
    return tied
