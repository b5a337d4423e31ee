"""Faults as people reported them from other toolkits, planted into ours: verify must catch each in the right phase."""

from tests.verify.mutants.context import CONTEXT
from tests.verify.mutants.data import DATA
from tests.verify.mutants.mutant import Mutant
from tests.verify.mutants.pipeline import PIPELINE
from tests.verify.mutants.state import STATE
from tests.verify.mutants.tensor import TENSOR

MUTANTS: list[Mutant] = [*TENSOR, *DATA, *PIPELINE, *CONTEXT, *STATE]

__all__ = ["MUTANTS", "Mutant"]
