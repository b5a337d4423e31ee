"""BERT (Devlin et al. 2019): a post-norm encoder with a masked-token head and a next-sentence head."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disttrain.config.presets import shape_of
from disttrain.config.schema import ModelConfig
from disttrain.models.cross_entropy import IGNORED, Vocabulary, WholeVocabulary, cross_entropy_sum
from disttrain.models.dropout import Dropout, Keys
from disttrain.models.layers import INITIAL_STD, LossSum, blocks, keys_of, layer_norm

TENSOR_PLAN = {
    "embed.tokens": "vocab",
    "embed.positions": "replicate",
    "embed.token_types": "replicate",
    "blocks.*.attn.qkv": "column",
    "blocks.*.attn.out": "row",
    "blocks.*.mlp.up": "column",
    "blocks.*.mlp.down": "row",
    "head.transform": "replicate",
    "head.decoder": "vocab",
    "head.pooler": "replicate",
    "head.next_sentence": "replicate",
}
"""Tensor-parallel role of every module with a weight matrix (fnmatch patterns on module names)."""

TIED = {"head.decoder.weight": "embed.tokens.weight"}
"""Parameters that share another's values; a pipeline stage with only the first name keeps a copy."""


class BERTEmbedding(nn.Module):
    """Token, position and segment embedding, layer norm, dropout."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        shape = shape_of(config)
        self.dropout = Dropout(config.dropout, 0)
        self.tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.positions = nn.Embedding(shape.max_positions, shape.hidden_size)
        self.token_types = nn.Embedding(2, shape.hidden_size)
        self.norm = layer_norm(config)

    def forward(self, tokens: Tensor, token_types: Tensor, keys: Keys) -> Tensor:
        """Two int64 [B, S] -> [B, S, H]; keys name the positions."""
        x = self.tokens(tokens) + self.positions(keys.positions) + self.token_types(token_types)
        return self.dropout(self.norm(x), keys)


class BERTLogits(NamedTuple):
    """What the two heads predict."""

    mlm: Tensor
    """[N, V] at the given positions, or [B, S, V] at all."""
    nsp: Tensor
    """[B, 2]: sentence B follows A, or is a random one."""


class BERTHead(nn.Module):
    """Masked-token head (dense, GELU, norm, tied decoder with its own bias), pooler and next-sentence head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        shape = shape_of(config)
        self.transform = nn.Linear(shape.hidden_size, shape.hidden_size)
        self.norm = layer_norm(config)
        self.decoder = nn.Linear(shape.hidden_size, shape.vocab_size)
        self.pooler = nn.Linear(shape.hidden_size, shape.hidden_size)
        self.next_sentence = nn.Linear(shape.hidden_size, 2)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> BERTLogits:
        """Hidden states [B, S, H] -> logits; positions int64 [N] index the flattened B * S tokens."""
        pooled = F.tanh(self.pooler(x[:, 0]))
        if positions is not None:
            x = x.flatten(0, 1)[positions]
        mlm = self.decoder(self.norm(F.gelu(self.transform(x))))
        return BERTLogits(mlm, self.next_sentence(pooled))


class BERT(nn.Module):
    """The whole model, or a pipeline stage of it: embed and head may be None and blocks may lack numbers."""

    tensor_plan = TENSOR_PLAN
    tied = TIED
    causal = False
    SCORES = ("mlm", "nsp", "mlm_accuracy", "nsp_accuracy")
    """Names that `scores` gives."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed: BERTEmbedding | None = BERTEmbedding(config)
        self.blocks = blocks(config, causal=False)
        self.head: BERTHead | None = BERTHead(config)
        self.vocabulary: Vocabulary = WholeVocabulary()

    @classmethod
    def initial(cls, config: ModelConfig, name: str) -> tuple[float, float]:
        """Mean and deviation of a parameter's initial values: normal(0, 0.02), biases 0, norm weights 1."""
        if name.endswith(("bias", "norm.weight")):
            return (float(name.endswith("weight")), 0.0)
        return (0.0, INITIAL_STD)

    def forward(
        self,
        x: Tensor,
        token_types: Tensor | None = None,
        attention_mask: Tensor | None = None,
        mlm_positions: Tensor | None = None,
        keys: Keys | None = None,
    ) -> BERTLogits | Tensor:
        """Tokens int64 [B, S] (hidden states without embed) -> both heads' logits (hidden states without head).

        attention_mask is bool [B, S], True for a real token; token_types int64 [B, S], zeros when not given;
        mlm_positions int64 [N] restricts the masked-token logits to those of the flattened B * S tokens; keys are the
        positions and dropout's seeds, 0 .. S - 1 and no dropout when not given.
        """
        if self.embed is not None:
            keys = keys or Keys(None, torch.arange(x.shape[1], device=x.device))
            x = self.embed(x, x.new_zeros(x.shape) if token_types is None else token_types, keys)
        for block in self.blocks.values():
            x = block(x, attention_mask, keys)
        return x if self.head is None else self.head(x, mlm_positions)

    def prepare_batch(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add `mlm_positions` int64 [N]: where the flattened targets are not ignored.

        Only these positions go through the masked-token head, about a seventh of them. N must be known to the host, so
        on a GPU this waits for the device: call it on the host's batch, before it is moved.
        """
        if "mlm_positions" in batch:
            return batch
        return {**batch, "mlm_positions": (batch["targets"].flatten() != IGNORED).nonzero().squeeze(1)}

    def loss(self, batch: dict[str, Tensor], label_smoothing: float = 0.0) -> dict[str, LossSum]:
        """`mlm` and `nsp`: cross-entropy against `targets` [B, S] and `next_sentence` [B]; -100 is ignored.

        Smoothing applies to mlm only.
        """
        batch = self.prepare_batch(batch)
        return self.loss_of(self._logits(batch), batch, label_smoothing)

    def forward_batch(self, batch: dict[str, Tensor], x: Tensor | None = None) -> BERTLogits | Tensor:
        """`forward` of a prepared batch's tokens, or of hidden states x [B, S, H] that an earlier stage gave."""
        x = batch["tokens"] if x is None else x
        keys = keys_of(batch, x)
        return self(x, batch["token_types"], batch["attention_mask"], batch["mlm_positions"], keys)

    def scores(self, batch: dict[str, Tensor]) -> dict[str, LossSum]:
        """What evaluation reports: both losses, and how many predictions of each head are right (sum, of count)."""
        batch = self.prepare_batch(batch)
        return self.scores_of(self._logits(batch), batch)

    def _logits(self, batch: dict[str, Tensor]) -> BERTLogits:
        logits = self.forward_batch(batch)
        assert isinstance(logits, BERTLogits)  # a stage without the head has no loss
        return logits

    def scores_of(self, logits: BERTLogits, batch: dict[str, Tensor]) -> dict[str, LossSum]:
        """`scores` of logits that forward gave at the prepared batch's `mlm_positions`."""
        losses = self.loss_of(logits, batch)
        masked = batch["targets"].flatten()[batch["mlm_positions"]]
        right = {
            "mlm": (self.vocabulary.argmax(logits.mlm) == masked).sum(),
            "nsp": (logits.nsp.argmax(-1) == batch["next_sentence"]).sum(),
        }
        return losses | {f"{name}_accuracy": LossSum(right[name], losses[name].count) for name in losses}

    def loss_of(self, logits: BERTLogits, batch: dict[str, Tensor], label_smoothing: float = 0.0) -> dict[str, LossSum]:
        """The loss of logits that forward gave at the prepared batch's `mlm_positions`."""
        counts = self.count_targets(batch)
        targets = batch["targets"].flatten()[batch["mlm_positions"]]
        return {
            "mlm": LossSum(self.vocabulary.cross_entropy_sum(logits.mlm, targets, label_smoothing), counts["mlm"]),
            "nsp": LossSum(cross_entropy_sum(logits.nsp, batch["next_sentence"]), counts["nsp"]),
        }

    def count_targets(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Targets that count, from the batch alone: the divisors are needed before the backward pass."""
        return {
            "mlm": (batch["targets"] != IGNORED).sum(),
            "nsp": (batch["next_sentence"] != IGNORED).sum(),
        }
