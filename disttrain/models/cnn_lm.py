"""Language model of gated causal convolutions (Dauphin et al. 2017, "Language modeling with gated convolutional networks").

Gets GPT's batches and has GPT's interface and loss; only the layers are its own. A layer is h(X) = (X * W + b) times
sigmoid(X * V + c) (equation 1), shifted so that it sees no later token (section 2), inside a residual connection. Where the
paper normalises weights, a layer norm stands before each convolution here, as in GPT: it trains at GPT's learning rates.

Shapes: B batch (sequences), S sequence (tokens), H hidden size, K kernel width.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from disttrain.config.schema import ModelConfig
from disttrain.models.dropout import Dropout, Keys
from disttrain.models.gpt import GPT
from disttrain.models.layers import layer_norm
from disttrain.models.lstm_lm import EMBEDDING_STD, TokenEmbedding

KERNEL_SIZE = 4
"""Tokens that a layer sees where the option `kernel_size` is not given, as in most layers of the paper's GCNN-13."""


class GatedBlock(nn.Module):
    """Layer norm, a causal convolution to 2 H channels, a gated linear unit, dropout, all beside the residual stream."""

    def __init__(self, config: ModelConfig, number: int):
        super().__init__()
        self.kernel_size = kernel_size(config)
        self.norm = layer_norm(config)
        self.conv = nn.Conv1d(config.hidden_size, 2 * config.hidden_size, self.kernel_size)
        self.dropout = Dropout(config.dropout, 1 + number)

    def forward(self, x: Tensor, mask: Tensor | None = None, keys: Keys | None = None) -> Tensor:
        """[B, S, H] -> [B, S, H]; a mask is not read, since no token sees a later one."""
        before = F.pad(self.norm(x).transpose(1, 2), (self.kernel_size - 1, 0))
        return x + self.dropout(F.glu(self.conv(before), 1).transpose(1, 2), keys)


class CNNLM(GPT):
    """The whole model, or a pipeline stage of it; it reads `layers`, `hidden_size`, and the option `kernel_size` (4).

    A token sees layers x (K - 1) tokens before it. The layers are whole on every tensor-parallel rank, and take whole
    sequences: there is no sequence or context parallelism. The head is GPT's: a norm and the tied projection.
    """

    tensor_plan = {"embed.tokens": "vocab", "blocks.*.conv": "replicate", "head.decoder": "vocab"}

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.embed: TokenEmbedding | None = TokenEmbedding(config)
        self.blocks = nn.ModuleDict({str(i): GatedBlock(config, i) for i in range(config.layers)})

    @classmethod
    def initial(cls, config: ModelConfig, name: str) -> tuple[float, float]:
        """Mean and deviation of a parameter's initial values: normal, biases 0, norm weights 1.

        Convolutions have sqrt(4 / (K H)), which keeps the variance through gated linear units (Gehring et al. 2017,
        appendix A), over sqrt(layers), so that the residual stream stays of one size; embeddings have `EMBEDDING_STD`.
        """
        if name.endswith(("bias", "norm.weight")):
            return (float(name.endswith("weight")), 0.0)
        if name.endswith("conv.weight"):
            return (0.0, 2 / math.sqrt(kernel_size(config) * config.hidden_size * config.layers))
        return (0.0, EMBEDDING_STD)


def kernel_size(config: ModelConfig) -> int:
    """Tokens that a layer sees: the model's option `kernel_size`. Raises ValueError unless it is a whole number above 1."""
    size = config.options.get("kernel_size", KERNEL_SIZE)
    if not isinstance(size, int) or isinstance(size, bool) or size < 2:
        raise ValueError(f"model.options kernel_size={size!r} is no whole number of at least 2")
    return size
