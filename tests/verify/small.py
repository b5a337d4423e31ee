"""The model of these tests: as small as all axes allow, with dropout, smoothing and uneven targets."""

from disttrain.config.load import with_values
from disttrain.config.schema import Config, DataConfig, ModelConfig, OptimConfig, Precision, TrainConfig
from disttrain.verify.batches import synthetic
from disttrain.verify.plan import STEPS, proof_config
from disttrain.verify.proof import Proof

SEQUENCE, VOCAB = 16, 61


def config_for(family: str = "gpt", precision: Precision = "fp64", **values: object) -> Config:
    """Four layers of 16, four heads: every axis can be 4, and a pipeline of 2 has two stages a rank."""
    model = ModelConfig(
        family=family, layers=4, hidden_size=16, heads=4, ffn_hidden_size=32, max_positions=SEQUENCE, vocab_size=VOCAB,
        dropout=0.1, layer_norm_epsilon=1e-5,
    )  # fmt: skip
    config = Config(
        model=model,
        data=DataConfig(corpus="python-docs", sequence_length=SEQUENCE),
        train=TrainConfig(steps=5, label_smoothing=0.1),
        optim=OptimConfig(lr=1e-2),
    )
    return proof_config(with_values(config, values), precision, VOCAB)


def proof_for(family: str = "gpt", precision: Precision = "fp64", **values: object) -> Proof:
    """A proof of it on random tokens."""
    config = config_for(family, precision, **values)
    return Proof(config, synthetic(config, STEPS), precision, timeout_s=60)
