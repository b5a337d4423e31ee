"""Layers shared by GPT and BERT, and what a loss is. Nothing here knows of ranks or devices.

Shapes: B batch (sequences), S sequence (tokens), H hidden size, A heads, D = H / A head size, F feed-forward width.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disttrain.config.presets import shape_of
from disttrain.config.schema import ModelConfig

UNFUSED_SEQUENCE = 512
"""Longest sequence, in tokens, for which half-precision attention on a CPU is computed by plain products."""


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


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, dropout: float) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V for [B, A, S, D]; mask is bool [B, S] over keys.

    Through torch's scaled_dot_product_attention, save for half precision on a CPU up to 512 tokens: there its kernel
    multiplies in float32 and the plain products are two to four times faster, backward included. Those keep the
    scores in half precision and the softmax's sums in float32, as Megatron-LM's and Hugging Face's unfused attention.
    Raises ValueError for a mask beside causal.
    """
    if mask is not None and causal:
        raise ValueError("attention takes either a mask or causal, not both")
    if query.device.type == "cpu" and query.dtype.itemsize == 2 and query.shape[2] <= UNFUSED_SEQUENCE:
        return _attend_unfused(query, key, value, mask, causal, dropout)
    keys = None if mask is None else mask[:, None, None, :]
    return F.scaled_dot_product_attention(query, key, value, keys, dropout_p=dropout, is_causal=causal)


def _attend_unfused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, dropout: float
) -> Tensor:
    batch, heads, sequence, size = query.shape
    hidden = torch.zeros(1, sequence, dtype=torch.bool, device=query.device)
    if causal:
        hidden = torch.ones(sequence, sequence, dtype=torch.bool, device=query.device).triu(1)
    if mask is not None:
        hidden = ~mask[:, None, :].repeat_interleave(heads, 0)
    bias = query.new_zeros(hidden.shape).masked_fill(hidden, torch.finfo(query.dtype).min)
    query, key, value = (x.reshape(batch * heads, sequence, size) for x in (query, key, value))
    scores = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=1 / math.sqrt(size))
    weights = F.dropout(scores.softmax(-1), dropout)
    return torch.bmm(weights, value).view(batch, heads, sequence, size)


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
        dropout = self.dropout if self.training else 0.0
        y = attend(query, key, value, mask, self.causal, dropout)
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
