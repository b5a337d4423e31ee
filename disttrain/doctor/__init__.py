"""What is this world: launcher, ranks, devices, versions, link speed, and what contradicts itself."""

from disttrain.doctor.contradictions import contradictions, notes
from disttrain.doctor.diagnosis import Diagnosis, diagnose
from disttrain.doctor.facts import Gpu, RankFacts
from disttrain.doctor.links import LinkSpeed, bus_bandwidth
from disttrain.doctor.render import render

__all__ = [
    "Diagnosis",
    "Gpu",
    "LinkSpeed",
    "RankFacts",
    "bus_bandwidth",
    "contradictions",
    "diagnose",
    "notes",
    "render",
]
