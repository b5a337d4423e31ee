"""Worker processes that run one function call at a time, over pipes.

Not a ProcessPoolExecutor: its workers outlive a parent that is killed, re-import the caller's main module under spawn
and inherit its threads' locks under fork. These read calls from standard input and end when it closes.
"""

import os
import pickle
import selectors
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Generator, Iterator
from typing import Any

from disttrain.config.problems import RefusedInput

_PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from disttrain.data.workers import main; main()"

Call = tuple[Callable[..., Any], tuple[Any, ...]]


def run_calls(calls: Iterator[Call], workers: int, threads: bool = False) -> Generator[Any, None, None]:
    """Run calls of module-level functions in up to `workers` processes and yield their results as they come.

    A call is taken from the iterator only when a worker is free. With threads, the package `tokenizers` may use
    threads inside each worker. Raises what went wrong: RefusedInput as it is, RuntimeError with the worker's
    traceback otherwise. Leaving the loop in any way kills the workers.
    """
    idle: list[subprocess.Popen[bytes]] = []
    busy: list[subprocess.Popen[bytes]] = []
    with selectors.DefaultSelector() as selector:
        try:
            while True:
                while (idle or len(busy) < workers) and (call := next(calls, None)):
                    worker = idle.pop() if idle else _start(threads)
                    busy.append(worker)
                    _send(worker, call)
                    selector.register(_pipe(worker), selectors.EVENT_READ, worker)
                if not busy:
                    return
                for key, _ in selector.select():
                    worker = key.data
                    selector.unregister(_pipe(worker))
                    result = _receive(worker)
                    busy.remove(worker)
                    idle.append(worker)
                    yield result
        finally:
            for worker in (*idle, *busy):
                worker.kill()
            for worker in (*idle, *busy):
                worker.wait()
                for pipe in (worker.stdin, worker.stdout):
                    _close(pipe)


def _close(pipe: Any) -> None:
    try:
        pipe.close()
    except BrokenPipeError:  # a call that a killed worker never read was still in the buffer
        return


def _start(threads: bool) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "TOKENIZERS_PARALLELISM": "true" if threads else "false",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    # its own session: Ctrl-C reaches the parent alone, which then kills the workers
    return subprocess.Popen([sys.executable, "-P", "-c", _PROGRAM, *sys.path], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, env=environment, start_new_session=True)  # fmt: skip


def _pipe(worker: subprocess.Popen[bytes]) -> Any:
    return worker.stdout


def _send(worker: subprocess.Popen[bytes], call: Call) -> None:
    try:
        pickle.dump(call, worker.stdin)  # pyright: ignore[reportArgumentType]
        worker.stdin.flush()  # pyright: ignore[reportOptionalMemberAccess]
    except BrokenPipeError as error:
        raise _died(worker) from error


def _receive(worker: subprocess.Popen[bytes]) -> Any:
    try:
        kind, value = pickle.load(_pipe(worker))
    except (EOFError, pickle.UnpicklingError) as error:
        raise _died(worker) from error
    if kind == "refused":
        raise RefusedInput(value)
    if kind == "failed":
        raise RuntimeError(f"a data worker failed:\n{value}")
    return value


def _died(worker: subprocess.Popen[bytes]) -> RuntimeError:
    code = worker.wait()
    cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return RuntimeError(f"a data worker died ({cause}); if memory ran out, use a smaller data.workers")


def main() -> None:
    """Answer calls until standard input closes. Whatever a library prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            function, arguments = pickle.load(sys.stdin.buffer)
        except (EOFError, pickle.UnpicklingError):  # the parent is done, or gone in the middle of a call
            return
        try:
            answer = ("done", function(*arguments))
        except RefusedInput as refused:
            answer = ("refused", refused.problems)
        except Exception:
            answer = ("failed", traceback.format_exc())
        try:
            pickle.dump(answer, answers)
            answers.flush()
        except BrokenPipeError:
            return
