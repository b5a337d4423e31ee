"""What a student learns from its teachers: their outputs, hidden states and attention. Each loss a sum and a count.

Shapes: N examples, C classes, B batch, S sequence, H hidden size (Hs the student's, Ht the teacher's), A heads. Inputs are
widened to float32 (float64 stays): see `disttrain.models.losses`. Teachers carry no gradient.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from disttrain.models.cross_entropy import IGNORED, cross_entropy_sum
from disttrain.models.layers import LossSum
from disttrain.models.losses import widened


@torch.no_grad()
def soft_targets(
    teachers: Sequence[Tensor], temperature: float = 1.0, weights: Sequence[float] | None = None
) -> Tensor:
    """softmax(z / T) of each teacher's logits [N, C], averaged with weights (equal when not given): [N, C].

    The arithmetic mean of the predictions, as an ensemble's (Hinton et al. 2015, section 2). Weights are scaled to sum to
    1. Raises ValueError for no teacher, for as many weights as there are not teachers, and for a negative one.
    """
    _positive(temperature)
    weights = [1.0] * len(teachers) if weights is None else weights
    if not teachers or len(weights) != len(teachers) or min(weights) < 0 or sum(weights) <= 0:
        raise ValueError(
            f"{len(teachers)} teachers with weights {list(weights)}: give each a weight that is not negative"
        )
    parts = [
        (widened(z) / temperature).softmax(-1) * (w / sum(weights)) for z, w in zip(teachers, weights, strict=True)
    ]
    return torch.stack(parts).sum(0)


def soft_cross_entropy(
    logits: Tensor, soft: Tensor, temperature: float = 1.0, counted: Tensor | None = None
) -> LossSum:
    """T^2 times the cross-entropy of softmax(z / T) of logits [N, C] against soft targets [N, C], nats, summed.

    T^2 keeps the size of the gradient as T changes (Hinton et al. 2015, section 2). `counted`, bool [N], says which rows
    count. The loss exceeds T^2 times the Kullback-Leibler divergence by the targets' entropy, which is constant.
    """
    _positive(temperature)
    rows = -(widened(soft.detach()) * (widened(logits) / temperature).log_softmax(-1)).sum(-1)
    counted = torch.ones_like(rows, dtype=torch.bool) if counted is None else counted
    return LossSum(temperature**2 * rows.where(counted, 0).sum(), counted.sum())


def distillation(
    logits: Tensor, soft: Tensor, targets: Tensor | None, weight: float = 0.5, temperature: float = 1.0,
    label_smoothing: float = 0.0,
) -> LossSum:  # fmt: skip
    """(1 - w) CE(targets) + w T^2 CE(soft targets) of a student's logits [N, C] (Hinton et al. 2015), summed, nats.

    `soft` [N, C] is what `soft_targets` gave at the same temperature. targets are int64 [N]; rows with -100 count in
    neither part. Without targets (None) every row counts and the weight must be 1. Smoothing is of the first part only.
    Raises ValueError for a weight outside 0 to 1.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight={weight} is outside 0 to 1")
    if targets is None:
        if weight != 1:
            raise ValueError(f"weight={weight} needs targets: without them it is 1")
        return soft_cross_entropy(logits, soft, temperature)
    taught = soft_cross_entropy(logits, soft, temperature, targets != IGNORED)
    hard = cross_entropy_sum(logits, targets, label_smoothing)
    return LossSum((1 - weight) * hard + weight * taught.sum, taught.count)


def uniform_layers(student: int, teacher: int) -> dict[int, int]:
    """Which layer of the teacher each of the student's learns from, numbers of outputs: 0 is the embedding.

    TinyBERT's g(m) = m * teacher / student (Jiao et al. 2020, section 3.1), so that the last learns from the last. Raises
    ValueError where the student's number of layers does not divide the teacher's.
    """
    if student < 1 or teacher % student:
        raise ValueError(f"{student} layers of a student do not divide {teacher} of a teacher")
    return {m: m * teacher // student for m in range(student + 1)}


class Projections(nn.ModuleDict):
    """A learned linear map without bias from the student's width to the teacher's for each layer of the student.

    FitNets' regressor (Romero et al. 2015, section 2.2); TinyBERT's W_h and W_e, one of each layer of its own. They are
    trained with the student and left out of it when it is saved.
    """

    def __init__(self, layers: Sequence[int], student_size: int, teacher_size: int):
        super().__init__({str(m): nn.Linear(student_size, teacher_size, bias=False) for m in layers})

    def forward(self, layer: int, x: Tensor) -> Tensor:
        """[B, S, Hs] -> [B, S, Ht], by the map of that layer."""
        return self[str(layer)](x)


def hidden_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> LossSum:
    """Squared error of hidden states [B, S, H], mean over features, summed over tokens; the count is of tokens.

    TinyBERT's equations 8 and 9 (Jiao et al. 2020) for states that are projected already. mask, bool [B, S], is True for
    a real token. Raises ValueError for states of two shapes.
    """
    _same_shape(student, teacher)
    rows = (widened(student) - widened(teacher.detach())).square().mean(-1)
    mask = torch.ones_like(rows, dtype=torch.bool) if mask is None else mask
    return LossSum(rows.where(mask, 0).sum(), mask.sum())


def attention_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> LossSum:
    """Squared error of attention maps [B, A, S, S] (queries, keys), mean over heads and keys, summed over queries.

    TinyBERT's equation 7 (Jiao et al. 2020), whose maps are scores before the softmax; weights after it do as well.
    mask, bool [B, S], is True for a real token: others count neither as queries nor as keys, so that a sentence's loss
    does not depend on its padding. The count is of queries. Raises ValueError for maps of two shapes.
    """
    _same_shape(student, teacher)
    batch, heads, size, _ = student.shape
    mask = torch.ones(batch, size, dtype=torch.bool, device=student.device) if mask is None else mask
    pairs = (mask[:, :, None] & mask[:, None, :])[:, None].expand_as(student)
    differences = torch.where(pairs, widened(student), 0) - torch.where(pairs, widened(teacher.detach()), 0)
    keys = mask.sum(1).clamp(min=1)
    return LossSum((differences.square().sum((1, 2, 3)) / (heads * keys)).sum(), mask.sum())


def features(
    student: Sequence[Tensor], teacher: Sequence[Tensor], layers: Mapping[int, int], projections: Projections | None,
    mask: Tensor | None = None,
) -> LossSum:  # fmt: skip
    """`hidden_mse` of the chosen layers, added up; the count is of tokens, once.

    student and teacher are the outputs [B, S, Hs] and [B, S, Ht] of all their layers in order, the embedding's first;
    `layers` pairs them as `uniform_layers` does. Without projections both widths must be one.
    """
    losses = []
    for own, theirs in layers.items():
        x = student[own] if projections is None else projections(own, student[own])
        losses.append(hidden_mse(x, teacher[theirs], mask))
    if not losses:
        raise ValueError("no layers are chosen")
    return LossSum(torch.stack([loss.sum for loss in losses]).sum(), losses[0].count)


def _positive(temperature: float) -> None:
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} is not positive")


def _same_shape(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(f"the student's {list(student.shape)} and the teacher's {list(teacher.shape)} differ in shape")
