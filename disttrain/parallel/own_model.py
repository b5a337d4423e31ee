"""What can be known of a user's own model before a run: whether it can be built, split and cut, and what it costs."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from disttrain.config.load import with_values
from disttrain.config.problems import Problem, RefusedInput
from disttrain.config.schema import Config, ModelConfig
from disttrain.models import build_model
from disttrain.models.layers import attending
from disttrain.parallel.collectives import Traffic
from disttrain.parallel.groups import Group
from disttrain.parallel.tensor import apply_tensor_parallel

ANY_VOCABULARY = 1024
"""Stands for a vocabulary that only the tokenizer will tell."""


def problems(config: Config) -> list[Problem]:
    """Why `model.source` cannot be trained under this layout; [] if it can. Builds it without storage."""
    source, tensor = f"model.source={config.model.source}", config.parallel.tensor
    shaped = with_values(config, {"model.vocab_size": config.model.vocab_size or ANY_VOCABULARY}).model
    try:
        model = build_model(shaped, seed=0, device="meta")
    except RefusedInput as refused:
        return refused.problems
    except Exception as error:  # whatever the user's code raises
        return [Problem((source,), f"the model cannot be built: {type(error).__name__}: {error}", "see docs/verify.md")]
    numbers = list(model.blocks) if isinstance(model.blocks, nn.ModuleDict) else []
    if numbers != [str(i) for i in range(config.model.layers)]:
        message = f"its blocks are {', '.join(numbers) or 'no nn.ModuleDict'}, which is not one for each layer"
        settings = (source, f"model.layers={config.model.layers}")
        return [Problem(settings, message, "keep self.blocks = nn.ModuleDict({'0': ..., '1': ...})")]
    try:
        apply_tensor_parallel(model, Group(tensor, 0, tuple(range(tensor)), None, Traffic()), config.parallel.sequence)
    except ValueError as error:
        return [Problem((source, f"parallel.tensor={tensor}"), str(error), "mend its tensor_plan or use another size")]
    if config.parallel.context > 1 and not attending(model):
        message = "none of its modules has an `attend`, so its attention would see its own part of a sequence only"
        return [Problem((source, f"parallel.context={config.parallel.context}"), message,
                        "call attention through self.attend (docs/verify.md), or use parallel.context=1")]  # fmt: skip
    return []


def measure(model_config: ModelConfig, sequence_length: int) -> tuple[int, float]:
    """(parameters, FLOPs of one sequence's forward pass), counted by torch's flop counter without storage.

    Attention counts as a whole square. A BERT predicts at every seventh token here.
    """
    model = build_model(model_config, seed=0, device="meta")
    tokens = torch.zeros(1, sequence_length, dtype=torch.int64, device="meta")
    batch = {"tokens": tokens, "token_types": tokens, "attention_mask": tokens.bool(),
             "mlm_positions": tokens[0, : sequence_length // 7]}  # fmt: skip
    with FlopCounterMode(display=False) as counter:
        model.eval().forward_batch(batch)
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops()
