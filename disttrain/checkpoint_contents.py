"""What the files of a checkpoint hold, read without a run: names, shapes and places from their headers, tensors one by one.

Every file is safetensors; its header says where each tensor's part begins in the whole one (decision 0006).
"""

import json
import math
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PLACES, VERSION = "DCP_SHARDING_INFO", "DCP_VERSION"
"""Keys of a file's metadata: where parts begin, and of what version of torch's layout that is."""
BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F16": 2, "BF16": 2, "I16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8}
"""Of an element, by safetensors' name of its type."""


@dataclass(frozen=True)
class Part:
    """A block of a tensor in one file."""

    file: Path
    start: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass
class Entry:
    """One tensor of a checkpoint."""

    name: str
    dtype: str
    """safetensors' name: F32, BF16, ..."""
    parts: list[Part] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole: where its parts end."""
        ends = [[at + size for at, size in zip(part.start, part.sizes, strict=True)] for part in self.parts]
        return tuple(map(max, zip(*ends, strict=True)))

    @property
    def nbytes(self) -> int:
        """Of the whole."""
        return math.prod(self.shape) * BYTES.get(self.dtype, 1)

    @property
    def section(self) -> str:
        """model, optimizer, compression or outer."""
        return self.name.partition(".")[0]

    @property
    def has_holes(self) -> bool:
        """Whether its parts do not fill it."""
        return sum(math.prod(sizes) for _, sizes in {(p.start, p.sizes) for p in self.parts}) < math.prod(self.shape)


def entries(path: Path) -> dict[str, Entry]:
    """All tensors by name. Raises OSError or ValueError where a file is not what it should be."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, Entry] = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="np") as opened:  # the header alone: no torch
                places = json.loads(opened.metadata()[PLACES])
                for name in opened.keys():  # noqa: SIM118  it is no dictionary
                    part = opened.get_slice(name)
                    start, sizes = tuple(places[name]["saved_offsets"]), tuple(part.get_shape())
                    entry = found.setdefault(name, Entry(name, part.get_dtype()))
                    _fits(entry, start, sizes, part.get_dtype())
                    entry.parts.append(Part(file, start, sizes))
        except (SafetensorError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{file.name} is no file of a checkpoint: {error}") from error
    return found


def _fits(entry: Entry, start: tuple[Any, ...], sizes: tuple[int, ...], dtype: str) -> None:
    """Raises ValueError where such a part cannot be one of the tensor."""
    if any(type(at) is not int or at < 0 for at in start) or len(start) != len(sizes):
        raise ValueError(f"{entry.name} has no place at {start}")
    if dtype != entry.dtype or any(len(part.sizes) != len(sizes) for part in entry.parts):
        raise ValueError(f"the parts of {entry.name} are not of one kind")


FILE_BYTES = 1 << 30
"""About how much one file holds: what writing it takes beside the tensors themselves."""


def in_files(tensors: "Iterable[tuple[str, Tensor]]") -> "Iterator[dict[str, Tensor]]":
    """The tensors of one file after the other, each asked for when its file's turn has come."""
    held: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > FILE_BYTES:
            yield held
            held = {}
        held[name] = tensor.contiguous()
    yield held


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name when all is written, and is gone when that fails."""
    writing = out.with_name(out.name + ".writing")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    try:
        yield writing
        writing.rename(out)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise


def write(tensors: "dict[str, Tensor]", path: Path) -> None:
    """A file of whole, contiguous tensors."""
    from safetensors.torch import save_file

    places = {name: {"saved_offsets": [0] * tensor.ndim} for name, tensor in tensors.items()}
    save_file(tensors, path, {PLACES: json.dumps(places), VERSION: "1.0", "format": "pt"})


class Reader:
    """Opens each file once."""

    def __init__(self) -> None:
        self._files: dict[Path, Any] = {}
        self._open = ExitStack()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def tensor(self, part: Part, name: str, block: tuple[slice, ...] | None = None) -> "Tensor":
        """A part of a tensor, or a block of it."""
        from safetensors import safe_open

        if part.file not in self._files:
            self._files[part.file] = self._open.enter_context(safe_open(part.file, framework="pt"))
        file = self._files[part.file]
        return file.get_tensor(name) if not block else file.get_slice(name)[block]

    def fill(self, place: "Tensor", start: tuple[int, ...], entry: Entry) -> None:
        """Copy the block of a tensor that begins there. Raises ValueError where the files hold only some of it."""
        filled = set()
        for part in entry.parts:
            begins = tuple(map(max, start, part.start))
            ends = tuple(
                min(a + n, b + m) for a, n, b, m in zip(start, place.shape, part.start, part.sizes, strict=True)
            )
            if all(begin < end for begin, end in zip(begins, ends, strict=True)):
                theirs = tuple(slice(b - at, e - at) for b, e, at in zip(begins, ends, part.start, strict=True))
                ours = tuple(slice(b - at, e - at) for b, e, at in zip(begins, ends, start, strict=True))
                place[ours] = self.tensor(part, entry.name, theirs)
                filled.add((begins, ends))
        if sum(math.prod(e - b for b, e in zip(*block, strict=True)) for block in filled) < place.numel():
            raise ValueError(f"{entry.name} is not complete in it")


def tensor(entry: Entry, reader: Reader | None = None) -> "Tensor":
    """The whole tensor; NaN, or 0 of integers, where no file holds anything. A `reader` keeps files open for the next."""
    if reader is None:
        with Reader() as reader:
            return tensor(entry, reader)
    first = reader.tensor(entry.parts[0], entry.name)
    if first.shape == entry.shape:
        return first
    whole = first.new_full(entry.shape, math.nan if first.is_floating_point() else 0)
    with suppress(ValueError):
        reader.fill(whole, (0,) * whole.ndim, entry)
    return whole
