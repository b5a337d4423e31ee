"""Horovod's elastic mode: the number of ranks changes while the job goes on.

``horovodrun --min-np ... --host-discovery-script ...`` starts a process for every new slot, and expects those that are
left when a rank dies, or when hosts come and go, to meet again. Ours do so as fresh processes: each replaces itself by
the same command, which asks Horovod's driver for its new rank and goes on from the newest checkpoint. What Horovod's
own `hvd.elastic.State` keeps in memory is that checkpoint.
"""

import os
import socket
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, NoReturn
from urllib.request import urlopen

from disttrain.config import horovod_checks
from disttrain.config.problems import Problem, RefusedInput

if TYPE_CHECKING:
    from disttrain.config.schema import Config
    from disttrain.interruption import Interruption

PLACE = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
"""What horovodrun's driver answers, in this order."""


def is_elastic(environ: Mapping[str, str]) -> bool:
    """Whether horovodrun started this process in its elastic mode."""
    return environ.get("HOROVOD_ELASTIC") == "1"


def join(config: "Config", interruption: "Interruption") -> None:
    """Meet the other ranks and agree on an address, which the launcher does not give; all of them call it together.

    From now on `interruption` also tells when hosts come or go. Raises RefusedInput where the engine is another one, or
    Horovod is missing.
    """
    problems = [*_problems(config), *(horovod_checks.installation_problems() if config.engine == "horovod" else ())]
    if problems:
        raise RefusedInput(problems)
    os.environ.update(horovod_checks.variables(config))
    import horovod.torch as hvd  # pyright: ignore[reportMissingImports]

    hvd.init()
    address, port = hvd.broadcast_object((_address(), _free_port()), root_rank=0)
    one_host = hvd.local_size() == hvd.size() or len(set(hvd.allgather_object(socket.gethostname()))) == 1
    os.environ.update(MASTER_ADDR="127.0.0.1" if one_host else address, MASTER_PORT=str(port))
    _listen(interruption)


def goes_on(code: int, interruption: "Interruption") -> bool:
    """Whether a run that was interrupted only made room for a change of hosts: nobody sent this process a signal."""
    return code == 130 and interruption.signal is None


def start_again() -> NoReturn:
    """Replace this process by the same command in its new place; what it started ends with it.

    Ends the process where it has no place any more.
    """
    import psutil

    for child in psutil.Process().children(recursive=True):
        child.kill()
    print("disttrain: the ranks have changed; going on from the newest checkpoint", file=sys.stderr)
    place = _ask_driver()
    if int(place["HOROVOD_RANK"]) < 0:
        sys.exit(0)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):  # torch's, of the place before
        os.environ.pop(name, None)
    os.environ.update(place)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "disttrain", *sys.argv[1:]])


def _ask_driver() -> dict[str, str]:
    """This process's place in the new world, by variable; horovodrun answers when all who are left have asked."""
    server = (os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"], os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"])
    slot = f"{os.environ['HOROVOD_HOSTNAME']}:{os.environ['HOROVOD_LOCAL_RANK']}"
    with urlopen(f"http://{server[0]}:{server[1]}/rank_and_size/{slot}") as answer:
        numbers = answer.read().decode().split(",")
    return {f"HOROVOD_{name}": number.strip() for name, number in zip(PLACE, numbers, strict=True)}


def _problems(config: "Config") -> list[Problem]:
    elastic = "HOROVOD_ELASTIC=1"
    if config.engine != "horovod":
        fix = "use engine=horovod, or horovodrun without --min-np, --max-np and --host-discovery-script"
        return [
            Problem((f"engine={config.engine}", elastic), "only engine horovod can change the number of ranks", fix)
        ]
    if config.parallel.tensor > 1:
        return [Problem((f"parallel.tensor={config.parallel.tensor}", elastic),
                        "the number of ranks changes by one host at a time, a tensor group does not",
                        "use parallel.tensor=1")]  # fmt: skip
    if config.checkpoint.resume != "auto" or not config.checkpoint.every:
        return [Problem((f"checkpoint.resume={config.checkpoint.resume}", f"checkpoint.every={config.checkpoint.every}",
                         elastic), "when a rank dies the others go on from the newest checkpoint",
                        "use checkpoint.resume=auto and checkpoint.every=100, say")]  # fmt: skip
    return []


def _listen(interruption: "Interruption") -> None:
    """The driver tells rank 0 when hosts come or go."""
    from horovod.common.elastic import notification_manager  # pyright: ignore[reportMissingImports]

    class Listener:
        def on_hosts_updated(self, timestamp: float, update: object) -> None:
            interruption.hosts_changed = True

    notification_manager.init()
    notification_manager.register_listener(Listener())


def _address() -> str:
    """This host's address on the network that horovodrun found to join the hosts."""
    import psutil

    there = psutil.net_if_addrs().get(os.environ.get("HOROVOD_GLOO_IFACE", ""), [])
    found = [address.address for address in there if address.family == socket.AF_INET]
    return found[0] if found else socket.gethostbyname(socket.gethostname())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
