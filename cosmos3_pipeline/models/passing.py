"""Layers of a transformer that pass through the device: each is prefetched while the previous layer computes.

All weights of a layer are in one slab of memory, so that one copy brings the whole layer. The tensors of the
layer's modules are views of the slab.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cosmos3_pipeline.checkpoint.stored import StoredTensor
from cosmos3_pipeline.checkpoint.weights import Slab
from cosmos3_pipeline.distributed.comm import Comm
from cosmos3_pipeline.models.absent import absent
from cosmos3_pipeline.models.reading import Advance, Piece, read_pieces

Wait = Callable[[], None]


class Source(Protocol):
    """A source of slabs: files, host memory or other ranks."""

    def bring(self, number: int, slab: Tensor) -> Wait:
        """Start to fill `slab` with layer `number`. The returned function waits until kernels may read the slab.

        On an accelerator the copy begins after all earlier kernels that read `slab`.
        """
        ...


@dataclass(frozen=True)
class SlabFiles:
    """The slabs of one pathway in the checkpoint's files."""

    slabs: Sequence[Slab]
    stored: dict[str, StoredTensor]

    def read(self, number: int, into: Tensor, *, first: int = 0, check: bool, advance: Advance) -> None:
        """Read elements of slab `number`, from element `first` on, until the memory `into` is full.

        Raises Fault, see `read_pieces`.
        """
        slab, last = self.slabs[number], first + into.numel()
        pieces = []
        for weight, start in zip(slab.weights, slab.starts, strict=True):
            begin, end = max(start, first), min(start + weight.elements, last)
            if begin < end:
                stored = self.stored[weight.name]
                pieces.append(Piece(stored, begin - start, into[begin - first : end - first]))
        read_pieces(pieces, check=check, advance=advance)


class FromFiles:
    """Slabs that a separate thread reads from the checkpoint. A slab that passes again is read again."""

    def __init__(self, files: SlabFiles, device: torch.device, advance: Advance) -> None:
        self._files = files
        self._advance = advance
        self._checked: set[int] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def bring(self, number: int, slab: Tensor) -> Wait:
        free = None if self._stream is None else torch.cuda.current_stream().record_event()
        # The thread holds its arguments for some time after its result is seen. It gets the slab in a list and
        # takes it out, so that it does not keep the slab's memory.
        return self._thread.submit(self._read, number, [slab], free).result

    def _read(self, number: int, slabs: list[Tensor], free: Any) -> None:
        slab = slabs.pop()
        with torch.cuda.stream(self._stream):  # without a GPU the stream is None, and this does nothing
            if self._stream is not None:
                self._stream.wait_event(free)
            seen = number in self._checked
            self._files.read(number, slab, check=not seen, advance=_nothing if seen else self._advance)
        self._checked.add(number)


class FromHost:
    """Slabs that are kept in pinned host memory and copied to an accelerator on a separate stream."""

    def __init__(self, kept: dict[int, Tensor], device: torch.device) -> None:
        self._kept = kept
        self._stream = torch.cuda.Stream(device)

    def bring(self, number: int, slab: Tensor) -> Wait:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            slab.copy_(self._kept[number], non_blocking=True)
            done = self._stream.record_event()
        return lambda: torch.cuda.current_stream().wait_event(done)


class FromRanks:
    """Sharded slabs: every rank of `comm` keeps one shard of each slab, and the shards are gathered."""

    def __init__(self, kept: Sequence[Tensor], comm: Comm) -> None:
        self._kept = kept
        self._comm = comm

    def bring(self, number: int, slab: Tensor) -> Wait:
        return self._comm.gather_into(slab, self._kept[number]).wait


@dataclass(frozen=True)
class Binding:
    """A parameter of a module, and the place of its values in a slab."""

    module: nn.Module
    name: str
    start: int
    shape: tuple[int, ...]

    def bind(self, slab: Tensor) -> None:
        elements = torch.Size(self.shape).numel()
        values = slab[self.start : self.start + elements].view(self.shape)
        self.module._parameters[self.name] = nn.Parameter(values, requires_grad=False)

    def unbind(self) -> None:
        now = self.module._parameters[self.name]
        assert now is not None
        self.module._parameters[self.name] = nn.Parameter(absent(now), requires_grad=False)


class Passing:
    """The layers of one pathway in their order, for any number of passes.

    Layers in `staying` are brought once and stay. The other layers pass through two slabs: one slab is filled
    while the layer in the other computes. With `again` there will be another pass, so the first layer is
    prefetched while the last computes.
    """

    def __init__(
        self,
        slabs: Sequence[Slab],
        modules: nn.Module,
        source: Source,
        *,
        dtype: torch.dtype,
        device: torch.device,
        staying: Collection[int] = (),
        again: bool = True,
        pad: int = 1,
    ) -> None:
        self._bindings = [_bindings(modules, slab) for slab in slabs]
        self._source = source
        self._staying = frozenset(staying)
        self._moving = [number for number in range(len(slabs)) if number not in self._staying]
        self._again = again
        self._where = {"dtype": dtype, "device": device}
        # Rounded up to equal shards for `pad` ranks, so that a slab can be gathered in place.
        self._elements = [slab.share(pad) * pad for slab in slabs]
        self._free: list[Tensor] = []
        self._coming: tuple[int, Tensor, Wait] | None = None
        self._here: tuple[int, Tensor] | None = None
        self._settled: dict[int, Tensor] = {}

    def settle(self) -> None:
        """Bring the layers that stay."""
        for number in sorted(self._staying - self._settled.keys()):
            slab = torch.empty(self._elements[number], **self._where)  # type: ignore[call-overload]
            self._source.bring(number, slab)()
            self._settled[number] = slab
            self._bind(number, slab)

    def __iter__(self) -> Iterator[int]:
        """The number of each layer. Its weights are on the device until the next number is asked for."""
        self.settle()
        for number in range(len(self._bindings)):
            if number not in self._staying:
                self._arrive(number)
            yield number

    def drop(self) -> None:
        """Remove all layers from the device. The next pass brings every layer again."""
        self._recall()
        self._here = None
        self._free.clear()
        self._settled.clear()
        for bindings in self._bindings:
            for binding in bindings:
                binding.unbind()

    def _arrive(self, number: int) -> None:
        if self._here is not None and self._here[0] == number:
            return  # only one layer moves, so it is still here from the previous pass
        if self._coming is not None and self._coming[0] != number:
            self._recall()  # an earlier pass was stopped in the middle
        if self._coming is None:
            self._begin(number)
        assert self._coming is not None
        _, slab, wait = self._coming
        self._coming = None
        wait()
        if self._here is not None:
            self._free.append(self._here[1])
        self._here = number, slab
        self._bind(number, slab)
        place = self._moving.index(number) + 1
        if place < len(self._moving) or (self._again and len(self._moving) > 1):
            self._begin(self._moving[place % len(self._moving)])

    def _begin(self, number: int) -> None:
        size = max(self._elements[moving] for moving in self._moving)
        memory = self._free.pop() if self._free else torch.empty(size, **self._where)  # type: ignore[call-overload]
        slab = memory[: self._elements[number]]
        self._coming = number, memory, self._source.bring(number, slab)

    def _recall(self) -> None:
        if self._coming is not None:
            _, slab, wait = self._coming
            self._coming = None
            with suppress(Exception):  # no caller waits for this slab; whoever asks for it again gets the error
                wait()
            self._free.append(slab)

    def _bind(self, number: int, slab: Tensor) -> None:
        for binding in self._bindings[number]:
            binding.bind(slab)


def _bindings(modules: nn.Module, slab: Slab) -> list[Binding]:
    found = []
    for weight, start in zip(slab.weights, slab.starts, strict=True):
        owner, _, name = weight.name.rpartition(".")
        found.append(Binding(modules.get_submodule(owner), name, start, weight.shape))
    return found


def spread(count: int, layers: int) -> frozenset[int]:
    """`count` of the `layers` layer numbers, evenly spaced, so that the moving layers come at an even pace."""
    return frozenset(number * layers // count for number in range(count))


def _nothing(nbytes: int) -> None: ...
