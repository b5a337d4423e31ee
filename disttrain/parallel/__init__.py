"""How the ranks of a world share one training step: process group, collectives, data parallelism."""
