"""What a few steps are made of: a trace, a picture of memory, and seconds by kind (docs/profiling.md)."""

from disttrain.profiling.profile import Place, Profile, Told

__all__ = ["Place", "Profile", "Told"]
