"""GPT-2 (Radford et al. 2019): a pre-norm decoder with learned positions and a tied head."""

import torch.nn.functional as F
from torch import Tensor, nn

from disttrain.config.presets import shape_of
from disttrain.config.schema import ModelConfig
from disttrain.models.cross_entropy import IGNORED, cross_entropy_sum
from disttrain.models.layers import LossSum, blocks, layer_norm

TENSOR_PLAN = {
    "embed.tokens": "vocab",
    "embed.positions": "replicate",
    "blocks.*.attn.qkv": "column",
    "blocks.*.attn.out": "row",
    "blocks.*.mlp.up": "column",
    "blocks.*.mlp.down": "row",
    "head.decoder": "vocab",
}
"""Tensor-parallel role of every module with a weight matrix (fnmatch patterns on module names)."""

TIED = {"head.decoder.weight": "embed.tokens.weight"}
"""Parameters that share another's values; a pipeline stage with only the first name keeps a copy."""


class GPTEmbedding(nn.Module):
    """Token plus position embedding, then dropout."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        shape = shape_of(config)
        self.dropout = config.dropout
        self.tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.positions = nn.Embedding(shape.max_positions, shape.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [B, S] -> [B, S, H]."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return F.dropout(x, self.dropout, self.training)


class GPTHead(nn.Module):
    """Final norm and the projection to the vocabulary."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        shape = shape_of(config)
        self.norm = layer_norm(config)
        self.decoder = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, H] -> logits [B, S, V]."""
        return self.decoder(self.norm(x))


class GPT(nn.Module):
    """The whole model, or a pipeline stage of it: embed and head may be None and blocks may lack numbers."""

    tensor_plan = TENSOR_PLAN
    tied = TIED
    SCORES = ("lm",)
    """Names that `scores` gives."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed: GPTEmbedding | None = GPTEmbedding(config)
        self.blocks = blocks(config, causal=True)
        self.head: GPTHead | None = GPTHead(config)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens int64 [B, S] (hidden states [B, S, H] without embed) -> logits [B, S, V] (hidden without head)."""
        if self.embed is not None:
            x = self.embed(x)
        for block in self.blocks.values():
            x = block(x)
        return x if self.head is None else self.head(x)

    def prepare_batch(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with what is best computed before it moves to a device: nothing for GPT."""
        return batch

    def loss(self, batch: dict[str, Tensor], label_smoothing: float = 0.0) -> dict[str, LossSum]:
        """`lm`: cross-entropy of `tokens` [B, S] against `targets` [B, S]; -100 is ignored."""
        return self.loss_of(self(batch["tokens"]), batch, label_smoothing)

    def loss_of(self, logits: Tensor, batch: dict[str, Tensor], label_smoothing: float = 0.0) -> dict[str, LossSum]:
        """The loss of logits that forward gave (what the last pipeline stage computes)."""
        total = cross_entropy_sum(logits.flatten(0, 1), batch["targets"].flatten(), label_smoothing)
        return {"lm": LossSum(total, self.count_targets(batch)["lm"])}

    def count_targets(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Targets that count, from the batch alone: the divisor is needed before the backward pass."""
        return {"lm": (batch["targets"] != IGNORED).sum()}

    def scores(self, batch: dict[str, Tensor]) -> dict[str, LossSum]:
        """What evaluation reports: the loss."""
        return self.loss(batch)
