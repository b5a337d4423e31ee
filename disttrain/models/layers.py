"""Layers shared by GPT and BERT, and what a loss is. Nothing here knows of ranks or devices.

Shapes: B batch (sequences), S sequence (tokens), H hidden size, A heads, D = H / A head size, F feed-forward width,
V vocabulary, N tokens with a target.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disttrain.config.presets import shape_of
from disttrain.config.schema import ModelConfig

IGNORED = -100
"""Target of a position that is not predicted."""


class LossSum(NamedTuple):
    """A loss before its one division: the sum over targets (nats) and how many targets there were."""

    sum: Tensor
    """Scalar, float32 (float64 in a float64 model)."""
    count: Tensor
    """Scalar, int64."""


def layer_norm(config: ModelConfig) -> nn.LayerNorm:
    """Layer normalisation over H with the model's epsilon."""
    if config.layer_norm_epsilon is None:
        raise ValueError("model.layer_norm_epsilon is not resolved yet")
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2).

    The rows of the fused qkv weight are laid out [A, 3, D]: first head 0's query, key and value, then head 1's. A
    contiguous shard of rows is then a shard of whole heads, which is what tensor parallelism cuts. The number of heads
    is read from the projection's width, so a module that holds only some of the heads computes those.
    """

    def __init__(self, config: ModelConfig, causal: bool):
        super().__init__()
        self.head_size = config.hidden_size // config.heads
        self.causal = causal
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, S, H] -> [B, S, H]; mask is bool [B, S], True where a key may be attended to."""
        batch, sequence = x.shape[:2]
        query, key, value = self.qkv(x).view(batch, sequence, -1, 3, self.head_size).transpose(1, 2).unbind(3)
        y = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if mask is None else mask[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal,
        )
        y = self.out(y.transpose(1, 2).reshape(batch, sequence, -1))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers with GELU between them (Hendrycks and Gimpel 2016), tanh form for GPT-2, erf form for BERT."""

    def __init__(self, config: ModelConfig, gelu: Literal["tanh", "none"]):
        super().__init__()
        shape = shape_of(config)
        self.gelu = gelu
        self.dropout = config.dropout
        self.up = nn.Linear(shape.hidden_size, shape.ffn_hidden_size)
        self.down = nn.Linear(shape.ffn_hidden_size, shape.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        return F.dropout(self.down(F.gelu(self.up(x), approximate=self.gelu)), self.dropout, self.training)


class Block(nn.Module):
    """One transformer layer; causal = GPT's (pre-norm, tanh GELU), otherwise BERT's (post-norm, erf GELU)."""

    def __init__(self, config: ModelConfig, causal: bool):
        super().__init__()
        self.pre_norm = causal
        self.attn_norm = layer_norm(config)
        self.attn = Attention(config, causal)
        self.mlp_norm = layer_norm(config)
        self.mlp = MLP(config, "tanh" if causal else "none")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, S, H] -> [B, S, H]; mask as in Attention."""
        if self.pre_norm:
            x = x + self.attn(self.attn_norm(x), mask)
            return x + self.mlp(self.mlp_norm(x))
        x = self.attn_norm(x + self.attn(x, mask))
        return self.mlp_norm(x + self.mlp(x))


def blocks(config: ModelConfig, causal: bool) -> nn.ModuleDict:
    """All blocks by number; a pipeline stage deletes keys and the names of the others stay."""
    return nn.ModuleDict({str(i): Block(config, causal) for i in range(config.layers)})


def cross_entropy_sum(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Summed cross-entropy in nats of logits [N, V] against int64 targets [N]; ignored targets add nothing.

    Computed in float32 (float64 for float64 logits), under autocast too. Smoothing e means, as in
    torch.nn.functional.cross_entropy, the target distribution (1 - e) * one_hot + e / V.
    """
    with torch.autocast(logits.device.type, enabled=False):
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing)
