"""What ops would do on an accelerator, told from their shapes: memory, kernels, bytes moved, waits of the host.

The accelerator is torch's `meta` device: its tensors have a shape, a dtype and strides, and no values. Tensors of
the host are real, so what computes on the host (words, schedules, solvers' coefficients) runs as ever. A small
tensor of the accelerator that was made of known values keeps a copy of them on the host (its *values*), which
goes through the same ops: so `.item()`, masks and `nonzero` have something to say.

What stands for weights that are not here (`models.absent`) counts for nothing.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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
from cosmos3_pipeline.rehearsal.places import Place, here

ACCELERATOR = torch.device("meta")
# Elements of the largest tensor whose values are kept: the tokens of the longest prompts fit, no activation does.
LARGEST_KNOWN = 1 << 18
HOLDERS = 3

_MAKERS = {"arange", "zeros", "ones", "full", "scalar_tensor", "eye", "linspace"}
_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "set_"}
_OVERWRITES = {"copy_", "zero_", "fill_"}
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal"}
_CROSSES = {"copy_", "_to_copy"}


@dataclass(frozen=True)
class _Facts:
    """What is known of an op before it is called."""

    name: str
    is_view: bool
    is_mutable: bool
    launches: bool
    # The arguments that it writes, where it returns nothing: their places, or names.
    writes: tuple[int | str, ...] = ()


class Tracker(TorchDispatchMode):
    """Counts while it is entered.

    `live` and `peak` are bytes of the accelerator; `holders` says which lines have allocated those of the peak.
    `kernels` are ops that would launch one, `moved_bytes` what they read and write. `waits` counts by place how
    often the host waits for the accelerator, `misplaced` tensors of the host that an op of the accelerator reads.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.kernels = self.moved_bytes = 0
        self.waits: Counter[Place] = Counter()
        self.misplaced: Counter[Place] = Counter()
        self.holders: list[tuple[Place, int]] = []
        self._held: dict[int, tuple[Place, int]] = {}
        self._by_place: Counter[Place] = Counter()
        self._facts: dict[Any, _Facts] = {}

    def restart_peak(self) -> None:
        """Take the peak from here on."""
        self.peak, self.holders = self.live, self._largest()

    def hold(self, tensor: Tensor) -> None:
        """Count the memory of `tensor` until it is gone."""
        storage = tensor.untyped_storage()
        key, nbytes = int(storage._cdata), storage.nbytes()
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

    def launch(self, *moved: Tensor) -> None:
        """Count a kernel that reads and writes `moved`."""
        self.kernels += 1
        # An expanded tensor is read once.
        self.moved_bytes += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in moved)

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
        if facts.name in _WAITS or _reads_mask(facts, args):
            return self._waited(facts, inputs, values)
        if facts.name in _CROSSES and _leaves(facts, args, kwargs):
            return self._left(facts, args, kwargs, values)
        if facts.name not in _CROSSES and any(not t.is_meta and t.ndim for t in inputs):
            self.misplaced[here()] += 1
        return self._ran(func, facts, args, kwargs, inputs, values)

    def _facts_of(self, func: Any) -> _Facts:
        if func not in self._facts:
            schema = func._schema
            name = schema.name.removeprefix("aten::")
            launches = not func.is_view and name not in _EMPTY
            self._facts[func] = _Facts(name, func.is_view, schema.is_mutable, launches, _written(schema))
        return self._facts[func]

    def _waited(self, facts: _Facts, inputs: list[Tensor], values: Any) -> Any:
        """The result of an op whose result, or the shape of it, only its values tell."""
        place = here()
        self.waits[place] += 1
        if facts.name in ("_local_scalar_dense", "equal"):
            if values is not None:
                return values
            # Nobody knows it. Checks ask whether all is well, and what they ask about is not there.
            dtype = inputs[0].dtype
            return True if dtype == torch.bool or facts.name == "equal" else 1.0 if dtype.is_floating_point else 1
        if values is None:
            raise NotRehearsed(f"{place.name}: the shape of what {facts.name} makes depends on values")
        self.launch(*inputs)
        return tree_map(self._on_accelerator, values)

    def _on_accelerator(self, values: Any) -> Any:
        if not isinstance(values, Tensor):
            return values
        made = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device=ACCELERATOR)
        self.hold(made)
        _know(made, values)
        return made

    def _left(self, facts: _Facts, args: Any, kwargs: Any, values: Any) -> Tensor:
        """A copy on the host, with the values where they are known."""
        if not kwargs.get("non_blocking"):
            self.waits[here()] += 1
        source: Tensor = args[1] if facts.name == "copy_" else args[0]
        self.launch(source)
        if facts.name == "copy_":
            target: Tensor = args[0]
            return target
        if values is not None:
            copy: Tensor = values.clone()
            return copy
        return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)

    def _ran(self, func: Any, facts: _Facts, args: Any, kwargs: Any, inputs: list[Tensor], values: Any) -> Any:
        out = func(*args, **kwargs)
        dense = None
        if facts.name == "convolution" and _is_channels_last(args[0]):
            # As cuDNN answers, which copies an input that has gaps.
            out = torch.empty_strided(out.shape, _channels_last(out.shape), dtype=out.dtype, device=ACCELERATOR)
            if not args[0].is_contiguous(memory_format=torch.channels_last_3d):
                dense = torch.empty(args[0].shape, dtype=out.dtype, device=ACCELERATOR)
                self.hold(dense)
                self.launch(args[0], dense)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if not facts.is_view and not facts.is_mutable:
            for tensor in made:
                if tensor.is_meta:
                    self.hold(tensor)
        if facts.launches:
            made += [kwargs[at] if isinstance(at, str) else args[at] for at in facts.writes]
            read = [t for t in inputs if t is not kwargs.get("out")]
            self.launch(*(read[1:] if facts.name in _OVERWRITES else read), *made)
        known: list[Any] = [None] * len(made) if values is None else tree_leaves(values)
        for tensor, value in zip(made, known, strict=False):
            if tensor.is_meta and (value is not None or facts.is_mutable):
                _know(tensor, value)
        return out


class NotRehearsed(RuntimeError):
    """Code that needs values where only shapes are known."""


class _Functions(TorchFunctionMode):
    """What no dispatch mode sees, or sees too late: tensors made of Python's numbers, and fused attention."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__()
        self._tracker = tracker

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return self._attend(*args[:3])
        makes = func in (torch.tensor, torch.as_tensor) and _is_accelerator(kwargs.get("device"))
        if makes and not makes_no_weights():
            return func(*args, **{**kwargs, "device": "cpu"}).to(ACCELERATOR)
        return func(*args, **kwargs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As a fused kernel does, [B, H, S, D]: heads lie side by side, and one sum is kept for each row."""
        batch, heads, rows, _ = query.shape
        out = query.new_empty(batch, rows, heads, value.shape[-1]).transpose(1, 2)
        sums = query.new_empty(batch, heads, rows, dtype=torch.float32)
        self._tracker.launch(query, key, value, out, sums)
        return out


@contextmanager
def rehearsing(tracker: Tracker) -> Iterator[None]:
    """Count in `tracker` what the block does on `ACCELERATOR`."""
    autocast = torch.autocast

    def any_autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        # PyTorch knows none for this device; diffusers asks for one only to switch it off.
        return nullcontext() if device_type == ACCELERATOR.type else autocast(device_type, *args, **kwargs)

    with mock.patch.object(torch, "autocast", any_autocast), tracker, _Functions(tracker), torch.no_grad():
        yield


def _written(schema: Any) -> tuple[int | str, ...]:
    """The places, or names, of the arguments that an op writes which returns nothing."""
    if schema.returns:
        return ()
    alias = [(at, arg, arg.alias_info) for at, arg in enumerate(schema.arguments)]
    return tuple(
        arg.name if arg.kwarg_only else at for at, arg, info in alias if info is not None and info.is_write
    )


def _is_accelerator(device: Any) -> bool:
    return device is not None and torch.device(device).type == ACCELERATOR.type


def _known(tensor: Tensor) -> Tensor | None:
    """The values of `tensor`, where they are known."""
    if not tensor.is_meta:
        return tensor if tensor.numel() <= LARGEST_KNOWN else None
    found: Tensor | None = getattr(tensor, "_rehearsed_values", None)
    return found


def _know(tensor: Tensor, values: Tensor | None) -> None:
    if values is not None and values.numel() > LARGEST_KNOWN:
        values = None
    tensor._rehearsed_values = values  # type: ignore[attr-defined]


def _computed(func: Any, facts: _Facts, args: Any, kwargs: Any, inputs: list[Tensor]) -> Any:
    """What the op makes of the values of its inputs; None where one is not known."""
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


def _reads_mask(facts: _Facts, args: Any) -> bool:
    if facts.name != "index":
        return False
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def _leaves(facts: _Facts, args: Any, kwargs: Any) -> bool:
    """Whether a copy goes from the accelerator to the host."""
    if facts.name == "copy_":
        return not args[0].is_meta and args[1].is_meta
    device = kwargs.get("device")
    return bool(args[0].is_meta) and device is not None and torch.device(device).type == "cpu"


def _is_channels_last(x: Tensor) -> bool:
    """Whether the channels of x [B, C, T, H, W] lie side by side, and its pixels in their order."""
    if x.ndim != 5:
        return False
    _, channel, *pixels = x.stride()
    return channel == 1 and pixels == sorted(pixels, reverse=True)


def _channels_last(shape: torch.Size) -> tuple[int, ...]:
    _, c, t, h, w = shape
    return c * t * h * w, 1, c * h * w, c * w, c
