"""Sums gradients over a link through a codec, and remembers for each parameter what did not get through yet."""

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from disttrain.config.coded import may_be_coded
from disttrain.config.schema import CompressionConfig
from disttrain.grad_compression.carriage import Drawn, carry, scatter_rows
from disttrain.grad_compression.codecs import CODECS
from disttrain.grad_compression.link import Link
from disttrain.grad_compression.powersgd import PowerSGD

Named = Sequence[tuple[str, Tensor]]
Known = Mapping[str, tuple[Tensor, float]]
"""A tensor and a factor by parameter: their product is known to all ranks and is sent with the sum of the gradients."""


class Compressor:
    """The sum of gradients over one group. All its ranks call each method together, with the same names in one order.

    What a step leaves behind becomes valid with `keep`, and is forgotten with `forget`: a skipped step changes nothing. The
    residual of a parameter that is not coded any more is used up at once.
    """

    def __init__(self, config: CompressionConfig, link: Link, seed: int):
        self.link, self._seed = link, seed
        self._shapes: Mapping[str, torch.Size] = {}
        self.coded: dict[str, torch.Size] = {}
        """Local shapes of the parameters that are coded, by name; others travel whole."""
        self.residual: dict[str, Tensor] = {}
        """What this rank has put in and nobody has received, unscaled, in the parameter's local shape."""
        self.factor: dict[str, Tensor] = {}
        """PowerSGD's right factor of the last step; the same on all ranks."""
        self._new_residual: dict[str, Tensor] = {}
        self._new_factor: dict[str, Tensor] = {}
        self._spent: set[str] = set()
        self._step, self._calls, self._scale, self._may_skip = 0, 0, 1.0, True
        self._known: Known = {}
        self.use(config)

    def use(self, config: CompressionConfig) -> None:
        """Code as these settings say, of which "none" codes nothing. Nothing was left behind yet."""
        self._config, self.feedback = config, config.feeds_back
        self.low_rank = PowerSGD(config.rank, config.warm_start) if config.codec == "powersgd" else None
        self.codec = CODECS[config.codec](config) if config.codec in CODECS else None
        self.residual, self.factor, self.coded = {}, {}, self._chosen()

    def cover(self, shapes: Mapping[str, torch.Size], copied: Iterable[str]) -> None:
        """Decide which parameters of these local shapes are coded. Of those in `copied` other ranks hold copies that must
        stay equal to this rank's although their gradients go another way."""
        left_out = set(copied)
        self._shapes = {**self._shapes, **{name: shape for name, shape in shapes.items() if name not in left_out}}
        self.coded = self._chosen()

    def _chosen(self) -> dict[str, torch.Size]:
        return {} if self._config.codec == "none" else {
            name: shape for name, shape in self._shapes.items()
            if may_be_coded(self._config, name, shape) and self.nbytes(shape) < 4 * shape.numel()
        }  # fmt: skip

    def nbytes(self, shape: torch.Size) -> int:
        """Bytes of the code of a parameter."""
        if self.low_rank is not None:
            return self.low_rank.nbytes((shape[0], shape[1:].numel()))
        assert self.codec is not None
        return self.codec.nbytes(-(-shape.numel() // self.codec.block) * self.codec.block)

    def begin(self, step: int, scale: float, may_skip: bool, known: Known | None = None) -> None:
        """A step begins; its gradients are `scale` times too large. One that cannot be skipped changes the residuals at
        once, which spares the memory of new ones beside the old.

        What is `known`, unscaled, the same on all ranks, is coded together with the gradients, each rank adding its share,
        and taken off their sum again: so 1-bit Adam sends its momentum (Tang et al. 2021, algorithm 1).
        """
        self._step, self._scale, self._may_skip, self._known = step, scale, may_skip, known or {}
        self.forget()

    def keep(self) -> None:
        """The step's sums were used: what they lack is still to come."""
        self.residual = {name: left for name, left in self.residual.items() if name not in self._spent}
        self.residual |= self._new_residual
        self.factor |= self._new_factor
        self.forget()

    def forget(self) -> None:
        """The step's sums were not used."""
        self._new_residual, self._new_factor, self._spent = {}, {}, set()
        self._calls = 0

    @torch.no_grad()
    def sum_(self, named: Named) -> None:
        """Sum gradients over the group in place."""
        codes = self._codes
        whole = [(name, gradient) for name, gradient in named if name not in codes]
        coded = [(name, gradient) for name, gradient in named if name in codes]
        if whole:
            flat = self._whole(torch.cat([self._input(*one) for one in whole]))
            _fill([gradient for _, gradient in whole], flat.split([gradient.numel() for _, gradient in whole]))
        if coded and self.codec is not None and self.codec.added is not None and not self.feedback:
            self._add(coded, self.codec.added)
        elif coded:
            names, inputs = [name for name, _ in coded], self._inputs(coded)
            self.link.instead_of(inputs)
            sums, lost = self._carried(names, inputs)
            self._lose(names, lost)
            self._add_known(names, sums, -1.0)
            _fill([gradient for _, gradient in coded], sums)

    def _add(self, coded: Named, dtype: torch.dtype) -> None:
        """Numbers of this type, added on the way: no code is simpler, so nothing is copied more than once."""
        inputs = [self._input(name, gradient) for name, gradient in coded]
        self.link.instead_of(inputs)
        sizes = [x.numel() for x in inputs]
        message = torch.empty(sum(sizes), dtype=dtype, device=inputs[0].device)
        torch._foreach_copy_(list(message.split(sizes)), inputs)
        self.link.sum(message)
        _fill([gradient for _, gradient in coded], message.split(sizes))

    @torch.no_grad()
    def scatter(self, out: Tensor, rows: Tensor, named: Sequence[tuple[str, int]]) -> None:
        """Sum [ranks, n] over the group; row r ends on rank r. The columns are parameters in order, `named` with widths.

        A parameter's rows one after the other are its local rows, filled up.
        """
        columns = list(zip((name for name, _ in named), rows.split([width for _, width in named], 1), strict=True))
        places = out.split([width for _, width in named])
        whole = [i for i, (name, _) in enumerate(columns) if name not in self._codes]
        coded = [i for i, (name, _) in enumerate(columns) if name in self._codes]
        rank = self.link.rank
        if whole:
            inputs = [self._input(*columns[i]).view(self.link.size, -1) for i in whole]
            flat = self._whole(torch.cat(inputs, 1))
            for i, part in zip(whole, flat[rank].split([places[i].numel() for i in whole]), strict=True):
                places[i].copy_(part)
        if not coded:
            return
        names = [columns[i][0] for i in coded]
        inputs = self._inputs([(columns[i][0], columns[i][1]) for i in coded])
        self.link.instead_of(inputs)
        if self.codec is not None and self.codec.carried == "exchange":
            joined = torch.cat([x.view(self.link.size, -1) for x in inputs], 1)
            n = joined.shape[1]
            joined = torch.nn.functional.pad(joined, (0, -n % self.codec.block))
            mine = scatter_rows(self.codec, joined, self.link, self._drawn(names, own=True), self.feedback)
            widths = [places[i].numel() for i in coded]
            sums, lost = mine[:n].split(widths), [part.reshape(-1) for part in joined[:, :n].split(widths, 1)]
        else:
            sums, lost = self._carried(names, inputs)
            sums = [part.view(self.link.size, -1)[rank] for part in sums]
        self._lose(names, [part[: self.coded[name].numel()] for name, part in zip(names, lost, strict=True)])
        _fill([places[i] for i in coded], sums)

    @property
    def _codes(self) -> Mapping[str, torch.Size]:
        """What is coded in this step."""
        return self.coded if self._step > self._config.warmup_steps else {}

    def _whole(self, tensor: Tensor) -> Tensor:
        self.link.instead_of([tensor])
        return self.link.sum(tensor)

    def _inputs(self, coded: Named) -> list[Tensor]:
        """What is coded: all NaN where one element is not finite."""
        inputs = [self._input(name, gradient) for name, gradient in coded]
        self._add_known([name for name, _ in coded], inputs, 1 / self.link.size)
        for x in inputs:
            total = x.sum()
            if x.device.type != "cpu":
                x += total * 0.0  # 0 or NaN, without waiting for it
            elif not math.isfinite(total):
                x.fill_(math.nan)
        return inputs

    def _add_known(self, names: Sequence[str], flat: Sequence[Tensor], share: float) -> None:
        for name, x in zip(names, flat, strict=True) if self._known else ():
            if name in self._known:
                known, factor = self._known[name]
                x.add_(known.reshape(-1), alpha=share * factor * self._scale)

    def _input(self, name: str, gradient: Tensor) -> Tensor:
        """A gradient and what there is to feed back, flat, in the gradient's memory where that can be; it may be filled up
        at its end."""
        x = gradient.reshape(-1)
        residual = self._new_residual.get(name, None if name in self._spent else self.residual.get(name))
        if residual is not None:
            x[: residual.numel()].add_(residual.reshape(-1), alpha=self._scale)
            self._new_residual.pop(name, None)
            self._spent.add(name)
        return x

    def _carried(self, names: Sequence[str], inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The sums, and what got lost of this rank's inputs, perhaps in their memory."""
        common, own = self._drawn(names, own=False), self._drawn(names, own=True)
        if self.low_rank is None:
            assert self.codec is not None
            return carry(self.codec, inputs, self.link, common, own, self.feedback)
        matrices = [x.view(-1, self.coded[name][1:].numel()) for name, x in zip(names, inputs, strict=True)]
        starts = [self._new_factor.get(name, self.factor.get(name)) for name in names]
        sums, factors = self.low_rank.carry(matrices, starts, self.link, common, self.feedback)
        self._new_factor |= dict(zip(names, factors, strict=True))
        return [part.reshape(-1) for part in sums], inputs

    def _lose(self, names: Sequence[str], lost: Iterable[Tensor]) -> None:
        for name, left in zip(names, lost, strict=True) if self.feedback else ():
            if self._may_skip or name not in self.residual:
                self._new_residual[name] = left.div(self._scale).view(self.coded[name])
            else:
                torch.div(left, self._scale, out=self.residual[name].view(-1))
                self._spent.discard(name)

    def _drawn(self, names: Sequence[str], own: bool) -> Drawn:
        """Generators that depend on run, step, parameter and, for those of its own, the rank; on nothing before."""
        self._calls += 1
        call, rank = self._calls, self.link.rank + 1 if own else 0

        def drawn(number: int) -> torch.Generator:
            text = f"{self._seed} {self._step} {names[number % len(names)]} {number} {call} {rank}"
            return torch.Generator().manual_seed(zlib.crc32(text.encode()))

        return drawn


def _fill(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value.view_as(tensor))
