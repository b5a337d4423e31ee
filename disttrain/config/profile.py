"""Settings of a profile: which steps are looked at, and which ranks leave files of it."""

from typing import Annotated

from pydantic import Field

from disttrain.config.section import NonNegative, Positive, Section


class ProfileConfig(Section):
    """A trace, a picture of memory and the seconds of a step by kind (docs/profiling.md)."""

    enabled: bool = False
    """Look at some steps, of which the files are in the run folder's `trace`: --profile. They count in no average."""
    steps: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = None
    """First and last step whose seconds are taken, --profile-steps A:B; the step before them gives the memory. When not
    given: three steps after the warm-up of the process."""
    ranks: Annotated[list[NonNegative], Field(min_length=1)] | None = None
    """Ranks that leave a trace and a picture of their memory; the first eight when not given. The table is of all."""


SHOWN_RANKS = 8
"""So many ranks leave files when profile.ranks is not given."""
