"""Counts what ops would do on an accelerator, from their shapes: memory, kernels, copies, waits of the host.

The accelerator is torch's `meta` device: its tensors have a shape, a dtype and strides, but no values. Tensors of
the host are real, so host code (words, schedules, solvers' coefficients) runs normally. A small accelerator tensor
that was computed from known values keeps a copy of its values on the host. The same ops run on these copies,
because `.item()`, masks and `nonzero` need values.

Placeholders for absent weights (`models.absent`) are not counted. An op of another library counts as one kernel.
It reads its arguments, and writes its results and the arguments that it changes.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from heapq import nlargest
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from cosmos3_pipeline.models.absent import makes_no_weights
from cosmos3_pipeline.planning.hardware import Accelerator
from cosmos3_pipeline.rehearsal.places import Place, here
from cosmos3_pipeline.rehearsal.roofline import (
    OTHER,
    PRODUCT,
    Kernel,
    Roofline,
    attention_flops,
    flops_of,
    kind_of,
)

ACCELERATOR = torch.device("meta")
# Values are kept for tensors of at most this many elements: the tokens of the longest prompts fit, activations do
# not.
LARGEST_KNOWN = 1 << 18
HOLDERS = 3

_MAKERS = {"arange", "zeros", "ones", "full", "scalar_tensor", "eye", "linspace"}
_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "set_"}
_OVERWRITES = {"copy_", "zero_", "fill_"}
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal"}
_CROSSES = {"copy_", "_to_copy"}


@dataclass(frozen=True)
class _Facts:
    """Facts about an op that do not depend on its arguments."""

    name: str
    kind: str
    is_aten: bool
    is_mutable: bool
    launches: bool
    written: tuple[tuple[int, str], ...]  # (position, name) of arguments that it changes
    not_read: tuple[tuple[int, str], ...]  # those of `written` that it does not read


class Tracker(TorchDispatchMode):
    """Counts while it is entered.

    live, peak: bytes on the accelerator, now and at most.
    holders: the lines that have allocated most of the peak.
    roofline: the kernels.
    copied_bytes: bytes copied from the host to the accelerator.
    pinned_bytes, most_pinned_bytes: pinned memory of the host, now and at most.
    waits: for each line, how often the host waits for the accelerator.
    misplaced: for each line, how often an accelerator's op reads a tensor of the host.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.copied_bytes = self.pinned_bytes = self.most_pinned_bytes = 0
        self.roofline = Roofline(accelerator)
        self.waits: Counter[Place] = Counter()
        self.misplaced: Counter[Place] = Counter()
        self.holders: list[tuple[Place, int]] = []
        self._held: dict[int, tuple[Place, int]] = {}
        self._by_place: Counter[Place] = Counter()
        self._facts: dict[Any, _Facts] = {}

    @property
    def live_by_place(self) -> Counter[Place]:
        """The bytes of `live`, by the line that has allocated them."""
        return self._by_place.copy()

    def restart_peak(self) -> None:
        """Forget the peak so far."""
        self.peak, self.holders = self.live, self._largest()

    def hold(self, tensor: Tensor) -> None:
        """Count the memory of `tensor` until it is freed."""
        storage = tensor.untyped_storage()
        key, nbytes = _storage(tensor), storage.nbytes()
        if key in self._held:
            return
        place = here()
        self._held[key] = place, nbytes
        self._by_place[place] += nbytes
        self.live += nbytes
        weakref.finalize(storage, self._gone, key)
        if self.live > self.peak:
            self.peak, self.holders = self.live, self._largest()

    def _gone(self, key: int) -> None:
        place, nbytes = self._held.pop(key)
        self._by_place[place] -= nbytes
        self.live -= nbytes

    def _largest(self) -> list[tuple[Place, int]]:
        return nlargest(HOLDERS, self._by_place.items(), key=lambda item: item[1])

    def launch(self, name: str, *moved: Tensor, kind: str = OTHER, flops: int = 0) -> None:
        """Count a kernel that reads and writes `moved`."""
        # An expanded tensor is read once.
        moved_bytes = sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in moved)
        self.roofline.add(Kernel(name, kind, here()), moved_bytes, flops, moved[0].dtype)

    def wait(self, device: object = None) -> None:
        """Count one wait of the host until the accelerator has done all of its work."""
        self.waits[here()] += 1

    def pin(self, memory: Tensor, nbytes: int) -> None:
        """Count `nbytes` of pinned memory until their placeholder `memory` is freed."""
        # PyTorch's allocator rounds pinned memory up to powers of two.
        taken = 1 << max(nbytes - 1, 0).bit_length()
        self.pinned_bytes += taken
        self.most_pinned_bytes = max(self.most_pinned_bytes, self.pinned_bytes)
        weakref.finalize(memory.untyped_storage(), self._unpin, taken)

    def _unpin(self, taken: int) -> None:
        self.pinned_bytes -= taken

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(t.is_meta for t in inputs) and not _is_accelerator(kwargs.get("device")):
            return func(*args, **kwargs)
        if makes_no_weights():
            return func(*args, **kwargs)
        facts = self._facts_of(func)
        if facts.name.startswith("prim"):
            return func(*args, **kwargs)
        values = _computed(func, facts, args, kwargs, inputs)
        if facts.name in _WAITS or (facts.name == "index" and _has_mask(args)):
            return self._waited(facts, inputs, values)
        if facts.name in ("index_put_", "_index_put_impl_") and _has_mask(args):
            self.wait()  # the host waits for the indices of the mask
        if facts.name in _CROSSES and _leaves(facts, args, kwargs):
            return self._left(facts, args, kwargs, values)
        if facts.name not in _CROSSES and any(not t.is_meta and t.ndim for t in inputs):
            self.misplaced[here()] += 1
        return self._ran(func, facts, args, kwargs, inputs, values)

    def _facts_of(self, func: Any) -> _Facts:
        if func not in self._facts:
            schema = func._schema
            name = schema.name.removeprefix("aten::")
            changed = [
                argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments
            ]
            written = tuple((i, a.name) for i, a in enumerate(schema.arguments) if changed[i])
            is_aten = name != schema.name
            overwrites = is_aten and (name in _OVERWRITES or any(a.is_out for a in schema.arguments))
            self._facts[func] = _Facts(
                name=name,
                kind=kind_of(func),
                is_aten=is_aten,
                is_mutable=schema.is_mutable,
                launches=not func.is_view and name not in _EMPTY,
                written=written,
                # For an op of another library, only an argument named `out` is certainly not read.
                not_read=tuple(one for one in written if overwrites or (not is_aten and one[1] == "out")),
            )
        return self._facts[func]

    def _waited(self, facts: _Facts, inputs: list[Tensor], values: Any) -> Any:
        """The result of an op whose result, or result's shape, depends on values."""
        place = here()
        self.wait()
        if facts.name in ("_local_scalar_dense", "equal"):
            if values is not None:
                return values
            # The value is unknown. Most code only checks that values are valid, so the answer is True or 1.
            dtype = inputs[0].dtype
            return True if dtype == torch.bool or facts.name == "equal" else 1.0 if dtype.is_floating_point else 1
        if values is None:
            raise NotRehearsed(f"{place.name}: the shape of what {facts.name} makes depends on values")
        self.launch(facts.name, *inputs)
        return tree_map(self._on_accelerator, values)

    def _on_accelerator(self, values: Any) -> Any:
        if not isinstance(values, Tensor):
            return values
        made = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device=ACCELERATOR)
        self.hold(made)
        _know(made, values)
        return made

    def _left(self, facts: _Facts, args: Any, kwargs: Any, values: Any) -> Tensor:
        """A copy on the host, with its values if they are known."""
        if not kwargs.get("non_blocking"):
            self.wait()
        source: Tensor = args[1] if facts.name == "copy_" else args[0]
        if facts.name == "copy_":
            target: Tensor = args[0]
            return target
        if values is not None:
            copy: Tensor = values.clone()
            return copy
        return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)

    def _ran(self, func: Any, facts: _Facts, args: Any, kwargs: Any, inputs: list[Tensor], values: Any) -> Any:
        out = func(*args, **kwargs)
        if facts.name == "convolution" and _is_channels_last(args[0]):
            # As cuDNN, which returns channels-last output, and copies an input that has gaps.
            out = torch.empty_strided(out.shape, _channels_last(out.shape), dtype=out.dtype, device=ACCELERATOR)
            if not args[0].is_contiguous(memory_format=torch.channels_last_3d):
                dense = torch.empty(args[0].shape, dtype=out.dtype, device=ACCELERATOR)
                self.hold(dense)
                self.launch("clone", args[0], dense)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        changed = _given(facts.written, args, kwargs)
        given = {_storage(t) for t in inputs}
        new = [t for t in made if t.is_meta and _storage(t) not in given]
        for tensor in new:
            self.hold(tensor)
        if facts.name in _CROSSES and not all(t.is_meta for t in inputs):
            self.copied_bytes += sum(t.nbytes for t in inputs if not t.is_meta)
            if not _goes_on(facts, args, kwargs):
                self.wait()  # PyTorch waits until the accelerator has finished a blocking copy
        elif facts.launches and (new or changed):  # otherwise the result is a view of an argument
            ids = {id(t) for t in changed}
            not_read = {id(t) for t in _given(facts.not_read, args, kwargs)}
            read = [t for t in inputs if id(t) not in not_read]
            written = [*changed, *(t for t in made if id(t) not in ids)]
            flops = flops_of(func, args, kwargs, out)
            self.launch(facts.name, *read, *written, kind=facts.kind, flops=flops)
        known = [None] * len(made) if values is None else tree_leaves(values)
        for tensor in changed:
            _know(tensor, None)
        for tensor, value in zip(made, known, strict=False):
            if tensor.is_meta and (value is not None or facts.is_mutable):
                _know(tensor, value)
        return out


class NotRehearsed(RuntimeError):
    """The rehearsed code needs values, but only shapes are known."""


class _Functions(TorchFunctionMode):
    """Handles calls that a dispatch mode sees too late or not at all: tensors from Python numbers, attention."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__()
        self._tracker = tracker

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return self._attend(*args[:3])
        if func is torch.empty and kwargs.get("pin_memory"):
            return self._pinned(*args, dtype=kwargs["dtype"])
        makes = func in (torch.tensor, torch.as_tensor) and _is_accelerator(kwargs.get("device"))
        if makes and not makes_no_weights():
            return func(*args, **{**kwargs, "device": "cpu"}).to(ACCELERATOR)
        return func(*args, **kwargs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As a fused kernel: returns [B, H, S, D] with contiguous heads per row, and allocates one sum per row."""
        batch, heads, rows, _ = query.shape
        out = query.new_empty(batch, rows, heads, value.shape[-1]).transpose(1, 2)
        sums = query.new_empty(batch, heads, rows, dtype=torch.float32)
        flops = attention_flops(query, key, value)
        self._tracker.launch("attention", query, key, value, out, sums, kind=PRODUCT, flops=flops)
        return out

    def _pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A placeholder for pinned memory of the host: the full shape, but the memory of one element."""
        memory = torch.empty(1, dtype=dtype)
        self._tracker.pin(memory, math.prod(shape) * memory.element_size())
        return memory.expand(*shape)


@contextmanager
def rehearsing(tracker: Tracker) -> Iterator[None]:
    """Let `tracker` count the work of the block on `ACCELERATOR`."""
    autocast, cuda = torch.autocast, torch.cuda

    def any_autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        # PyTorch has no autocast for the meta device; diffusers enters autocast only to disable it.
        return nullcontext() if device_type == ACCELERATOR.type else autocast(device_type, *args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "autocast", any_autocast))
        # All streams are one stream, on which every copy is done at once.
        others: dict[str, Any] = {"Stream": _Stream, "current_stream": _Stream, "stream": nullcontext}
        others |= {"Event": _Event, "empty_cache": tracker.wait}
        stack.enter_context(mock.patch.multiple(cuda, **others, synchronize=tracker.wait))
        for mode in (tracker, _Functions(tracker), torch.no_grad()):
            stack.enter_context(mode)
        yield


class _Stream:
    """A stream of the accelerator on which everything is done at once."""

    def __init__(self, device: torch.device = ACCELERATOR) -> None: ...

    def wait_stream(self, other: _Stream) -> None: ...

    def wait_event(self, event: None) -> None: ...

    def wait(self, event: None = None) -> None: ...

    def record_event(self, event: None = None) -> _Event:
        return _Event()

    def synchronize(self) -> None:
        torch.cuda.synchronize()  # patched: counts a wait


class _Event:
    """An event of the accelerator that is always done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: _Stream | None = None) -> None: ...

    def wait(self, stream: _Stream | None = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        torch.cuda.synchronize()


def _storage(tensor: Tensor) -> int:
    """An identifier of the memory of `tensor`. A data pointer would not do, because meta tensors have none."""
    return int(tensor.untyped_storage()._cdata)


def _is_accelerator(device: Any) -> bool:
    return device is not None and torch.device(device).type == ACCELERATOR.type


def _known(tensor: Tensor) -> Tensor | None:
    """The values of `tensor`; None if they are unknown."""
    if not tensor.is_meta:
        return tensor if tensor.numel() <= LARGEST_KNOWN else None
    found: Tensor | None = getattr(tensor, "_rehearsed_values", None)
    return found


def _know(tensor: Tensor, values: Tensor | None) -> None:
    if values is not None and values.numel() > LARGEST_KNOWN:
        values = None
    tensor._rehearsed_values = values  # type: ignore[attr-defined]


def _given(arguments: Iterable[tuple[int, str]], args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors among the call's arguments with these (position, name)."""
    given = (args[place] if place < len(args) else kwargs.get(name) for place, name in arguments)
    return [leaf for leaf in tree_leaves(list(given)) if isinstance(leaf, Tensor)]


def _computed(func: Any, facts: _Facts, args: Any, kwargs: Any, inputs: list[Tensor]) -> Any:
    """The op's result on the known values of its inputs; None if the values of one input are unknown."""
    if not facts.is_aten:
        return None  # it may have no CPU kernel
    if inputs:
        if any(_known(t) is None for t in inputs):
            return None
    elif facts.name not in _MAKERS or _elements(facts.name, args) > LARGEST_KNOWN:
        return None

    def on_host(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return _known(leaf)
        return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

    if facts.name == "copy_" and not args[0].is_meta:
        return None  # the host's tensor would be written twice
    return func(*tree_map(on_host, args), **tree_map(on_host, kwargs))


def _elements(name: str, args: Any) -> int:
    return math.prod(args[0]) if name in ("zeros", "ones", "full") else 0


def _has_mask(args: Any) -> bool:
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def _leaves(facts: _Facts, args: Any, kwargs: Any) -> bool:
    """Whether the op copies from the accelerator to the host."""
    if facts.name == "copy_":
        return not args[0].is_meta and args[1].is_meta
    device = kwargs.get("device")
    return bool(args[0].is_meta) and device is not None and torch.device(device).type == "cpu"


def _goes_on(facts: _Facts, args: Any, kwargs: Any) -> bool:
    """Whether the copy is non-blocking, so that the host continues."""
    return bool(kwargs.get("non_blocking") or (facts.name == "copy_" and len(args) > 2 and args[2]))


def _is_channels_last(x: Tensor) -> bool:
    """Whether x [B, C, T, H, W] has contiguous channels, and its pixels in the usual order."""
    if x.ndim != 5:
        return False
    _, channel, *pixels = x.stride()
    return channel == 1 and pixels == sorted(pixels, reverse=True)


def _channels_last(shape: torch.Size) -> tuple[int, ...]:
    _, c, t, h, w = shape
    return c * t * h * w, 1, c * h * w, c * w, c
