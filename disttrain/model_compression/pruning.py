"""`disttrain prune`: a smaller run out of a trained one, or one whose smallest weights are zero."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from disttrain.config.load import with_values
from disttrain.config.presets import shape_of
from disttrain.config.problems import Problem, RefusedInput
from disttrain.config.schema import Config
from disttrain.model_compression import magnitude, structured
from disttrain.model_compression.evaluation import training_batches
from disttrain.model_compression.folder import refuse_used, weights_of, write_run
from disttrain.model_compression.importance import Importance, by_magnitude, by_taylor
from disttrain.tasks.trained import Trained, load_trained, trained_checkpoint

Measure = Literal["magnitude", "taylor"]
BATCHES = 8
"""Of training sequences, whose gradients say what matters, where no number is given."""


@dataclass(frozen=True)
class Pruning:
    """What to remove: whole structures, or single weights."""

    layers: int | None = None
    """Layers that stay; all when not given."""
    heads: int | None = None
    """Heads of each layer that stay."""
    ffn_hidden_size: int | None = None
    """Feed-forward neurons of each layer that stay."""
    importance: Measure = "magnitude"
    batches: int | None = None
    """Batches of 16 training sequences for importance=taylor."""
    sparsity: float | None = None
    """Share of single weights that become zero."""
    scope: Literal["global", "matrix"] = "global"
    embeddings: bool = False

    @property
    def structured(self) -> bool:
        """Whether whole structures leave."""
        return any(size is not None for size in (self.layers, self.heads, self.ffn_hidden_size))


@dataclass(frozen=True)
class Pruned:
    """What came out."""

    parameters_before: int
    parameters: int
    zeros: float
    """Share of the elements of all matrices."""
    about: dict[str, Any]
    """What stayed, as pruned.json says it."""


def prune(run: Path, out: Path, asked: Pruning) -> Pruned:
    """Write the pruned run. Raises RefusedInput, everything at once, before anything is written."""
    config, _ = trained_checkpoint(run)
    found = [*_problems(config, asked), *refuse_used(out)]
    if found:
        raise RefusedInput(found)
    trained = load_trained(run)
    weights = weights_of(trained)
    source: dict[str, Any] = {"run": str(run), "step": trained.step}
    model = config.model
    if asked.structured:
        kept = _kept(trained, asked)
        model, weights = structured.shrunk_config(model, kept), structured.shrink(model, weights, kept)
        stay = {"layers": kept.layers, "heads": list(kept.heads.values()), "neurons": list(kept.neurons.values())}
        about = {**source, "importance": asked.importance, **stay}
    else:
        assert asked.sparsity is not None  # refused otherwise
        weights = magnitude.prune(weights, asked.sparsity, asked.scope == "matrix", asked.embeddings)
        about = {**source, "sparsity": asked.sparsity, "scope": asked.scope, "embeddings": asked.embeddings}
    write_run(out, with_values(trained.config, {"model": model}), weights, about)
    sizes = [sum(value.numel() for value in held.values()) for held in (weights_of(trained), weights)]
    return Pruned(sizes[0], sizes[1], magnitude.zeros(weights), about)


def _kept(trained: Trained, asked: Pruning) -> structured.Kept:
    model = trained.config.model
    shape = shape_of(model)
    importance = _importance(trained, asked)
    return structured.choose(model, importance, asked.layers or shape.layers, asked.heads or shape.heads,
                             asked.ffn_hidden_size or shape.ffn_hidden_size)  # fmt: skip


def _importance(trained: Trained, asked: Pruning) -> Importance:
    if asked.importance == "magnitude":
        return by_magnitude(trained.config.model, weights_of(trained))
    return by_taylor(trained.model, training_batches(trained, asked.batches or BATCHES))


def _problems(config: Config, asked: Pruning) -> Iterator[Problem]:
    model = config.model
    if not asked.structured and asked.sparsity is None:
        yield Problem(("--layers", "--heads", "--ffn-hidden-size", "--sparsity"), "nothing says what to remove",
                      "say how many layers, heads or neurons stay, or what share of the weights becomes zero")  # fmt: skip
    if asked.structured and asked.sparsity is not None:
        yield Problem((f"--sparsity {asked.sparsity:g}", "--layers, --heads, --ffn-hidden-size"),
                      "structures and single weights are removed one after the other",
                      "prune once, and prune what came out again")  # fmt: skip
    if asked.structured:
        yield from _sizes(config, asked)
    elif asked.importance == "taylor":
        yield Problem(("--importance taylor",), "single weights are removed by their magnitude",
                      "leave --importance out, or say how many heads stay")  # fmt: skip
    if asked.batches is not None and asked.importance != "taylor":
        yield Problem((f"--batches {asked.batches}", f"--importance {asked.importance}"),
                      "magnitudes need no batches", "leave --batches out or use --importance taylor")  # fmt: skip
    if asked.sparsity is None and (asked.scope != "global" or asked.embeddings):
        yield Problem(("--scope", "--embeddings"), "these choose single weights", "give --sparsity, or leave them out")
    if asked.structured and model.source is not None:
        yield Problem((f"model.source={model.source}",), "where its heads and neurons are is not known",
                      "use --sparsity, which every model takes")  # fmt: skip


def _sizes(config: Config, asked: Pruning) -> Iterator[Problem]:
    model = config.model
    there = {"layers": model.layers, "heads": model.heads, "ffn_hidden_size": model.ffn_hidden_size or 0}
    wanted = {name: getattr(asked, name) for name in there if getattr(asked, name) is not None}
    for name, stay in wanted.items():
        if not 0 < stay <= there[name]:
            option = f"--{name.replace('_', '-')} {stay}"
            yield Problem((option, f"model.{name}={there[name]}"), "so many cannot stay",
                          f"give a number from 1 to {there[name]}")  # fmt: skip
    if all(stay == there[name] for name, stay in wanted.items()):
        options = tuple(f"--{name.replace('_', '-')} {stay}" for name, stay in wanted.items())
        yield Problem(options, "that is what the model has: nothing would be removed", "give a smaller number")
