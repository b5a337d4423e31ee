"""Settings of what is watched while a run goes on, and of what is done about it."""

from typing import Annotated, Literal

from pydantic import Field

from disttrain.config.section import NonNegative, Positive, Section


class WatchConfig(Section):
    """Loss spikes, numbers that are none, slow ranks (docs/faults.md)."""

    loss_z: Annotated[float, Field(gt=0)] | None = 6.0
    """A recorded loss so many deviations above the median of the records before it is a spike; null looks for none."""
    window: Annotated[int, Field(ge=20)] = 100
    """Records before it that a loss is compared with, at the most; none is judged before there are 20."""
    on_spike: Literal["event", "rollback", "stop"] = "event"
    """What follows a spike. event: a line in the record. rollback: back to the newest good checkpoint, and on with the
    data after the spike (Chowdhery et al. 2022, section 5.1). stop: the run fails."""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """What follows a loss or gradient that is NaN or infinite. stop: the run fails at the next record. skip: no rank takes
    the step's update. rollback: as after a spike."""
    max_skips: NonNegative = 10
    """Updates that on_nonfinite=skip leaves out in a row; one more stops the run."""
    max_rollbacks: Positive = 3
    """Rollbacks of a run, resumes included; where one more is due, the run stops."""
    slow_rank: Annotated[float, Field(gt=1)] | None = 1.5
    """A rank that takes so many times as long as its peers for what it does alone is called slow; null looks for none."""
