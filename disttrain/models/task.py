"""A model of a task: an encoder, and a head that classifies, gives a number, tags words or finds an answer.

The encoder is a BERT's or a GPT's, whole or a pipeline stage of it, or a small one. Shapes: B batch, S tokens, H width of
the encoder, C labels.
"""

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disttrain import task_shapes
from disttrain.config.schema import ModelConfig
from disttrain.config.task import SMALL
from disttrain.models import losses
from disttrain.models.bert import BERT, BERTEmbedding
from disttrain.models.crf import CRF
from disttrain.models.cross_entropy import IGNORED, Vocabulary, WholeVocabulary, cross_entropy_sum
from disttrain.models.distillation import distillation
from disttrain.models.dropout import Dropout, Keys
from disttrain.models.encoders import Convolutions, Recurrent, WordEmbedding
from disttrain.models.gpt import GPT, GPTEmbedding
from disttrain.models.layers import LossSum, blocks, keys_of, layer_norm
from disttrain.models.self_attention import SelfAttention

TENSOR_PLAN = {
    "embed.tokens": "vocab",
    "embed.positions": "replicate",
    "embed.token_types": "replicate",
    "blocks.*.attn.qkv": "column",
    "blocks.*.attn.out": "row",
    "blocks.*.mlp.up": "column",
    "blocks.*.mlp.down": "row",
    "head.*": "replicate",
}
"""Tensor-parallel role of every module with a weight matrix; small encoders take none."""


class Logits(NamedTuple):
    """What a head gives."""

    scores: Tensor
    """[B, C] of classes; [B] numbers; [B, S, C] of tags; [B, S, 2] of the first and last token of an answer."""
    field: CRF | None = None
    """The conditional random field that judges sequences of tags by these scores."""


class TaskHead(nn.Module):
    """Pooling and one linear layer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.kind, self.family = config.head, config.family
        width = task_shapes.width(config)
        self.norm = layer_norm(config) if config.family == "gpt" else None
        self.convolutions = Convolutions(config) if config.family == "text_cnn" else None
        sites = 2 + 3 * config.layers
        self.attention = None
        if config.top_attention_heads:
            read = task_shapes.embedding_size(config) if config.family == "text_cnn" else width
            self.attention = SelfAttention(read, config.top_attention_heads, config.dropout, sites + 1)
        whole = config.head in ("classify", "regress")
        self.pooler = nn.Linear(width, width) if whole and config.family == "bert" else None
        self.dropout = Dropout(config.dropout, sites)
        self.out = nn.Linear(width, task_shapes.outputs(config))
        self.field = CRF(task_shapes.outputs(config)) if config.crf else None

    def forward(self, x: Tensor, mask: Tensor, keys: Keys) -> Logits:
        """Hidden states [B, S, H], and mask [B, S], True at real tokens -> logits."""
        if self.norm is not None:
            x = self.norm(x)
        if self.attention is not None:
            x = self.attention(x, mask, keys) * mask[..., None]
        if self.kind in ("classify", "regress"):
            x = self.dropout(self._pooled(x, mask), keys)
        elif self.family in SMALL or self.kind == "tag":
            x = self.dropout(x, keys)
        y = self.out(x)
        return Logits(y.squeeze(-1) if self.kind == "regress" else y, self.field)

    def _pooled(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, H]: BERT's first token, GPT's last, the largest value of each feature otherwise."""
        if self.pooler is not None:
            return F.tanh(self.pooler(x[:, 0]))
        if self.convolutions is not None:
            return self.convolutions(x, mask)
        if self.family == "gpt":
            last = (mask.sum(1) - 1).clamp(min=0)
            return x[torch.arange(len(x), device=x.device), last]
        return x.masked_fill(~mask[..., None], -torch.inf).amax(1)


class TaskModel(nn.Module):
    """The whole model, or a pipeline stage of it: embed and head may be None and blocks may lack numbers."""

    tensor_plan = TENSOR_PLAN
    tied: dict[str, str] = {}

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.causal = config.family == "gpt"
        self.SCORES = (config.head,) + (() if config.head == "regress" else (f"{config.head}_accuracy",))
        self.embed, self.blocks = _encoder(config)
        self.head: TaskHead | None = TaskHead(config)
        self.vocabulary: Vocabulary = WholeVocabulary()
        self.over_data: Callable[[Tensor], Tensor] = whole
        """Sums counts of examples over those that other ranks look at, at the same time."""

    @classmethod
    def initial(cls, config: ModelConfig, name: str) -> tuple[float, float]:
        """Mean and deviation of a parameter's initial values: those of the encoder's family; in small encoders 0.1 for
        vectors of words, and one over the root of what a unit reads (Glorot and Bengio 2010) elsewhere; biases are 0."""
        if ".field." in name:
            return 0.0, 0.0
        if name.endswith("norm.weight"):
            return 1.0, 0.0
        if config.family not in SMALL:
            return (GPT if config.family == "gpt" else BERT).initial(config, name)
        if "bias" in name:
            return 0.0, 0.0
        if name.startswith("embed.") and "filters" not in name:
            return 0.0, 0.1
        shapes = task_shapes.encoder_shapes(config) | task_shapes.head_shapes(config)
        return 0.0, 1 / prod(shapes[name][1:]) ** 0.5

    def forward(self, x: Tensor, batch: dict[str, Tensor], keys: Keys) -> Logits | Tensor:
        """Tokens int64 [B, S] (hidden states [B, S, H] without embed) -> logits (hidden states without head)."""
        mask = batch["attention_mask"]
        if isinstance(self.embed, WordEmbedding):
            x = self.embed(x, batch.get("characters"), mask, keys)
        elif isinstance(self.embed, BERTEmbedding):
            x = self.embed(x, batch["token_types"], keys)
        elif self.embed is not None:
            x = self.embed(x, keys)
        for block in self.blocks.values():
            # a GPT's words look back only, so padding, which comes last, needs no mask
            x = block(x, None if self.causal else mask, keys)
        return x if self.head is None else self.head(x, mask, keys)

    def forward_batch(self, batch: dict[str, Tensor], x: Tensor | None = None) -> Logits | Tensor:
        """`forward` of a batch's tokens, or of hidden states x [B, S, H] that an earlier stage gave."""
        x = batch["tokens"] if x is None else x
        return self(x, batch, keys_of(batch, x))

    def prepare_batch(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with what is best computed before it moves to a device: nothing."""
        return batch

    def loss(self, batch: dict[str, Tensor], label_smoothing: float = 0.0) -> dict[str, LossSum]:
        """The loss against `targets`; -100 is ignored."""
        return self.loss_of(self._logits(batch), batch, label_smoothing)

    def loss_of(self, logits: Logits, batch: dict[str, Tensor], label_smoothing: float = 0.0) -> dict[str, LossSum]:
        """The loss of logits that forward gave: that of labels, squared error of numbers, the mean of both ends'
        cross-entropy of answers."""
        kind, targets = self.config.head, batch["targets"]
        count = self.count_targets(batch)[kind]
        if kind == "regress":
            return {kind: losses.squared_error(logits.scores, targets, targets != IGNORED)}
        if kind == "answer":
            ends = within(logits.scores, batch["answerable"]).transpose(1, 2).flatten(0, 1)
            return {kind: LossSum(cross_entropy_sum(ends, targets.flatten()) / 2, count)}
        scores = logits.scores
        if logits.field is not None and self.config.loss == "cross_entropy":
            return {kind: logits.field(scores, targets)}
        if logits.field is not None:  # the other losses are of single tags
            scores = logits.field.log_marginals(scores, targets != IGNORED)
        return {kind: self._of_labels(scores.flatten(0, -2), targets.flatten(), label_smoothing, batch)}

    def _of_labels(self, scores: Tensor, targets: Tensor, label_smoothing: float, batch: dict[str, Tensor]) -> LossSum:
        """Of scores [N, C] against int64 [N], by `model.loss`; with a teacher's probabilities, its share beside."""
        config = self.config
        if config.loss == "focal":
            alpha = config.focal_alpha
            factors = None if alpha is None else [1 - alpha, *[alpha] * (scores.shape[1] - 1)]
            return losses.focal(scores, targets, config.focal_gamma, factors)
        if config.loss == "ghm":
            counts = losses.ghm_counts(scores, targets, config.ghm_bins)
            return losses.ghm(scores, targets, losses.ghm_density(counts, None, reduce=self.over_data))
        if "soft_targets" in batch and self.training:
            soft = batch["soft_targets"].flatten(0, -2)
            return distillation(scores, soft, targets, config.soft_weight, config.temperature, label_smoothing)
        return losses.cross_entropy(scores, targets, label_smoothing)

    def count_targets(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Targets that count, from the batch alone: the divisor is needed before the backward pass."""
        counts = (batch["targets"] != IGNORED).sum()
        return {self.config.head: counts // 2 if self.config.head == "answer" else counts}

    def scores(self, batch: dict[str, Tensor]) -> dict[str, LossSum]:
        """What evaluation reports: the loss, and how many labels, or whole answers, are right (sum, of count)."""
        return self.scores_of(self._logits(batch), batch)

    def _logits(self, batch: dict[str, Tensor]) -> Logits:
        logits = self.forward_batch(batch)
        assert isinstance(logits, Logits)  # a stage without the head has no loss
        return logits

    def scores_of(self, logits: Logits, batch: dict[str, Tensor]) -> dict[str, LossSum]:
        """`scores` of logits that forward gave."""
        found, kind = self.loss_of(logits, batch), self.config.head
        if kind == "regress":
            return found
        targets = batch["targets"]
        right = (self.predictions_of(logits, batch)["best"] == targets) & (targets != IGNORED)
        right = right.all(-1) if kind == "answer" else right
        return found | {f"{kind}_accuracy": LossSum(right.sum(), found[kind].count)}

    def predictions_of(self, logits: Logits, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`best`: classes [B], numbers [B], tags [B, S] or ends of answers [B, 2]; `scores`: what they were chosen by."""
        kind, scores = self.config.head, logits.scores
        if kind == "regress":
            return {"best": scores, "scores": scores}
        if kind == "answer":
            scores = within(scores, batch["answerable"])
            return {"best": scores.argmax(1), "scores": scores}
        if logits.field is not None:
            return {"best": logits.field.decode(scores, batch["targets"] != IGNORED), "scores": scores}
        return {"best": scores.argmax(-1), "scores": scores}


def whole(counts: Tensor) -> Tensor:
    """All examples are here; data parallelism gives a model the sum over its ranks in the place of this."""
    return counts


def within(scores: Tensor, answerable: Tensor) -> Tensor:
    """Scores [B, S, 2] with the least number where answerable [B, S] is False: no answer begins or ends there."""
    return scores.masked_fill(~answerable[..., None], torch.finfo(scores.dtype).min)


def _encoder(config: ModelConfig) -> tuple[nn.Module | None, nn.ModuleDict]:
    if config.family == "gpt":
        return GPTEmbedding(config), blocks(config, causal=True)
    if config.family == "bert":
        return BERTEmbedding(config), blocks(config, causal=False)
    layers = range(config.layers if config.family == "rnn" else 0)
    return WordEmbedding(config), nn.ModuleDict({str(i): Recurrent(config, i) for i in layers})
