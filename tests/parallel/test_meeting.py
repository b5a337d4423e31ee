"""Ranks that torchrun starts again find each other in a store that still holds what the ranks before them wrote."""

from concurrent.futures import ThreadPoolExecutor

from torch.distributed import PrefixStore, TCPStore

from disttrain.parallel import meeting


def test_ranks_find_those_of_their_own_start() -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def met(rank: int) -> PrefixStore:
        store = TCPStore("127.0.0.1", server.port, is_master=False)
        found = meeting.of_this_start(store, rank, 3, timeout_s=30)
        assert not found.check(["address"])  # of the ranks before
        return found

    for _ in range(2):  # the second time there are all names of the first
        with ThreadPoolExecutor(3) as pool:
            stores = list(pool.map(met, range(3)))
        stores[2].set("address", "here")
        assert [store.get("address") for store in stores] == [b"here"] * 3
