"""Run a function on several ranks: the product's own; and look at what an engine holds there."""

from torch import Tensor

from disttrain.engines import Held, ProvenEngine
from disttrain.verify.gathering import Brought, Gathering
from disttrain.verify.ranks import RanksFailed, run_ranks

__all__ = ["RanksFailed", "disagreeing", "gathered", "run_ranks"]


def gathered(engine: ProvenEngine, what: Held) -> dict[str, Tensor]:
    """Whole weights or (scaled) gradients by name on rank 0, {} elsewhere; all ranks call it together."""
    return _brought(engine, what).whole.get("all", {})


def disagreeing(engine: ProvenEngine, what: Held) -> list[str]:
    """Names of the parameters whose copies differ between ranks, on rank 0, [] elsewhere; all ranks call it together."""
    return sorted(_brought(engine, what).apart["all"])


def _brought(engine: ProvenEngine, what: Held) -> Brought:
    held = engine.held(what)
    gathering = Gathering(held, engine.groups)
    everything = {"all": gathering.flat(held)}
    return gathering.bring(None, everything, everything)
