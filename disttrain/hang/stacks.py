"""What a rank is doing, from its Python stack. Imports no torch.

Files are named as the observer names them: `disttrain/...`, `torch/...`, `python/...` (its library), `site-packages/...`,
and the user's own by their whole path.
"""

from collections.abc import Sequence

from disttrain.hang.files import Frame

OURS = "disttrain/"
LIBRARIES = ("torch/", "python/", "site-packages/", "<")
WAITS = ("torch/distributed/", "site-packages/horovod/", "site-packages/deepspeed/comm/")
"""Where a rank waits for other ranks."""
SENDERS = ("disttrain/parallel/collectives.py", "disttrain/parallel/conjugate.py")
"""Through these others hand tensors to collectives: their callers say more."""

_COMPILES = "compiling", "ranks compile at their own speed: raise run.timeout_s if it only takes long"
_SAVES = "saving or loading a checkpoint", "the storage of the run folder is slow, full or does not answer on its host"
_COMPUTES = "its device is slow or stuck, or it has more to compute than the others"
_DIFFERS = "this code takes longer there than on the other ranks, or another way"
DOING = (
    ("torch/_dynamo/", _COMPILES),
    ("torch/_inductor/", _COMPILES),
    ("disttrain/data/", ("reading its data", "the storage of the data is slow or does not answer on its host")),
    ("disttrain/checkpoint", _SAVES),
    ("disttrain/loggers/", ("writing its records", "a sink or the storage of the run folder does not answer")),
    ("torch/autograd/", ("in the backward pass", _COMPUTES)),
    ("disttrain/models/", ("in the forward pass", _COMPUTES)),
)
"""Beginning of a file's name, what a rank does that is in it, and why that would take long."""


def is_own(frame: Frame) -> bool:
    """Whether a frame is in this package, or in the user's code."""
    return not frame.file.startswith(LIBRARIES)


def waits(stack: Sequence[Frame]) -> bool:
    """Whether a rank waits for others: it is in a communication library, below any code of its own, or in a `wait`."""
    if stack and (stack[0].file.startswith(SENDERS) or ".wait(" in stack[0].text):
        return True
    for frame in stack:
        if frame.file.startswith(WAITS):
            return True
        if is_own(frame):
            return False
    return False


def computes_backward(stack: Sequence[Frame]) -> bool:
    """Whether a rank is inside autograd's own code, which may wait for a collective that it has started there."""
    return bool(stack) and stack[0].file.startswith("torch/autograd/")


def place(stack: Sequence[Frame]) -> str:
    """File, line and source of the line of our or the user's code that a rank is in."""
    own = [frame for frame in stack if is_own(frame)]
    frame = next(iter([*(f for f in own if not f.file.startswith(SENDERS)), *own, *stack]), None)
    if frame is None:
        return "an unknown line"
    return f"{frame.file}:{frame.line}" + (f" ({frame.text})" if frame.text else "")


def doing(stack: Sequence[Frame]) -> tuple[str, str]:
    """What a rank does that waits for nobody, and what may take long about it."""
    evaluating = " of an evaluation" if any(frame.function == "evaluate" for frame in stack) else ""
    for frame in stack:
        if is_own(frame) and not frame.file.startswith(OURS):
            return f"in {frame.function}{evaluating}", _DIFFERS
        for beginning, (words, why) in DOING:
            if frame.file.startswith(beginning):
                return words + evaluating, why
    return f"in {stack[0].function if stack else 'an unknown function'}{evaluating}", _DIFFERS
