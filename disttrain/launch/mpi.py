"""Where MPI's launcher does not tell how the ranks meet, they ask MPI itself, through mpi4py.

MPI is started for this one question and ended again, so that it neither polls beside the training nor waits in
MPI_Finalize for ranks that failed. An engine that speaks MPI itself asks to keep it.
"""

import atexit
import contextlib
import secrets
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from disttrain.config.problems import Problem, RefusedInput
from disttrain.launch import RankInfo, detect
from disttrain.launch.launchers import MPICH, OPENMPI, View, complete, launchers_of, read_view
from disttrain.launch.master import LOOPBACK
from disttrain.launch.network import reachable_candidates
from disttrain.launch.reader import Reader

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

_PROBE_S = 3.0
"""How long a rank tries one address of rank 0."""


def locate(environ: Mapping[str, str], keep: bool = False) -> RankInfo:
    """`detect`, and in an MPI job over several nodes the answers that no variable gives; all ranks call it together.

    With `keep` MPI stays started until the process ends. Raises RefusedInput as `detect` does, where mpi4py is missing
    or belongs to another MPI, and where rank 0 is not reachable from every node.
    """
    reader = Reader(environ)
    view = _silent(Reader(environ))
    if view is None:
        return detect(environ)
    # What is wrong with the variables is told before MPI is started, which may end the process.
    assumed = {"MASTER_ADDR": "rank-0", "MASTER_PORT": "1"}
    if view.local_rank is None or view.local_world_size is None:
        assumed |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    told = detect({**environ, **{name: value for name, value in assumed.items() if not reader.has(name)}})
    with _world(told, view.names.command, keep) as comm:
        return _meet(comm, reader, view, told)


def _silent(reader: Reader) -> View | None:
    """What MPI's launcher says where it leaves open how the ranks meet; None where all is known."""
    views = [read_view(reader, names) for names in launchers_of(reader)]
    if not views or views[0].names not in (OPENMPI, MPICH) or (views[0].world_size or 0) < 2:
        return None
    view = views[0]
    if complete(reader, view).nodes == 1 or (reader.has("MASTER_ADDR") and not reader.problems):
        return None
    return view


@contextlib.contextmanager
def _world(told: RankInfo, command: str, keep: bool) -> "Iterator[Intracomm]":
    """COMM_WORLD of a started MPI that agrees with the launcher."""
    mpi = _import(told, command)
    library = " ".join(mpi.Get_library_version().splitlines()[0].strip("\0").split(",")[0].split())
    other = f"mpi4py found {library}, which is not the MPI of {command}: each process would be rank 0 of 1."
    settings = (f"launcher {told.launcher}", f"mpi4py with {mpi.get_vendor()[0]}")
    fix = ("Load the MPI whose mpirun starts the job, or name its library for mpi4py: MPI4PY_LIBMPI=/path/libmpi.so; "
           "or set MASTER_ADDR, then MPI is not needed.")  # fmt: skip
    if (mpi.get_vendor()[0] == "Open MPI") != (told.launcher == OPENMPI.launcher):
        raise RefusedInput([Problem(settings, other, fix)])
    started = not mpi.Is_initialized()
    if started:
        mpi.Init_thread(mpi.THREAD_MULTIPLE)
    try:
        comm = mpi.COMM_WORLD
        if (comm.rank, comm.size) != (told.rank, told.world_size):
            place = f"rank {comm.rank} of {comm.size} in MPI, rank {told.rank} of {told.world_size} by {command}"
            raise RefusedInput([Problem((*settings, place), other, fix)])
        yield comm
    finally:
        if started and keep:
            atexit.register(lambda: mpi.Is_finalized() or mpi.Finalize())
        elif started:
            mpi.Finalize()


def _import(told: RankInfo, command: str) -> Any:
    """The module mpi4py.MPI, with MPI not yet started."""
    settings = (f"launcher {told.launcher}", "MASTER_ADDR is not set")
    try:
        import mpi4py
    except ImportError:
        message = f"{command} does not tell on which host rank 0 runs, and mpi4py, which could ask MPI, is missing."
        fix = "pip install mpi4py, or set MASTER_ADDR to the host name of rank 0."
        raise RefusedInput([Problem(settings, message, fix)]) from None
    mpi4py.rc.initialize = False  # the library is looked at before it may end a process that it does not know
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        message = f"mpi4py does not load: {str(error).splitlines()[0]}."
        fix = "Load the MPI whose mpirun starts the job, so that its libmpi is found; or set MASTER_ADDR."
        raise RefusedInput([Problem(settings, message, fix)]) from error
    return MPI


def _meet(comm: "Intracomm", reader: Reader, view: View, told: RankInfo) -> RankInfo:
    """Complete what the launcher told by what the ranks find together."""
    from mpi4py import MPI

    shared = comm.Split_type(MPI.COMM_TYPE_SHARED)
    local_rank, local_world_size = shared.rank, shared.size
    if view.local_rank is not None and view.local_world_size is not None:
        local_rank, local_world_size = view.local_rank, view.local_world_size
    firsts = comm.allgather(shared.bcast(comm.rank))
    shared.Free()
    nodes = sorted(set(firsts))
    address = reader.text("MASTER_ADDR")
    port = told.master_port if reader.has("MASTER_PORT") else 0
    if not address or not reader.has("MASTER_PORT"):
        address, port = _agree(comm, reader, address, port, several=len(nodes) > 1, asks=comm.rank in nodes)
    return replace(told, local_rank=local_rank, local_world_size=local_world_size, node_rank=nodes.index(
        firsts[comm.rank]), nodes=len(nodes), master_address=address, master_port=port)  # fmt: skip


def _agree(comm: "Intracomm", reader: Reader, address: str, port: int, several: bool, asks: bool) -> tuple[str, int]:
    """An address and a free port of rank 0 that a rank of every node has reached."""
    offer: tuple[list[str], int, bytes, str] = ([], 0, b"", "")
    answering = _Answering()
    if comm.rank == 0:
        candidates = [address] if address else reachable_candidates(reader.environ) if several else [LOOPBACK]
        offer = answering.offer(candidates, port)
    candidates, port, token, reason = comm.bcast(offer)
    reached = [not asks or _answers(candidate, port, token) for candidate in candidates]
    by_all = [all(column) for column in zip(*comm.allgather(reached), strict=True)]
    answering.stop()
    if True in by_all:
        return candidates[by_all.index(True)], port
    message = reason or "no address of rank 0's host was reached from every node, so the ranks cannot meet."
    settings = ("MASTER_ADDR is not set", f"tried {', '.join(candidates) or 'nothing'}, port {port}")
    fix = "Set MASTER_ADDR (and MASTER_PORT) to what all nodes reach; look at firewalls and at the nodes' networks."
    raise RefusedInput([Problem(settings, message, fix)])


class _Answering:
    """Rank 0's listening socket, which tells everybody who connects the token."""

    def __init__(self) -> None:
        self._server: socket.socket | None = None

    def offer(self, candidates: list[str], port: int) -> tuple[list[str], int, bytes, str]:
        """Listen on all interfaces; addresses, port, token, and why not where the port is taken."""
        token = secrets.token_bytes(16)
        both = socket.has_dualstack_ipv6()
        try:
            self._server = socket.create_server(
                ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both, backlog=1024
            )
        except OSError as error:
            return [], port, token, f"rank 0 cannot listen on port {port}: {error.strerror}."
        threading.Thread(target=self._answer, args=(self._server, token), daemon=True).start()
        return candidates, self._server.getsockname()[1], token, ""

    @staticmethod
    def _answer(server: socket.socket, token: bytes) -> None:
        with contextlib.suppress(OSError):  # of accept, when the socket is shut down
            while True:
                with server.accept()[0] as connection, contextlib.suppress(OSError):
                    connection.sendall(token)

    def stop(self) -> None:
        """Free the port again, for torch's store."""
        if self._server:
            with contextlib.suppress(OSError):
                self._server.shutdown(socket.SHUT_RDWR)
            self._server.close()


def _answers(address: str, port: int, token: bytes) -> bool:
    """Whether it is rank 0 that answers there: the address of a bridge exists on many hosts."""
    try:
        with socket.create_connection((address, port), timeout=_PROBE_S) as connection:
            return connection.recv(len(token), socket.MSG_WAITALL) == token
    except OSError:
        return False
