"""Start this command on several local ranks through torch's elastic agent."""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from disttrain.interruption import SIGNALS

STARTED_BY_US = "DISTTRAIN_LOCAL_RANKS"
"""Process number of the parent, set for ranks that `start` made; they end when it does."""


def start(ranks: int, arguments: Sequence[str]) -> int:
    """Run ``disttrain ARGUMENTS`` on `ranks` local ranks and wait; the exit code to end with.

    Ctrl-C, SIGTERM and SIGUSR1 are passed on to the ranks, which save a checkpoint and end with 130.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its report is replaced by ours
    os.environ[STARTED_BY_US] = str(os.getpid())
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        signals_to_handle="SIGHUP,SIGQUIT",
    )
    for number in SIGNALS:
        signal.signal(number, _pass_on)
    try:
        elastic_launch(launch, sys.executable)("-m", "disttrain", *arguments)
    except ChildFailedError as failed:
        return _exit_code({rank: failure.exitcode for rank, failure in failed.failures.items()})
    return 0


def _pass_on(number: int, frame: FrameType | None) -> None:
    for child in psutil.Process().children():
        child.send_signal(number)


def _exit_code(codes: dict[int, int]) -> int:
    """130 for an interruption, 2 for refused input, otherwise 1; says which ranks were killed."""
    for rank, code in sorted(codes.items()):
        if code < 0:
            name = signal.Signals(-code).name
            print(f"disttrain: rank {rank} was killed by {name}; the same command resumes the run", file=sys.stderr)
    return next((code for code in (130, 2) if code in codes.values()), 1)
