"""How ranks find each other: those of torchrun after a restart, and new ones beside old ones."""

import json
import time
import uuid
from collections.abc import Mapping

import torch.distributed as dist

LOOK_AGAIN_S = 0.02


def is_kept_by_torchrun(environ: Mapping[str, str]) -> bool:
    """Whether the ranks meet in a store that lives as long as torchrun, and not as long as they do."""
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and "TORCHELASTIC_RUN_ID" in environ


def of_this_start(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> dist.Store:
    """The part of torchrun's store for this start of the ranks; all of them call it together.

    torchrun keeps one store through all its restarts (torch 2.13), in which ranks would find the addresses of those before
    them. A count of restarts is none that hosts agree on. So each rank leaves a name of its own, the first one says
    which names it has seen, and is believed by those who find theirs. Raises RuntimeError where that takes too long.
    """
    mine, deadline = uuid.uuid4().hex, time.monotonic() + timeout_s
    store.set(f"name_of_{rank}", mine)
    while True:
        if rank == 0:
            seen = [name.decode() for name in store.multi_get([f"name_of_{other}" for other in range(world_size)])]
            store.set("seen", json.dumps(seen))
        else:
            seen = json.loads(store.get("seen"))
            if mine in seen:
                store.set(f"{seen[0]}_heard_by_{rank}", "")
        heard = [f"{seen[0]}_heard_by_{other}" for other in range(1, world_size)] if rank == 0 else []
        if mine in seen and (not heard or store.check(heard)):
            return dist.PrefixStore(seen[0], store)
        if time.monotonic() > deadline:
            raise RuntimeError("Timed out waiting for ranks that torchrun should have started again")
        time.sleep(LOOK_AGAIN_S)


def count_groups_from_zero() -> None:
    """Forget the groups that this process has counted; only where it is in no world.

    Torch names groups by a count that a fork inherits and that only the end of a world resets, not a world that could not
    be joined: ranks that count otherwise wait for each other's keys for ever, and a rehearsal's groups have other names.
    """
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.destroy_process_group()
