"""`disttrain` in a process forked from one that has imported it: as `python -m disttrain`, without its seconds of imports.

Each process of pytest has one fork server (multiprocessing's), which only imports. Fresh processes are started by
tests/launchers, tests/unit/test_interruption.py and under torchrun.
"""

import ctypes
import os
import runpy
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired

IMPORTS = ["disttrain.cli", "disttrain.preflight", "disttrain.overview", "disttrain.preparing", "disttrain.elastic",
           "disttrain.run", "disttrain.local_ranks", "disttrain.engines.native", "matplotlib.pyplot"]  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a process runs, and as what."""

    host: str
    """Name of a network namespace, and of the host."""
    environment: Mapping[str, str]
    """What is set there besides."""

    def enter(self) -> None:
        """Move the calling process there. Raises OSError."""
        with open(f"/var/run/netns/{self.host}", "rb") as file:
            for moved in (_LIBC.setns(file.fileno(), _NETWORK), _LIBC.unshare(_NAMES)):
                if moved != 0:
                    raise OSError(ctypes.get_errno(), f"a process cannot move to {self.host}")
        socket.sethostname(self.host)
        os.environ.update(self.environment)


_LIBC = ctypes.CDLL(None, use_errno=True)
_NETWORK, _NAMES = 0x40000000, 0x04000000
"""CLONE_NEWNET and CLONE_NEWUTS of Linux; Python has them, and setns, from 3.12 on."""


def run(words: Sequence[str], folder: Path, environment: Mapping[str, str], timeout_s: float) -> CompletedProcess:
    """What `disttrain WORDS` does in a folder: exit code, stdout and stderr. Raises TimeoutExpired."""
    with tempfile.TemporaryDirectory() as name:
        out, err = Path(name) / "stdout", Path(name) / "stderr"
        process = start(words, folder, environment, out, err)
        process.join(timeout_s)
        if process.is_alive():
            process.kill()
            process.join()
            raise TimeoutExpired(list(words), timeout_s, out.read_bytes(), err.read_bytes())
        return CompletedProcess(list(words), process.exitcode or 0, out.read_text(), err.read_text())


def start(
    words: Sequence[str], folder: Path, environment: Mapping[str, str], out: Path, err: Path, apart: bool = False,
    script: Path | None = None, places: Sequence[Place] = (),
) -> BaseProcess:  # fmt: skip
    """Start `disttrain WORDS`, or a script, in a folder, its output in two files; `apart`: in a process group of its own;
    `places`: once in each of them, and the exit code is theirs."""
    context = get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = environment.get("OMP_NUM_THREADS", "1")  # read when torch is imported
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)
    arguments = (list(words), folder, dict(environment), out, err, apart, script, list(places))
    process = context.Process(target=_main, args=arguments)
    process.start()
    return process


class Running:
    """`disttrain WORDS`, or a script, in a process group of its own, with the words of Popen; stderr is in stdout."""

    def __init__(self, words: Sequence[str], folder: Path, environment: Mapping[str, str], script: Path | None = None):
        file, name = tempfile.mkstemp(prefix="output_", suffix=".txt", dir=folder)
        os.close(file)
        self.output = Path(name)
        self._process = start(words, folder, environment, self.output, self.output, apart=True, script=script)
        self.pid = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        """Exit code; a signal is a negative number; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """To the command, not to its ranks."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """-9."""
        self._process.kill()

    def wait(self, timeout: float) -> int:
        """Its exit code. Raises TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutExpired([], timeout, self.output.read_bytes())
        return self._process.exitcode

    def communicate(self, timeout: float) -> str:
        """All that it has said, at its end. Raises TimeoutExpired."""
        self.wait(timeout)
        return self.output.read_text()


def _everywhere(places: Sequence[Place]) -> set[int]:
    """Go on in each place, in a child of this process, which waits, and gets their exit codes; a child gets none."""
    children = []
    for place in places:
        if (child := os.fork()) == 0:
            place.enter()
            return set()
        children.append(child)
    return {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}


def _main(
    words: list[str], folder: Path, environment: dict[str, str], out: Path, err: Path, apart: bool, script: Path | None,
    places: list[Place],
) -> None:  # fmt: skip
    if apart:
        os.setsid()
    for path, number in ((out, 1), (err, 2)):
        with open(path, "ab") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if places and (codes := _everywhere(places)):
        sys.exit(codes.pop() if len(codes) == 1 else f"the processes ended with {sorted(codes)}")
    sys.argv = [str(script or "disttrain"), *words]
    if script is not None:
        runpy.run_path(str(script), run_name="__main__")
        return
    from disttrain.cli import main

    main()
