"""How many weights are zero at which step, and of which parameters: pure functions, no torch.

Gradual pruning as in Zhu and Gupta 2017, "To prune, or not to prune", section 3.
"""

from collections.abc import Sequence

from disttrain.config.smaller import PruningConfig


def cubic(step: int, begin: int, end: int, initial: float, final: float) -> float:
    """Share of zeros at a step: final + (initial - final) (1 - (step - begin) / (end - begin))^3, equation 1 of the paper;
    `initial` before `begin`, `final` from `end` on."""
    left = 1 - (min(max(step, begin), end) - begin) / (end - begin)
    return final + (initial - final) * left**3


def due(pruning: PruningConfig, step: int) -> float | None:
    """The share of zeros to reach after the update of this step, counted from 1; None where nothing is pruned after it.

    That is every `every` steps from `begin_step` on, and at `end_step`. It goes on after the end, where it changes
    nothing, save that an update which fp16 had skipped is made up for.
    """
    final, end, begin = pruning.sparsity, pruning.end_step, pruning.begin_step
    if pruning.method != "magnitude" or final is None or end is None:
        return None
    if step < begin or ((step - begin) % pruning.every and step != end):
        return None
    return cubic(step, begin, end, pruning.initial_sparsity, final)


def prunable(name: str, shape: Sequence[int], embeddings: bool) -> bool:
    """Whether a parameter is pruned: a matrix, and no embedding or output layer unless these are asked for."""
    return len(shape) > 1 and (embeddings or not name.startswith(("embed.", "head.decoder.")))
