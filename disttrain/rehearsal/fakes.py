"""Tensors without storage, and collectives that only leave a note: torch's fake tensors with two exceptions.

Numbers that are not floating (tokens, counts, sizes) stay real as long as they come from real ones and are not many, as
dropout's masks are: they take little memory, and what a step sends may depend on them. And a value that code reads from
a fake tensor, or that another rank would have sent, is 1; a collective gives what it would if all ranks handed in the
same.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from threading import RLock
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroup
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.utils._python_dispatch import TorchDispatchMode

from disttrain.hang import stacks
from disttrain.hang.files import Call, Frame
from disttrain.hang.observer import frame_of
from disttrain.rehearsal.records import Recorded, Trace

OPERATIONS = {
    "allreduce_": ("all_reduce", 0), "allreduce_coalesced_": ("all_reduce", 0), "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0), "allgather_": ("all_gather", 1), "allgather_coalesced_": ("all_gather", 1),
    "_allgather_base_": ("all_gather_into_tensor", 1), "allgather_into_tensor_coalesced_": ("all_gather_into_tensor", 1),
    "reduce_scatter_": ("reduce_scatter", 1), "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1), "gather_": ("gather", 1), "scatter_": ("scatter", 1),
    "alltoall_": ("all_to_all", 1), "alltoall_base_": ("all_to_all", 1), "barrier": ("barrier", None),
    "monitored_barrier_": ("barrier", None), "send": ("send", 0), "recv_": ("receive", 0),
    "all_reduce": ("all_reduce", 0), "all_reduce_": ("all_reduce", 0), "broadcast": ("broadcast", 0),
    "all_gather_into_tensor": ("all_gather_into_tensor", 0), "all_gather_into_tensor_out": ("all_gather_into_tensor", 0),
    "reduce_scatter_tensor": ("reduce_scatter", 0), "all_to_all_single": ("all_to_all", 0),
}  # fmt: skip
"""torch's operators: what they are called here, and which argument is handed in."""
HERE = "disttrain/rehearsal/"
FEW_ELEMENTS = 1 << 20
"""Larger tensors are without storage whatever they hold."""


class Done(dist.Work):
    """A collective that has completed. It holds its tensors, as gloo's does, as long as somebody holds it."""

    def __init__(self, tensors: Sequence[Tensor], started: set["Done"]):
        """torch holds only the C++ half of it until it is asked to wait: until then it is among the `started`."""
        super().__init__()
        self._tensors, self._started = list(tensors), started
        started.add(self)

    def wait(self, timeout: Any = None) -> bool:
        """Nothing to wait for."""
        self._started.discard(self)
        return True

    def is_completed(self) -> bool:
        """From the start."""
        return True

    def get_future(self) -> Any:
        """The tensors, at once."""
        self._started.discard(self)
        future: torch.futures.Future = torch.futures.Future()
        future.set_result(self._tensors)
        return future


@contextmanager
def shards_stay() -> Iterator[None]:
    """FSDP2 copies shards that are shorter than others when they have moved, which it asks of plain tensors only: of fake
    ones it would copy all."""
    reset = FSDPParam.reset_sharded_param

    def reset_sharded_param(param: Any) -> None:
        here, shard = param._sharded_param_data, param.sharded_param._local_tensor
        if not isinstance(here, FakeTensor) or here.untyped_storage()._cdata != shard.untyped_storage()._cdata:
            reset(param)

    FSDPParam.reset_sharded_param = reset_sharded_param  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        FSDPParam.reset_sharded_param = reset


class Recorder(TorchDispatchMode):
    """Writes down what goes to other ranks, and keeps real what is not floating; drives a FakeTensorMode."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.trace, self.phase = Trace(rank), "start"
        """Calls of a phase without a name are not written down."""
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._numbers: Counter[tuple] = Counter()
        self._started: set[Done] = set()
        self._lock = RLock()
        """Gradients may be coded by a thread of their own, and FakeTensorMode knows only one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """One operator of torch."""
        with self._lock:
            return self._done(func, types, args, kwargs or {})

    def _done(self, func: Any, types: Any, args: tuple, kwargs: dict) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # half of all calls
        if func.namespace in ("c10d", "_c10d_functional"):
            return self._communicate(func, types, args, kwargs)
        tensors = _tensors(args, kwargs)
        if tensors and all(_is_real(x) for x in tensors) and _few(tensors) or str(kwargs.get("device")) == "meta":
            return func(*args, **kwargs)
        try:
            result = self._fake.dispatch(func, types, args, kwargs)
        except DataDependentOutputException:
            if func is not torch.ops.aten._local_scalar_dense.default:
                raise
            self.trace.guessed.add(stacks.place(_stack()))
            return 1.0 if args[0].is_floating_point() else True if args[0].dtype == torch.bool else 1
        if (
            not tensors
            and isinstance(result, FakeTensor)
            and not result.is_floating_point()
            and not result.is_complex()
        ):
            return func(*args, **kwargs)
        return result

    def _communicate(self, func: Any, types: Any, args: tuple, kwargs: dict) -> Any:
        """Note an operator of torch's communication; real tensors are those of this rank afterwards, as from its peers."""
        name, functional = func._schema.name.split("::")[1], func.namespace == "_c10d_functional"
        if name in OPERATIONS and self.phase:
            asynchronous = functional or name in ("send", "recv_") or _argument(func, args, kwargs, "async_op", True)
            reduction = _reduction(func, args)
            self._note(*OPERATIONS[name], args, reduction, not asynchronous)  # pyright: ignore[reportCallIssue]
        if not any(isinstance(x, FakeTensor) for x in _tensors(args, kwargs)):
            if name == "recv_":
                args[0][0].fill_(1)
            return func(*args, **kwargs)
        if functional:
            return self._fake.dispatch(func, types, args, kwargs)
        work = Done(_tensors(args[0]), self._started)
        given = [work.boxed() if "Work" in str(r.type) else args[0] for r in func._schema.returns]
        return given[0] if len(given) == 1 else tuple(given)

    def _note(self, operation: str, which: int | None, args: tuple, reduction: str, waits: bool) -> None:
        group = _group(args)
        tensors = [] if which is None else _tensors(args[which])
        members, ends, own = tuple(dist.get_process_group_ranks(group)), None, self.trace.rank
        key: tuple = (group.group_name,)
        if operation in ("send", "receive"):
            peer, tag = members[args[2]], args[3]
            ends = (own, peer) if operation == "send" else (peer, own)
            key = (group.group_name, operation, *ends, tag)
        if operation == "broadcast" and len(args) > 2 and isinstance(args[2], int):
            operation = f"broadcast from rank {members[args[2]]}"
        if reduction != "sum":
            operation = f"{operation} of {reduction}"
        self._numbers[key] += 1
        call = Call(
            "/".join(str(part) for part in key if part not in ("send", "receive")), group.group_desc, members,
            self._numbers[key], operation, tuple(tuple(x.shape) for x in tensors),
            str(tensors[0].dtype).removeprefix("torch.") if tensors else "", False, len(self.trace.recorded),
        )  # fmt: skip
        greets = ends is not None and tensors[0].numel() == 1  # torch's stages do before their first step
        handed = 0 if operation == "receive" else sum(x.nbytes for x in tensors)
        self.trace.recorded.append(
            Recorded(call, stacks.place(_stack()), "start" if greets else self.phase, handed, ends, waits)
        )


def _is_real(tensor: Tensor) -> bool:
    """Whether it stays as it is: it has numbers that are not floating, or is torch's own without storage."""
    return not isinstance(tensor, FakeTensor) and (tensor.is_meta or not tensor.is_floating_point())


def _few(tensors: Sequence[Tensor]) -> bool:
    """Whether what an operator makes of them is small; meta tensors always are."""
    if all(x.is_meta for x in tensors):
        return True
    try:
        return prod(torch.broadcast_shapes(*(x.shape for x in tensors))) <= FEW_ELEMENTS
    except RuntimeError:  # they are not of one shape, and of no elementwise operator
        return max(x.numel() for x in tensors) <= FEW_ELEMENTS


def _tensors(*trees: Any) -> list[Tensor]:
    """All tensors in lists and dictionaries of arguments."""
    found: list[Tensor] = []
    for tree in trees:
        if isinstance(tree, Tensor):
            found.append(tree)
        elif isinstance(tree, list | tuple):
            found += _tensors(*tree)
        elif isinstance(tree, dict):
            found += _tensors(*tree.values())
    return found


def _group(args: tuple) -> ProcessGroup:
    """The group among the arguments: itself, or by its name."""
    for argument in args:
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            return ProcessGroup.unbox(argument)
    return _resolve_process_group(next(x for x in reversed(args) if isinstance(x, str)))  # pyright: ignore[reportArgumentType]


def _argument(func: Any, args: tuple, kwargs: dict, name: str, default: Any) -> Any:
    """An argument of an operator by its name."""
    names = [argument.name for argument in func._schema.arguments]
    at = names.index(name) if name in names else len(args)
    return kwargs.get(name, args[at] if at < len(args) else default)


def _reduction(func: Any, args: tuple) -> str:
    """sum, max, ...: torch hands it on as an object that cannot be read, so that it is asked of the function that was
    called; torch's own C++ (DDP) adds up."""
    names = [argument.name for argument in func._schema.arguments]
    if "reduce_op" not in names:
        return "sum"
    given = args[names.index("reduce_op")]
    if isinstance(given, str):
        return given.lower()
    frame = sys._getframe(1)
    while frame is not None and not (
        frame.f_code.co_filename == dist.distributed_c10d.__file__ and "op" in frame.f_locals
    ):
        frame = frame.f_back
    return (
        "sum"
        if frame is None
        else str(getattr(frame.f_locals["op"], "op", frame.f_locals["op"])).split(".")[-1].lower()
    )


def _stack() -> tuple[Frame, ...]:
    """From the innermost frame outside of here to the first one of our or the user's own."""
    frame, found = sys._getframe(1), []
    while frame is not None:
        here = frame_of(frame)
        if not here.file.startswith(HERE):
            found.append(here)
            if stacks.is_own(here) and not here.file.startswith(stacks.SENDERS):
                break
        frame = frame.f_back
    return tuple(found)
