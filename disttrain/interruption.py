"""Ctrl-C, SIGTERM and SIGUSR1 become a request that the training loop reads between steps. Imports no torch."""

import ctypes
import os
import signal
import sys
import time
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""SIGUSR1 is what batch systems are told to send some time before they end a job."""
ALREADY_COUNTED_S = 2.0
"""The same Ctrl-C can arrive twice, from the terminal and from a launcher; later ones mean it."""


class Interruption:
    """Whether somebody asked this process to stop, and by what signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.hosts_changed = False
        """Whether an elastic job has gained or lost hosts, which takes a stop and a fresh start."""
        self._since = 0.0

    @property
    def requested(self) -> bool:
        """Whether the run should save a checkpoint and end."""
        return self.signal is not None

    def listen(self) -> "Interruption":
        """Take over the signals; a second SIGINT or SIGTERM after two seconds ends the process at once."""
        for number in SIGNALS:
            signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        again = self.signal is not None and now - self._since > ALREADY_COUNTED_S
        if again and number != signal.SIGUSR1:  # a warning only, also when it is repeated
            sys.stderr.write("disttrain: stopped at once; the last checkpoint is kept\n")
            os._exit(130)
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), now


def die_with_parent(parent: int) -> None:
    """Ask the kernel for a SIGTERM when the process `parent` that started this one dies (Linux; elsewhere nothing).

    Raises KeyboardInterrupt when it is dead already.
    """
    if sys.platform == "linux":
        parent_death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGTERM)
        if os.getppid() != parent:
            raise KeyboardInterrupt
