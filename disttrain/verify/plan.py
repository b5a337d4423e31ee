"""What a verification changes in a config, and its steps. No torch."""

import hashlib

from disttrain import costs
from disttrain.config.load import dump, with_values
from disttrain.config.problems import Problem, RefusedInput
from disttrain.config.schema import CheckpointConfig, CompressionConfig, Config, LossScaleConfig, OuterConfig, Precision
from disttrain.config.smaller import PruningConfig
from disttrain.config.watching import WatchConfig
from disttrain.verify.batches import GLOBAL_BATCH

STEPS, OVERFLOW, SAVED = 3, 2, 1
"""Number of steps, the one that overflows, and the one after which a checkpoint is written."""

HUNG = "did not finish"
"""What the finding calls a layout whose ranks wait for ever."""


def proof_config(config: Config, precision: Precision, vocab_size: int) -> Config:
    """The user's config as verify runs it: small global batch, on the CPU, in this precision."""
    return with_values(config, {
        "precision": precision,
        "run.device": "cpu",
        "model.vocab_size": config.model.vocab_size or vocab_size,
        "train.global_batch_size": GLOBAL_BATCH,
        "train.micro_batch_size": None,
        "train.steps": max(config.optim.warmup_steps, STEPS),
        "train.tokens": None,
        "optim.epsilon": max(config.optim.epsilon, 1e-8),  # a smaller one makes updates out of rounding errors
        "loss_scale": LossScaleConfig(),
        "compression": CompressionConfig(),
        "outer": OuterConfig(),
        "pruning": PruningConfig(),
        "checkpoint": CheckpointConfig(),
        "watch": WatchConfig(),
    })  # fmt: skip


def rate(config: Config, step: int) -> float:
    """Learning rate of a step: around the config's peak, and another one each time."""
    return config.optim.lr * (0.6 + 0.1 * step)


def changes(config: Config, proof: Config) -> dict[str, object]:
    """Settings of the user's config that verify replaced, by dotted name, with verify's value."""
    before, after = _flat(config.model_dump(mode="json")), _flat(proof.model_dump(mode="json"))
    return {key: value for key, value in after.items() if before.get(key) != value}


def config_hash(config: Config) -> str:
    """SHA-256 of the resolved config as YAML."""
    return hashlib.sha256(dump(config).encode()).hexdigest()


def refuse_too_large(config: Config, free_bytes: int) -> None:
    """Raises RefusedInput when the reference and 8 ranks' float64 states do not fit into memory."""
    parameters = costs.parameter_count(config.model).total
    needed = parameters * 8 * (3 * STEPS + 4 + 8 * 6)
    if needed > free_bytes:
        gib = 2.0**30
        settings = (f"model.layers={config.model.layers}", f"model.hidden_size={config.model.hidden_size}")
        message = f"verify in float64 takes about {needed / gib:.1f} GiB, and {free_bytes / gib:.1f} GiB are free"
        raise RefusedInput([Problem(settings, message, "verify a smaller one of the same kind, for example with "
                                    "model.layers=4 model.hidden_size=128")])  # fmt: skip


def _flat(tree: dict, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
