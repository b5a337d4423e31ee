"""TensorBoard event files, written with the tensorboard package alone (no torch)."""

from pathlib import Path
from typing import Any

from disttrain.loggers.scalars import scalars

FOLDER = "tensorboard"
FLUSH_SECONDS = 10


class TensorBoardSink:
    """Scalars of step and eval records. After a resume, readers drop what an earlier process wrote past it."""

    name = "tensorboard"

    def __init__(self, folder: Path, resumed_step: int | None):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        # Typed as Any: protobuf makes these classes when the module is loaded, so a type checker sees none of them.
        events: Any = event_pb2
        summaries: Any = summary_pb2
        self._event, self._summary, self._session_log = events.Event, summaries.Summary, events.SessionLog
        self._writer = EventFileWriter(str(folder), flush_secs=FLUSH_SECONDS)
        if resumed_step is not None:
            self._drop_after(resumed_step)

    def write(self, record: dict[str, Any]) -> None:
        """Take one record; written within FLUSH_SECONDS by a thread of the package."""
        if record.get("event") == "rolled_back":
            self._drop_after(record["details"]["to_step"])
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars(record).items()]
        if values:
            event = self._event(wall_time=record["time"], step=record["step"], summary=self._summary(value=values))
            self._writer.add_event(event)

    def _drop_after(self, step: int) -> None:
        """Tell readers to drop what is already written of later steps."""
        restart = self._session_log(status=self._session_log.START)
        self._writer.add_event(self._event(step=step + 1, session_log=restart))

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()
