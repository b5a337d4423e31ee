"""A model of a user's own, as docs/verify.md has it: RMS norm, rotary positions, gated MLP, no biases (Llama)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disttrain import models
from disttrain.config.schema import ModelConfig
from disttrain.models.dropout import Keys
from disttrain.models.layers import attend


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, eps=1e-6)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of x [B, A, S, D]."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * 10000.0 ** (-torch.arange(half, device=x.device, dtype=x.dtype) / half)
    cos, sin = angles.cos(), angles.sin()
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, left * sin + right * cos], -1)


class Block(nn.Module):
    """One layer: x is [B, S, H]; keys name the positions, also where a rank holds some of them only."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, inner = config.hidden_size, config.ffn_hidden_size
        self.head_size = width // config.heads
        self.attend = attend  # so that context parallelism can replace it
        self.first_norm, self.second_norm = RMSNorm(width), RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None, keys: Keys) -> Tensor:
        rows = self.qkv(self.first_norm(x))
        query, key, value = rows.view(*rows.shape[:2], -1, 3, self.head_size).transpose(1, 2).unbind(3)
        query, key = rotate(query, keys.positions), rotate(key, keys.positions)
        x = x + self.out(self.attend(query, key, value, None, True, None).transpose(1, 2).flatten(2))
        y = self.second_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Embedding(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(self, tokens: Tensor, keys: Keys) -> Tensor:
        return self.tokens(tokens)


class Llama(models.GPT):
    """Gets GPT's batches and loss; only the layers are its own."""

    tensor_plan = {
        "embed.tokens": "vocab",
        "blocks.*.qkv": "column", "blocks.*.out": "row",
        "blocks.*.gate": "column", "blocks.*.up": "column", "blocks.*.down": "row",
        "head.decoder": "vocab",
    }  # fmt: skip

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.embed = Embedding(config)
        self.blocks = nn.ModuleDict({str(i): Block(config) for i in range(config.layers)})
        self.head.norm = RMSNorm(config.hidden_size)
