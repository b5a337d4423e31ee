"""A thread that sends beside the step."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack


def one_thread(name: str) -> ThreadPoolExecutor:
    """One thread, under the dispatch modes of whoever makes it: there are none but in a rehearsal."""
    return ThreadPoolExecutor(1, name, _enter, (_get_current_dispatch_mode_stack(),))


def _enter(modes: Sequence[TorchDispatchMode]) -> None:
    for mode in modes:
        mode.__enter__()
