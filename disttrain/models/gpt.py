"""GPT-2 (Radford et al. 2019): a pre-norm decoder with learned positions and a tied head."""

import math

import torch
from torch import Tensor, nn

from disttrain.config.presets import shape_of
from disttrain.config.schema import ModelConfig
from disttrain.models.cross_entropy import IGNORED, Vocabulary, WholeVocabulary
from disttrain.models.dropout import Dropout, Keys
from disttrain.models.layers import INITIAL_STD, LossSum, blocks, keys_of, layer_norm

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
        self.dropout = Dropout(config.dropout, 0)
        self.tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.positions = nn.Embedding(shape.max_positions, shape.hidden_size)

    def forward(self, tokens: Tensor, keys: Keys) -> Tensor:
        """int64 [B, S] -> [B, S, H]; keys name the positions."""
        return self.dropout(self.tokens(tokens) + self.positions(keys.positions), keys)


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
    causal = True
    SCORES = ("lm",)
    """Names that `scores` gives."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed: GPTEmbedding | None = GPTEmbedding(config)
        self.blocks = blocks(config, causal=True)
        self.head: GPTHead | None = GPTHead(config)
        self.vocabulary: Vocabulary = WholeVocabulary()

    @classmethod
    def initial(cls, config: ModelConfig, name: str) -> tuple[float, float]:
        """Mean and deviation of a parameter's initial values: normal(0, 0.02), biases 0, norm weights 1.

        Projections back into the residual stream are scaled by 1 / sqrt(2 * layers) (Radford et al. 2019, 2.3).
        """
        if name.endswith(("bias", "norm.weight")):
            return (float(name.endswith("weight")), 0.0)
        back = name.endswith(("attn.out.weight", "mlp.down.weight"))
        return (0.0, INITIAL_STD / math.sqrt(2 * config.layers) if back else INITIAL_STD)

    def forward(self, x: Tensor, keys: Keys | None = None) -> Tensor:
        """Tokens int64 [B, S] (hidden states [B, S, H] without embed) -> logits [B, S, V] (hidden without head).

        keys are the positions and dropout's seeds; 0 .. S - 1 and no dropout when not given.
        """
        if self.embed is not None:
            keys = keys or Keys(None, torch.arange(x.shape[1], device=x.device))
            x = self.embed(x, keys)
        for block in self.blocks.values():
            x = block(x, None, keys)
        return x if self.head is None else self.head(x)

    def forward_batch(self, batch: dict[str, Tensor], x: Tensor | None = None) -> Tensor:
        """`forward` of a batch's tokens, or of hidden states x [B, S, H] that an earlier stage gave."""
        x = batch["tokens"] if x is None else x
        return self(x, keys_of(batch, x))

    def prepare_batch(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with what is best computed before it moves to a device: nothing for GPT."""
        return batch

    def loss(self, batch: dict[str, Tensor], label_smoothing: float = 0.0) -> dict[str, LossSum]:
        """`lm`: cross-entropy of `tokens` [B, S] against `targets` [B, S]; -100 is ignored."""
        return self.loss_of(self.forward_batch(batch), batch, label_smoothing)

    def loss_of(self, logits: Tensor, batch: dict[str, Tensor], label_smoothing: float = 0.0) -> dict[str, LossSum]:
        """The loss of logits that forward gave (what the last pipeline stage computes)."""
        targets = batch["targets"].flatten()
        total = self.vocabulary.cross_entropy_sum(logits.flatten(0, 1), targets, label_smoothing)
        return {"lm": LossSum(total, self.count_targets(batch)["lm"])}

    def count_targets(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Targets that count, from the batch alone: the divisor is needed before the backward pass."""
        return {"lm": (batch["targets"] != IGNORED).sum()}

    def scores(self, batch: dict[str, Tensor]) -> dict[str, LossSum]:
        """What evaluation reports: the loss."""
        return self.scores_of(self.forward_batch(batch), batch)

    def scores_of(self, logits: Tensor, batch: dict[str, Tensor]) -> dict[str, LossSum]:
        """`scores` of logits that forward gave."""
        return self.loss_of(logits, batch)
