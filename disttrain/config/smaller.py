"""Settings of training towards a smaller model: weights that become and stay zero, and int8's rounding in training."""

from typing import Annotated, Literal

from pydantic import Field

from disttrain.config.section import Fraction, NonNegative, Positive, Section


class PruningConfig(Section):
    """Weights of matrices that are set to zero while the run goes on, and stay zero (docs/smaller.md)."""

    method: Literal["none", "keep", "magnitude"] = "none"
    """keep: weights that are zero stay zero, as those of a pruned run whose weights this one begins with. magnitude: the
    smallest magnitudes become zero too, more and more of them (Zhu and Gupta 2017)."""
    sparsity: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the weights that are zero in the end."""
    initial_sparsity: Fraction = 0.0
    """Share at begin_step."""
    begin_step: NonNegative = 0
    """Step at which the share begins to grow."""
    end_step: Positive | None = None
    """Step at which it is the final one."""
    every: Positive = 100
    """Steps between two times at which the smallest weights are looked for."""
    scope: Literal["global", "matrix"] = "global"
    """global: the smallest of all matrices together. matrix: the same share of each."""
    embeddings: bool = False
    """Prune embeddings and the output layer as well."""


class QuantizationConfig(Section):
    """Rounding to int8 in training (docs/smaller.md)."""

    aware: bool = False
    """Multiply with weights and inputs rounded as int8-dynamic rounds them, in training and evaluation; gradients pass the
    rounding unchanged (Jacob et al. 2018; Bengio et al. 2013)."""
