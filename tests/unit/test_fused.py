"""Ops of one pass: kernels against plain ops, what is compiled for a GPU, and the branches that run them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from cosmos_models import tiny_pipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_assignments import ROUNDING, Clip, assigned, check
from test_denoise_transformer import run
from torch.utils._python_dispatch import TorchDispatchMode
from vae_models import CONFIGS, make_vae, picture_of

from cosmos3_pipeline.denoise import ParallelLoopDenoiser
from cosmos3_pipeline.distributed.host_path import FORCED
from cosmos3_pipeline.fused import backend, transformer, vae
from cosmos3_pipeline.vae import ParallelVAE, execute
from cosmos3_pipeline.vae.assignment import Assignment
from cosmos3_plugins.replicated import Replicated


@pytest.fixture
def as_accelerator(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets tensors of the host take an accelerator's branches from when it is called on."""

    return lambda: monkeypatch.setenv(FORCED, "1")


class Calls(TorchDispatchMode):
    """How often each op of this package is called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        self.count[name] += namespace == backend.NAMESPACE
        return func(*args, **(kwargs or {}))


# ----------------------------------------------------------------------------------------------------- the kernels
@pytest.mark.thorough
@pytest.mark.ranks
def test_kernels_are_as_near_to_the_plain_ops_as_declared() -> None:
    script = Path(__file__).parents[1] / "interpreted_kernels.py"
    done = subprocess.run(
        [sys.executable, script], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("232 cases")


def kernels() -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """Each kernel with the types of its pointers, and what it is compiled for."""
    triton = pytest.importorskip("cosmos3_pipeline.fused.triton_kernels")
    for dtype in ("bf16", "fp32"):
        pointer, wide = f"*{dtype}", "*fp32"
        for channels in (96, 256, 1024):  # of Wan 2.1 and 2.2
            for kept, silu, adds in ((0, False, False), (0, True, True), (2, True, False), (2, True, True)):
                pointers = {**dict.fromkeys(("x", "added", "kept", "out"), pointer), "gamma": wide}
                yield (
                    "norm_silu_kernel",
                    pointers,
                    {**triton.block_of(channels), "KEPT": kept, "SILU": silu, "ADDS": adds},
                )
        pointers = dict.fromkeys(("x", "added", "weight", "total", "out"), pointer)
        for hidden in (4096, 5120):
            for adds in (False, True):
                yield "add_rms_norm_kernel", pointers, {**triton.block_of(hidden), "ADDS": adds}
        pointers = dict.fromkeys(("x", "weight", "cos", "sin", "out"), pointer)
        yield "norm_rotate_kernel", pointers, triton.block_of_halves(128)
        yield "picture_bytes_kernel", {"x": pointer, "out": "*u8"}, {"UNIT": 8, "BLOCK": 2048}
        yield "silu_mul_kernel", dict.fromkeys(("gate", "up"), pointer), {"UNIT": 8, "BLOCK": 2048}


@pytest.mark.thorough
@pytest.mark.long
def test_every_kernel_is_compiled_for_an_h100_without_one() -> None:
    """Loads have 16 bytes. No product is fused with a sum, because the result would be rounded only once."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = import_module(backend.KERNELS)
    compiled = set()
    for name, pointers, constants in kernels():
        kernel = getattr(module, name)
        types = {
            argument: pointers.get(argument, "constexpr" if argument in constants else "i32")
            for argument in kernel.arg_names
        }
        if "eps" in types:
            types["eps"] = "fp32"
        aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if a in pointers}
        source = ASTSource(kernel, types, constexprs=constants, attrs=aligned)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=module.OPTIONS)
        assert "ld.global.v4.b32" in made.asm["ptx"], name
        assert "fma.rn" not in made.asm["ptx"], name
        assert made.asm["cubin"], name
        compiled.add(name)
    written = {name for name in vars(module) if name.endswith("_kernel")}
    assert compiled == written


def test_every_op_has_a_kernel() -> None:
    module = pytest.importorskip(backend.KERNELS)
    names = [
        schema.split("::")[1]
        for schema in torch._C._dispatch_get_all_op_names()
        if schema.startswith(f"{backend.NAMESPACE}::")
    ]
    assert len(names) == 10
    assert all(callable(getattr(module, name)) for name in names)


@pytest.mark.parametrize(
    "name", ["norm_silu", "norm_silu_after", "norm_rotate", "picture_bytes", "silu_mul", "vae_norm", "rms_norm"]
)
def test_meta_tensors_have_the_shapes_of_real_ones(name: str) -> None:
    """A rehearsal calls the ops on these."""
    arguments: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "norm_silu": ([(1, 2, 3, 4, 8), (8,)], {"out": (1, 2, 3, 4, 8)}),
        "norm_silu_after": ([(1, 2, 3, 4, 8), (8,), (1, 2, 3, 4, 8)], {"out": (1, 4, 3, 4, 8)}),
        "norm_rotate": ([(5, 2, 8), (8,), 1e-6, (5, 1, 8), (5, 1, 8)], {"out": (5, 2, 8)}),
        "picture_bytes": ([(2, 3, 4, 5, 8)], {}),
        "silu_mul": ([(5, 8), (5, 8)], {}),
        "vae_norm": ([(1, 2, 3, 4, 8), (8,)], {}),
        "rms_norm": ([(5, 8), (8,), 1e-6], {}),
    }

    def on(device: str, value: Any) -> Any:
        return torch.ones(value, device=device) if isinstance(value, tuple) else value

    results = []
    for device in ("cpu", "meta"):
        positional, named = arguments[name]
        op = getattr(torch.ops.cosmos3, name)
        results.append(op(*(on(device, v) for v in positional), **{k: on(device, v) for k, v in named.items()}))
    real, meta = results
    assert (real is None and meta is None) or (real.shape == meta.shape and real.dtype == meta.dtype)


def test_without_triton_the_plain_ops_run_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    backend.triton_kernels.cache_clear()
    try:
        assert backend.triton_kernels() is None
        assert backend.triton_kernels() is None
    finally:
        backend.triton_kernels.cache_clear()
    assert [record.message for record in caplog.records if "Triton is not installed" in record.message]
    assert len(caplog.records) == 1


def test_a_kernel_takes_rows_that_begin_at_aligned_addresses_alone() -> None:
    assert backend._has_kernel(torch.empty(2, 96, dtype=torch.bfloat16))
    assert not backend._has_kernel(torch.empty(2, 12, dtype=torch.bfloat16))
    assert not backend._has_kernel(torch.empty(2, 96, dtype=torch.float64))
    assert not backend._has_kernel(torch.empty(96, 96).t())


# --------------------------------------------------------------------------------------------------- who runs them
@pytest.mark.parametrize("config", ["wan22", "wan21 attention"])
def test_an_accelerator_decodes_the_picture_of_a_cpu(config: str, as_accelerator: Callable[[], None]) -> None:
    z = torch.randn(1, CONFIGS[config]["z_dim"], 4, 3, 2)
    expected = ParallelVAE(make_vae(CONFIGS[config]), Replicated(), Replicated()).decode(z).sample
    as_accelerator()
    vae_ = ParallelVAE(make_vae(CONFIGS[config]), Replicated(), Replicated())
    with Calls() as calls:
        found = vae_.decode(z).sample
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    convolutions = sum(op.cached_frames == 2 for op in vae_._vae.program("decode").ops)
    # From the second chunk on, and in two portions of the late ops; upsampling in time has no norm before it.
    recalling = calls.count["norm_silu_after"] + calls.count["add_norm_silu_after"]
    assert recalling > 3 * (convolutions - 4)
    assert calls.count["add_norm_silu_after"] > 0.2 * recalling


@pytest.mark.long
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(given=st.one_of(assigned(slabs=False), assigned(slabs=True)))
def test_any_assignment_gives_the_picture_of_one_rank(
    given: tuple[Clip, Assignment], as_accelerator: Callable[[], None]
) -> None:
    """Bit for bit where the picture is whole: a fused sum or norm has the bits of one that is not fused."""
    as_accelerator()
    clip, assignment = given
    check(clip, assignment, "float", atol=ROUNDING if clip.shape.element_bytes == 8 else 0)


def test_an_accelerator_encodes_the_moments_of_a_cpu(as_accelerator: Callable[[], None]) -> None:
    x = picture_of(make_vae(CONFIGS["wan22"]))
    expected = ParallelVAE(make_vae(CONFIGS["wan22"]), Replicated(), Replicated()).encode(x).latent_dist.mode()
    as_accelerator()
    found = ParallelVAE(make_vae(CONFIGS["wan22"]), Replicated(), Replicated()).encode(x).latent_dist.mode()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_norm_that_recalls_frames_has_the_bits_of_one_that_does_not(
    as_accelerator: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_accelerator()
    z = torch.randn(1, CONFIGS["wan22"]["z_dim"], 4, 3, 2)
    model = make_vae(CONFIGS["wan22"])
    fused = ParallelVAE(model, Replicated(), Replicated()).decode(z).sample
    flow = execute.Flow

    class Apart(flow):  # type: ignore[misc, valid-type]
        follows_at_once = property(lambda self: False, lambda self, value: None)

    monkeypatch.setattr(execute, "Flow", Apart)
    with Calls() as calls:
        apart = ParallelVAE(model, Replicated(), Replicated()).decode(z).sample
    assert calls.count["norm_silu"] and not calls.count["norm_silu_after"]
    assert not calls.count["add_norm_silu"] and not calls.count["add_norm_silu_after"]
    assert torch.equal(fused, apart)


@pytest.mark.parametrize("model", [{}, {"hidden_act": "relu2", "qk_norm_for_text": False}], ids=["gated", "relu2"])
def test_an_accelerator_denoises_the_latents_of_a_cpu(
    model: dict[str, Any], as_accelerator: Callable[[], None]
) -> None:
    expected = run(ParallelLoopDenoiser(), tiny_pipeline(**model))
    as_accelerator()
    with Calls() as calls:
        found = run(ParallelLoopDenoiser(), tiny_pipeline(**model))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    layers = 2 * 4 * tiny_pipeline(**model).transformer.config.num_hidden_layers  # two passes of four steps
    assert calls.count["norm_rotate"] >= 2 * layers
    assert calls.count["add_rms_norm"] >= layers
    assert (calls.count["silu_mul"] >= layers) == (not model)


# --------------------------------------------------------------------------------------------------- the plain ops
def test_plain_norms_are_those_of_diffusers() -> None:
    from diffusers.models.normalization import RMSNorm

    for dtype in (torch.float32, torch.bfloat16):
        norm = RMSNorm(48, 1e-6).to(dtype)
        norm.weight.data.uniform_(0.5, 1.5)
        x = torch.randn(7, 48).to(dtype)
        plain = transformer.plain_rms_norm(x, norm.weight.data, 1e-6)
        # In float32 PyTorch's kernel adds in another order than the module.
        torch.testing.assert_close(plain, norm(x), atol=0, rtol=0 if dtype == torch.bfloat16 else 1e-6)


def test_the_frames_that_are_kept_are_the_last_of_the_buffer() -> None:
    x, gamma = torch.randn(1, 1, 2, 3, 8), torch.rand(8)
    kept = torch.randn(1, 2, 2, 3, 8)
    before, out = kept.clone(), torch.empty(1, 3, 2, 3, 8)
    torch.ops.cosmos3.norm_silu_after(x, gamma, kept, out=out)
    assert torch.equal(out[:, :2], before)
    torch.testing.assert_close(out[:, 2:], torch.nn.functional.silu(vae.plain_rms_norm(x, gamma)))
    assert torch.equal(kept, out[:, 1:])
