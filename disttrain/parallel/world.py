"""The process group of a run: one path for a world of one and a world of many."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from disttrain.config.problems import Problem, RefusedInput
from disttrain.launch import RankInfo, environment_for_torch
from disttrain.parallel import meeting

LEDGER_CALLS = "2000"
"""Newest collectives that torch's flight recorder remembers, for `disttrain.hang`."""

_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


def share_cores(info: RankInfo) -> None:
    """Divide the cores this process may use among the ranks of its host, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // info.local_world_size))


def start(info: RankInfo, device_type: str, timeout_s: float) -> None:
    """Join the world's default process group; every rank calls it, and waits at most `timeout_s` seconds.

    `device_type` is "cpu" (gloo) or "cuda" (NCCL beside gloo; the caller has chosen this rank's device). A world of
    one gets the same kind of group without any network. torch's variables (RANK, MASTER_ADDR, ...) are put into
    os.environ, since libraries read them. Raises RefusedInput when the ranks do not meet at the master address.
    """
    os.environ.update(environment_for_torch(info))
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", LEDGER_CALLS)
    backend, timeout = _BACKENDS[device_type], timedelta(seconds=timeout_s)
    try:
        if info.world_size == 1:
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]  documented, but not in __all__
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        elif meeting.is_kept_by_torchrun(os.environ):
            store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
            store = meeting.of_this_start(store, rank, size, timeout_s)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        else:
            dist.init_process_group(backend, init_method="env://", timeout=timeout)
    except RuntimeError as error:  # a store's time-out, an unknown host, an unknown network interface
        address = (f"MASTER_ADDR={info.master_address}", f"MASTER_PORT={info.master_port}")
        message = f"rank {info.rank} of {info.world_size} did not join the other ranks: {error}".splitlines()[0]
        fix = (
            "Check that MASTER_ADDR is the host of rank 0 and reachable, that no other job uses the port, that every "
            "rank was started, and that GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the right network interface."
        )
        raise RefusedInput([Problem(address, message, fix)]) from error


def timeout() -> timedelta:
    """How long the world waits in a collective. torch would give half an hour to every group but the first."""
    return dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout  # pyright: ignore


def be_patient(timeout_s: float) -> None:
    """From here on wait this many seconds over the hosts (gloo), if that is longer than what `start` was given."""
    if dist.is_initialized():
        longer = max(timedelta(seconds=timeout_s), timeout())
        dist.group.WORLD._get_backend(torch.device("cpu"))._set_default_timeout(longer)  # pyright: ignore


def wait_for_all() -> None:
    """Wait until every rank has come here. Goes over the hosts (gloo), so that no GPU is waited for."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))


def stop() -> None:
    """Leave the process group; does nothing when there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()
