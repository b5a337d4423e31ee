"""Settings of the optimizer and of the learning rate (docs/optimisers.md has the table of optimizers)."""

from typing import Annotated, Literal

from pydantic import Field

from disttrain.config.section import Fraction, NonNegative, Section

OptimizerName = Literal["adamw", "lamb", "sgd", "adagrad", "rmsprop", "adam", "radam", "adafactor", "muon"]
Schedule = Literal["constant", "cosine", "linear", "inverse_sqrt", "wsd"]

MOMENTUM: dict[OptimizerName, float] = {"sgd": 0.9, "rmsprop": 0.0, "muon": 0.95}
"""The momentum where none is given: as in training of deep nets (Sutskever et al. 2013), as in torch, as its author's."""


class OptimConfig(Section):
    """Optimizer and learning-rate schedule."""

    name: OptimizerName = "adamw"
    """adamw (Loshchilov and Hutter 2019); lamb (You et al. 2020), whose steps are as long as each matrix's weights say; sgd
    with momentum; adagrad (Duchi et al. 2011); rmsprop (Tieleman and Hinton 2012); adam (Kingma and Ba 2015); radam (Liu et
    al. 2020); adafactor (Shazeer and Stern 2018); muon (Jordan et al. 2024) for the blocks' matrices, with adamw for the
    rest. Decay is applied to matrices only."""
    lr: Annotated[float, Field(gt=0)] = 3e-4
    """Peak learning rate. For adafactor relative to the size of each parameter, and never more than 1 / sqrt(step)."""
    beta1: Fraction = 0.9
    """Decay of the first moment (adamw, lamb, adam, radam, and muon's adamw)."""
    beta2: Fraction = 0.95
    """Decay of the second moment (likewise)."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator (likewise, and adagrad and rmsprop); the least denominator of adafactor."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Weight decay of matrices and embeddings. adamw, lamb, radam, adafactor, muon: decoupled, the share of a weight that
    goes when the learning rate is 1. sgd, adagrad, rmsprop, adam: times the weight it is added to the gradient."""
    momentum: Fraction | None = None
    """Decay of the running gradient (sgd, rmsprop, muon); 0.9, 0 and 0.95 when not given. sgd and rmsprop add gradients up,
    muon averages them."""
    nesterov: bool | None = None
    """Look ahead by a step of momentum (sgd, muon; Sutskever et al. 2013); off for sgd and on for muon when not given."""
    alpha: Fraction = 0.99
    """Decay of rmsprop's mean square."""
    centered: bool = False
    """Take the square of the mean gradient off rmsprop's mean square (Graves 2013)."""
    ns_steps: Annotated[int, Field(gt=0, lt=100)] = 5
    """Newton-Schulz steps by which muon makes a matrix nearly orthogonal."""
    implementation: Literal["auto", "fused", "foreach"] = "auto"
    """torch's kernel for the update of adamw and adam; auto takes fused."""
    schedule: Schedule = "cosine"
    """Shape of the learning rate after warm-up. wsd: warm-up, stable, decay."""
    warmup_steps: NonNegative = 0
    """Steps of linear warm-up from zero."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Last learning rate as a share of the peak (cosine, linear, wsd)."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the steps that wsd spends decaying."""

    @property
    def state(self) -> tuple[str, ...]:
        """Names of what is kept of every parameter between steps, counts apart, as in torch. adafactor has the first two of
        matrices and the third of vectors; muon the first of the blocks' matrices and the others of the rest."""
        match self.name:
            case "sgd":
                return ("momentum_buffer",) if self.running else ()
            case "adagrad":
                return ("sum",)
            case "rmsprop":
                kept = {"square_avg": True, "momentum_buffer": self.running > 0, "grad_avg": self.centered}
                return tuple(name for name, there in kept.items() if there)
            case "adafactor":
                return ("row_var", "col_var", "variance")
            case "muon":
                return ("momentum_buffer", "exp_avg", "exp_avg_sq")
        return ("exp_avg", "exp_avg_sq")

    @property
    def running(self) -> float:
        """The momentum, where the setting leaves it open; 0 for optimizers without one."""
        return MOMENTUM.get(self.name, 0.0) if self.momentum is None else self.momentum

    @property
    def looks_ahead(self) -> bool:
        """Whether momentum is Nesterov's, where the setting leaves it open."""
        return self.name == "muon" if self.nesterov is None else self.nesterov


def is_hidden(name: str, dimensions: int) -> bool:
    """Whether a parameter is a matrix between hidden states, and not an embedding, a head or a vector: muon's."""
    return name.startswith("blocks.") and dimensions == 2
