"""Layers shared by GPT and BERT, and what a loss is. Nothing here knows of ranks or devices.

What a layout changes stands in attributes: the attention function, the number of the first head, the part of the
positions that a dropout layer sees.

Shapes: B batch (sequences), S sequence (tokens), H hidden size, A heads, D head size (H / A, save where heads
were pruned), F feed-forward width.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disttrain.config.presets import shape_of
from disttrain.config.schema import ModelConfig
from disttrain.costs import UNFUSED_SEQUENCE
from disttrain.models.dropout import Dropout, Keys, WeightDropout, at_site

INITIAL_STD = 0.02
"""Standard deviation of initial weights (Radford et al. 2018; Devlin et al. 2019, who truncate it)."""


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


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, dropout: WeightDropout | None
) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V for [B, A, S, D]; mask is bool [B, S] over keys; dropout falls on the weights.

    Through torch's scaled_dot_product_attention, save for two cases that multiply plainly: dropout, whose masks are
    ours, and half precision on a CPU up to 512 tokens, where torch's kernel multiplies in float32 and plain products
    are two to four times faster, backward included. Those keep the scores in half precision and the softmax's sums in
    float32, as Megatron-LM's and Hugging Face's unfused attention. Raises ValueError for a mask beside causal.
    """
    if mask is not None and causal:
        raise ValueError("attention takes either a mask or causal, not both")
    half = query.device.type == "cpu" and query.dtype.itemsize == 2 and query.shape[2] <= UNFUSED_SEQUENCE
    if dropout is not None or half:
        return _attend_unfused(query, key, value, mask, causal, dropout)
    keys = None if mask is None else mask[:, None, None, :]
    return F.scaled_dot_product_attention(query, key, value, keys, is_causal=causal)


def _attend_unfused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, dropout: WeightDropout | None
) -> Tensor:
    batch, heads, sequence, size = query.shape
    hidden = torch.zeros(1, sequence, dtype=torch.bool, device=query.device)
    if causal:
        hidden = torch.ones(sequence, sequence, dtype=torch.bool, device=query.device).triu(1)
    if mask is not None:
        hidden = ~mask[:, None, :].repeat_interleave(heads, 0)
    bias = query.new_zeros(hidden.shape).masked_fill(hidden, torch.finfo(query.dtype).min)
    query, key, value = (x.reshape(batch * heads, sequence, size) for x in (query, key, value))
    weights = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=1 / math.sqrt(size)).softmax(-1)
    if dropout is not None:
        weights = dropout.apply(weights.view(batch, heads, sequence, sequence)).flatten(0, 1)
    return torch.bmm(weights, value).view(batch, heads, sequence, size)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2).

    The rows of the fused qkv weight are laid out [A, 3, D]: first head 0's query, key and value, then head 1's. A
    contiguous shard of rows is then a shard of whole heads, which is what tensor parallelism cuts. The number of heads
    is read from the projection's width, so a module that holds only some of the heads computes those.
    """

    def __init__(self, config: ModelConfig, causal: bool, site: int = 0):
        super().__init__()
        shape = shape_of(config)
        self.head_size = shape.head_size
        self.causal = causal
        self.site, self.weight_dropout = site, config.dropout
        self.first_head = 0
        """Number of this module's first head among all heads of the layer."""
        self.attend = attend
        """What computes softmax(Q K^T) V: `attend`, or a function of its signature over split sequences."""
        self.qkv = nn.Linear(shape.hidden_size, 3 * shape.attention_size)
        self.out = nn.Linear(shape.attention_size, shape.hidden_size)
        self.dropout = Dropout(config.dropout, site + 1)

    def forward(self, x: Tensor, mask: Tensor | None = None, keys: Keys | None = None) -> Tensor:
        """[B, S, H] -> [B, S, H]; mask is bool [B, S], True where a key may be attended to; keys are dropout's."""
        rows = self.qkv(x)
        query, key, value = rows.view(*rows.shape[:2], -1, 3, self.head_size).transpose(1, 2).unbind(3)
        y = self.attend(query, key, value, mask, self.causal, self._weight_dropout(query, keys))
        return self.dropout(self.out(y.transpose(1, 2).flatten(2)), keys)

    def _weight_dropout(self, query: Tensor, keys: Keys | None) -> WeightDropout | None:
        if not self.training or self.weight_dropout == 0:
            return None
        if keys is None or keys.seeds is None:
            raise ValueError(f"dropout={self.weight_dropout} while training needs keys: the batch has no dropout_seeds")
        heads = torch.arange(self.first_head, self.first_head + query.shape[1], device=query.device)
        rows = at_site(keys.seeds, self.site)
        return WeightDropout(self.weight_dropout, rows, heads, keys.positions, keys.positions)


class MLP(nn.Module):
    """Two linear layers with GELU between them (Hendrycks and Gimpel 2016), tanh form for GPT-2, erf form for BERT."""

    def __init__(self, config: ModelConfig, gelu: Literal["tanh", "none"], site: int = 0):
        super().__init__()
        shape = shape_of(config)
        self.gelu = gelu
        self.up = nn.Linear(shape.hidden_size, shape.ffn_hidden_size)
        self.down = nn.Linear(shape.ffn_hidden_size, shape.hidden_size)
        self.dropout = Dropout(config.dropout, site)

    def forward(self, x: Tensor, keys: Keys | None = None) -> Tensor:
        """[B, S, H] -> [B, S, H]; keys are dropout's."""
        return self.dropout(self.down(F.gelu(self.up(x), approximate=self.gelu)), keys)


class Block(nn.Module):
    """One transformer layer; causal = GPT's (pre-norm, tanh GELU), otherwise BERT's (post-norm, erf GELU)."""

    def __init__(self, config: ModelConfig, causal: bool, number: int = 0):
        super().__init__()
        self.pre_norm = causal
        site = 1 + 3 * number
        self.attn_norm = layer_norm(config)
        self.attn = Attention(config, causal, site)
        self.mlp_norm = layer_norm(config)
        self.mlp = MLP(config, "tanh" if causal else "none", site + 2)

    def forward(self, x: Tensor, mask: Tensor | None = None, keys: Keys | None = None) -> Tensor:
        """[B, S, H] -> [B, S, H]; mask and keys as in Attention."""
        if self.pre_norm:
            x = x + self.attn(self.attn_norm(x), mask, keys)
            return x + self.mlp(self.mlp_norm(x), keys)
        x = self.attn_norm(x + self.attn(x, mask, keys))
        return self.mlp_norm(x + self.mlp(x, keys))


def blocks(config: ModelConfig, causal: bool) -> nn.ModuleDict:
    """All blocks by number; a pipeline stage deletes keys and the names of the others stay."""
    return nn.ModuleDict({str(i): Block(config, causal, i) for i in range(config.layers)})


def attending(model: nn.Module) -> list[Any]:
    """The modules that call attention through `self.attend`: Attention, and those of a user's own model."""
    return [module for module in model.modules() if callable(getattr(module, "attend", None))]


def keys_of(batch: dict[str, Tensor], x: Tensor) -> Keys:
    """Positions of a batch (0, 1, ... where it names none) and its dropout seeds; x is int64 [B, S] or [B, S, H]."""
    positions = batch.get("positions")
    if positions is None:
        positions = torch.arange(batch["tokens"].shape[1], device=x.device)
    return Keys(batch.get("dropout_seeds"), positions)
