"""Compares this library's fused kernels with plain ops that compute the same, on the device, at Nano's sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from on_gpu.found import Found
from on_gpu.machine import best
from on_gpu.setting import Setting, kernels_of, on_rank
from on_gpu.vaes import Clip, Vaes, result_of, vae_dimensions

FUSED = "cosmos3_pipeline.fused"
NAMESPACE = "cosmos3::"
# Sizes of the ops' tensors: for the VAE [B, T, H, W, C], for the transformer tokens, hidden size, heads.
PICTURE, SMALL_PICTURE = (1, 2, 180, 320, 512), (1, 2, 4, 6, 32)
TOKENS, SMALL_TOKENS = (11040, 4096, 32), (12, 64, 4)
EPS = 1e-6


def compare_all(setting: Setting) -> None:
    """Compare each op by itself, then a decode with all of them."""
    found = Found(setting.file)
    if find_spec(FUSED) is None:
        found.note(f"this checkout has no {FUSED}, so there is nothing to compare")
        return
    for module in ("vae", "transformer"):
        import_module(f"{FUSED}.{module}")
    with on_rank(setting) as device:
        found.note(f"ops are computed by {import_module(f'{FUSED}.backend').fused_by(device)}")
        compare_ops(found, device, small=setting.small)
        compare_decodes(found, setting, device)


def plain_ops() -> AbstractContextManager[Any]:
    """A context in which the ops run as on an accelerator without Triton."""
    return patch.object(import_module(f"{FUSED}.backend"), "triton_kernels", lambda: None)


def compare_ops(found: Found, device: torch.device, *, small: bool) -> None:
    """Write a row for each op and dtype. An op without a case is named in a note."""
    for dtype in (torch.bfloat16, torch.float32):
        cases = dict(cases_of(device, dtype, small=small))
        for name in declared():
            if name not in cases:
                found.note(f"{name}: no case is known of it here, so it is not compared")
                continue
            try:
                compare(found, name, dtype, cases[name], device)
            # A kernel that cannot be compiled or launched is a result of this step. The next op is still compared.
            except Exception as error:
                found.wrong(f"{name}, {dtype}: {type(error).__name__}: {str(error)[:400]}")


def declared() -> list[str]:
    """The names of this library's ops."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix(NAMESPACE) for name in names if name.startswith(NAMESPACE))


Case = Callable[[], tuple[Callable[[], Any], list[Tensor]]]


def cases_of(device: torch.device, dtype: torch.dtype, *, small: bool) -> Iterator[tuple[str, Case]]:
    """For each op a `Case`. It makes the same arguments every time: a call, and the tensors that it changes."""

    def drawn(*shape: int, wanted: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(wanted)

    generator = torch.Generator(device)
    b, t, h, w, c = SMALL_PICTURE if small else PICTURE
    tokens, hidden, heads = SMALL_TOKENS if small else TOKENS
    ops: Any = torch.ops.cosmos3

    def picture(name: str, *, adds: bool, recalls: bool) -> Case:
        def make() -> tuple[Callable[[], Any], list[Tensor]]:
            generator.manual_seed(0)
            x, added, gamma = drawn(b, t, h, w, c), drawn(b, t, h, w, c), drawn(c, wanted=torch.float32)
            kept, out = drawn(b, 2, h, w, c), torch.empty(b, t + 2 * recalls, h, w, c, dtype=dtype, device=device)
            given = [x, *[added] * adds, gamma, *[kept] * recalls]
            return lambda: getattr(ops, name)(*given, out=out), [out, *[x] * adds, *[kept] * recalls]

        return make

    def row(name: str, *shapes: tuple[int, ...], eps: int | None = None, out: tuple[int, ...] = ()) -> Case:
        def make() -> tuple[Callable[[], Any], list[Tensor]]:
            generator.manual_seed(0)
            given: list[Any] = [drawn(*shape) for shape in shapes]
            changed = [given[0]]
            if eps is not None:
                given.insert(eps, EPS)
            if not out:
                return lambda: getattr(ops, name)(*given), changed
            target = torch.empty(out, dtype=dtype, device=device)
            return lambda: getattr(ops, name)(*given, out=target), [target]

        return make

    for name in ("norm_silu", "norm_silu_after", "add_norm_silu", "add_norm_silu_after"):
        yield name, picture(name, adds=name.startswith("add"), recalls=name.endswith("after"))

    def vae_norm() -> tuple[Callable[[], Any], list[Tensor]]:
        generator.manual_seed(0)
        x, gamma = drawn(b, t, h, w, c), drawn(c, wanted=torch.float32)
        return lambda: ops.vae_norm(x, gamma), []

    yield "vae_norm", vae_norm

    def picture_bytes() -> tuple[Callable[[], Any], list[Tensor]]:
        generator.manual_seed(0)
        clip = drawn(b, 3, t, 2 * h, 2 * w)
        return lambda: ops.picture_bytes(clip), []

    yield "picture_bytes", picture_bytes
    size = hidden // heads
    yield "rms_norm", row("rms_norm", (tokens, hidden), (hidden,), eps=2)
    yield "add_rms_norm", row("add_rms_norm", (tokens, hidden), (tokens, hidden), (hidden,), eps=3)
    yield "silu_mul", row("silu_mul", (tokens, 3 * hidden), (tokens, 3 * hidden))
    turned = (tokens, heads, size)
    angles = (tokens, 1, size)
    yield "norm_rotate", row("norm_rotate", turned, (size,), angles, angles, out=turned, eps=2)


def compare(found: Found, name: str, dtype: torch.dtype, case: Case, device: torch.device) -> None:
    """Write a row: the distance of the kernel's results from the plain ops' results, and the seconds of both."""
    made = results(case)
    with plain_ops():
        expected = results(case)
    worst = max(units_apart(a, b) for a, b in zip(made, expected, strict=True))
    call, _ = case()
    fused_s = best(call, device)
    with plain_ops():
        plain_s = best(call, device)
    declared_units = units_declared(name, dtype)
    found.row(
        "ops",
        op=name,
        dtype=str(dtype).removeprefix("torch."),
        **{"units in the last place": f"{worst:.2f}", "declared": str(declared_units)},
        kernel=f"{fused_s * 1e6:.0f} us",
        plain=f"{plain_s * 1e6:.0f} us",
        ratio=f"{plain_s / fused_s:.2f}",
    )
    if not worst <= declared_units:
        found.wrong(f"{name}, {dtype}: {worst:.2f} units from the plain ops, {declared_units} are declared")


def results(case: Case) -> list[Tensor]:
    """The tensors that one call returns, and those that it changes."""
    call, changed = case()
    returned = call()
    flat = [] if returned is None else [returned] if isinstance(returned, Tensor) else list(returned)
    return [*flat, *changed]


def units_apart(made: Tensor, expected: Tensor) -> float:
    """The largest difference, in units in the last place of the largest number in its row.

    The largest number is the measure, because the sum of a rotation may be smaller than its terms. For bytes the
    result is their largest difference.
    """
    found, plain = made.double(), expected.double()
    if not expected.is_floating_point():
        return float((found - plain).abs().max())
    unit = torch.finfo(expected.dtype).eps * plain.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    distance = float(((found - plain).abs() / unit).max())
    return math.inf if math.isnan(distance) else distance


def units_declared(name: str, dtype: torch.dtype) -> int:
    """The units by which a kernel may differ, as the op's module declares. Bytes must be equal."""
    if name == "picture_bytes":
        return 0
    module = "vae" if ("silu" in name and name != "silu_mul") or name == "vae_norm" else "transformer"
    return int(import_module(f"{FUSED}.{module}").ULPS[dtype])


def compare_decodes(found: Found, setting: Setting, device: torch.device) -> None:
    """Compare a decode by kernels with a decode by plain ops: picture, seconds, and number of launches."""
    clip = Clip("decode", torch.bfloat16, *((2, 4, 4) if setting.small else (3, 45, 80)))
    vaes = Vaes(vae_dimensions(setting.model), device)
    given, alone = vaes.given(clip).to(clip.dtype), vaes.alone(clip.dtype)

    def decode() -> Tensor:
        return result_of(alone, "decode", given)

    ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {"kernels": nullcontext, "plain ops": plain_ops}
    pictures, times = [], []
    for context in ways.values():
        with context():
            pictures.append(decode())
            times.append(best(decode, device))
    off = float((pictures[0].double() - pictures[1].double()).abs().max())
    ratio = times[1] / times[0]
    found.note(f"{clip.name}: plain ops take {ratio:.2f} times as long, and the pictures differ by {off:.1e}")
    for seconds, (way, context) in zip(times, ways.items(), strict=True):
        with context():
            count = sum(kernel.count for kernel in kernels_of(decode, device))
        found.row(clip.name, way=way, seconds=f"{seconds:.3f}", launches=f"{count:,}")
