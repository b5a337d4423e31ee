"""Ranks that fail, die or wait are reported as such."""

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from disttrain.verify.ranks import Ranks, RanksFailed, run_ranks


def total(rank: int, number: int) -> int:
    value = torch.tensor(rank + number)
    dist.all_reduce(value)
    return int(value)


def test_results_in_order_of_rank() -> None:
    assert run_ranks(total, 3, 10) == [33, 33, 33]
    big = torch.zeros(10)
    assert run_ranks(lambda rank: big.data_ptr(), 1) == [big.data_ptr()]  # arguments are not copied


def refuse(rank: int) -> None:
    if rank == 1:
        raise ValueError("no such thing")
    total(rank, 0)


def test_the_rank_that_raised_first_is_named() -> None:
    with pytest.raises(RanksFailed, match="(?s)rank 1 of 2 failed.*ValueError: no such thing") as failed:
        run_ranks(refuse, 2, timeout_s=30)
    assert "no such thing" in next(iter(failed.value.raised.values()))
    assert not failed.value.hung


def end(rank: int) -> None:
    if rank == 0:
        os._exit(7)


def test_a_rank_that_ends_without_a_word() -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(end, 2, timeout_s=30)
    assert failed.value.died[0] == 7


def wait(rank: int) -> None:
    if rank == 0:
        total(rank, 0)
    else:
        time.sleep(60)


def test_ranks_that_wait_are_told_with_their_place() -> None:
    started = time.monotonic()
    with pytest.raises(RanksFailed, match="did not return in time: 0, 1") as failed:
        run_ranks(wait, 2, timeout_s=1.5)
    assert failed.value.hung
    assert "all_reduce" in failed.value.waiting[0]
    assert "wait" in failed.value.waiting[1]
    assert time.monotonic() - started < 15


def test_new_ranks_meet_old_ones_whatever_the_parent_did_before() -> None:
    alone, short = dist.HashStore(), timedelta(seconds=0.1)
    with pytest.raises(RuntimeError):  # nobody comes; torch has counted a group all the same
        dist.init_process_group("gloo", store=alone, rank=0, world_size=2, timeout=short)
    with Ranks(total) as ranks:
        assert ranks.run(1, 5, timeout_s=30) == [5]
        assert ranks.run(2, 5, timeout_s=30) == [11, 11]
