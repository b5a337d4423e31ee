"""Multi-head self-attention on top of any encoder (Vaswani et al. 2017): BiLSTM or TextCNN with attention, say.

Shapes: B batch, S sequence, H width of what the encoder gives.
"""

import torch.nn as nn
from torch import Tensor

from disttrain.config.schema import ModelConfig
from disttrain.models.dropout import Keys
from disttrain.models.layers import Attention, layer_norm

EPSILON = 1e-5
"""Of the layer normalisation, torch's own."""


class SelfAttention(nn.Module):
    """norm(x + attention(x)), the first half of an encoder's layer; attention is `layers.Attention`, over all positions.

    Its parameters are attn.qkv (column-parallel), attn.out (row-parallel) and norm.
    """

    def __init__(self, hidden_size: int, heads: int, dropout: float = 0.0, site: int = 0):
        """Dropout falls on the weights and on what is added, as sites `site` and `site` + 1. Raises ValueError for heads
        that do not divide the width."""
        super().__init__()
        if hidden_size % heads:
            raise ValueError(f"heads={heads} do not divide hidden_size={hidden_size}")
        config = ModelConfig(
            hidden_size=hidden_size, heads=heads, dropout=dropout, layer_norm_epsilon=EPSILON, vocab_size=1,
            ffn_hidden_size=1,
        )  # fmt: skip
        self.attn = Attention(config, causal=False, site=site)
        self.norm = layer_norm(config)

    def forward(self, x: Tensor, mask: Tensor | None = None, keys: Keys | None = None) -> Tensor:
        """[B, S, H] -> [B, S, H]; mask, bool [B, S], is True for a real token, one at least a row; keys are dropout's."""
        return self.norm(x + self.attn(x, mask, keys))
