"""Shared fixtures: the CPU session never sees a GPU, and any function becomes a distributed test."""

import gc
import os
import signal

if gc.isenabled():  # what is imported while tests are collected is no garbage
    gc.disable()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background of a script: Ctrl-C is tested here
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import torch._dynamo  # noqa: F401  imported before any fork: forked ranks then start in milliseconds
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("disttrain", deadline=None)  # no test depends on how busy the machine is
settings.load_profile("disttrain")


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.freeze()  # or the end of this process would look through everything


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
