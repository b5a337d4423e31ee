"""Gathers what there is to know about a world."""

import os
from dataclasses import dataclass, field

from disttrain.config.problems import Problem, RefusedInput
from disttrain.doctor.contradictions import contradictions, notes, why_not_met
from disttrain.doctor.facts import RankFacts, gather_facts, rank_facts
from disttrain.doctor.links import LinkSpeed, measure_links
from disttrain.launch import RankInfo
from disttrain.launch.mpi import locate


@dataclass(frozen=True)
class Diagnosis:
    """A world: its ranks, its links and what is wrong with it; the same on every rank but for `info`."""

    info: RankInfo | None
    """This rank's place; None when the environment contradicts itself."""
    ranks: list[RankFacts] = field(default_factory=list)
    links: list[LinkSpeed] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def is_for_this_rank(self) -> bool:
        """Whether this rank shows it: the first one, and the first of each node where the ranks did not meet."""
        if self.info is None or self.info.rank == 0:
            return True
        return self.info.local_rank == 0 and len(self.ranks) < self.info.world_size


def diagnose(info: RankInfo | None = None, timeout_s: float = 60) -> Diagnosis:
    """Look at this world; all its ranks call this together, and wait at most `timeout_s` seconds for each other.

    Without `info` the environment is asked. What is wrong is returned in `problems`, never raised: a contradictory
    environment, ranks that do not meet, ranks that differ.
    """
    if info is None:
        try:
            info = locate(os.environ)
        except RefusedInput as refused:
            return Diagnosis(None, problems=refused.problems)
    from disttrain.parallel import world

    world.share_cores(info)  # as `disttrain train` does
    own = rank_facts(info)
    if info.world_size == 1:
        return Diagnosis(info, [own], [], notes(info, [own]), contradictions(info, [own]))
    try:
        # Gloo first: it also works where ranks disagree about devices, which is to be found out here.
        world.start(info, "cpu", timeout_s)
    except RefusedInput as refused:
        return Diagnosis(info, [own], [], notes(info, [own]), [*refused.problems, *why_not_met(info, own)])
    try:
        ranks = gather_facts(own, info.world_size)
        problems = contradictions(info, ranks)
        gpus = not problems and all(facts.device != "cpu" for facts in ranks)
        links = measure_links(info.world_size, own.device if gpus else "cpu")
    finally:
        world.stop()
    return Diagnosis(info, ranks, links, notes(info, ranks), problems)
