"""The program against the real modules: for random configs, each op's shape, weights and FLOPs are its."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders import autoencoder_kl_wan as wan
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limits import HANGS
from torch.utils.flop_counter import FlopCounterMode
from vae_models import WAN21, WAN22, vae_config

from cosmos3_pipeline.vae import ops
from cosmos3_pipeline.vae.builder import ProgramError
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.program import Program, decoder_program, encoder_program

SETTINGS = settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def configs(draw: Any, *, halvings: int = 3) -> dict[str, Any]:
    """Configs that `AutoencoderKLWan` accepts, of both styles."""
    residual = draw(st.booleans())
    levels = draw(st.integers(1, 4))
    # A residual shortcut averages or copies whole channels, so widths divide, and the last two are equal.
    mult = sorted(draw(st.lists(st.sampled_from([1, 2, 4]), min_size=levels - 1, max_size=levels - 1)))
    mult = [1, *mult[:-1], (mult[-2] if levels > 2 else 1)] if residual and levels > 1 else [1, 2, 4, 4][:levels]
    steps = draw(
        st.lists(st.booleans(), min_size=levels - 1, max_size=levels - 1).filter(lambda s: sum(s) <= halvings)
    )
    patch = draw(st.sampled_from([None, 1, 2, 4] if residual else [None, 2]))
    width = draw(st.sampled_from([4, 8]))
    return vae_config(
        WAN22 if residual else WAN21,
        base_dim=width,
        decoder_base_dim=draw(st.sampled_from([None, 8, 12])),
        z_dim=draw(st.integers(1, 5)),
        dim_mult=mult,
        num_res_blocks=draw(st.integers(1, 2)),
        temperal_downsample=steps,
        attn_scales=draw(st.sampled_from([[], [1.0], [0.5, 0.25]])),
        in_channels=3 * (patch or 1) ** 2,
        out_channels=3 * (patch or 1) ** 2,
        patch_size=patch,
    )


def module_flops(op: ops.Op, latent: LatentShape, *, first: bool) -> int:
    """As `op.flops`, in the algorithm of `AutoencoderKLWan`, which also multiplies zeros."""
    flops = op.flops(latent, first=first)
    if isinstance(op, ops.SpatialUp):  # a 3 x 3 kernel in the place of four 2 x 2 kernels
        return flops * 9 // 4
    if isinstance(op, ops.Conv) and first:
        return flops * op.kernel[0]
    return flops


def meta_vae(config: dict[str, Any]) -> AutoencoderKLWan:
    with torch.device("meta"):
        return AutoencoderKLWan(**config)


@contextmanager
def attention_in_encoder() -> Iterator[None]:
    """diffusers calls attention blocks in the Wan2.1 encoder with arguments that they do not take."""
    forward = wan.WanAttentionBlock.forward
    wan.WanAttentionBlock.forward = lambda self, x, **_: forward(self, x)
    try:
        yield
    finally:
        wan.WanAttentionBlock.forward = forward


def module_name(op: ops.Op) -> str:
    """The module that does the work of `op`: of a resampling, the convolution."""
    return op.name + (".1" if isinstance(op, ops.SpatialUp | ops.SpatialDown) else "")


class Seen:
    """Output shape [B, T, H, W, C] and FLOPs of every call of the modules behind a program's ops."""

    def __init__(self, vae: AutoencoderKLWan, program: Program, call: Any) -> None:
        wanted = {module_name(op) for op in program.ops}
        names = {module: name for name, module in vae.named_modules() if name in wanted}
        shapes: dict[str, list[tuple[int, ...]]] = {}
        flops: dict[str, list[int]] = {}
        counters: list[Any] = []

        def before(module: torch.nn.Module, args: Any) -> None:
            counter = FlopCounterMode(display=False)
            counter.__enter__()
            counters.append(counter)

        def after(module: torch.nn.Module, args: Any, out: torch.Tensor) -> None:
            counter = counters.pop()
            counter.__exit__(None, None, None)
            name = names[module]
            flops.setdefault(name, []).append(counter.get_total_flops())
            b, c, *rest = out.shape
            # Resampling runs 2D modules on frames in the batch dimension.
            shapes.setdefault(name, []).append((b, *rest, c) if len(rest) == 3 else (1, b, *rest, c))

        handles = []
        for module in names:
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        call()
        for handle in handles:
            handle.remove()
        self.shapes_of, self.flops_of = shapes, flops


def check_ops(program: Program, seen: Seen, latent: LatentShape, chunks: int) -> None:
    compared = 0
    for op in program.ops:
        # A module that runs once per chunk; post_quant_conv and quant_conv run once over all frames.
        for chunk in range(chunks):
            first = chunk == 0
            name = module_name(op)
            calls = seen.shapes_of.get(name)
            if calls is None or len(calls) == 1 != chunks:
                continue
            if isinstance(op, ops.TimeUp | ops.TimeDown):
                if first:
                    continue
                shape, flops = calls[chunk - 1], seen.flops_of[name][chunk - 1]
                if isinstance(op, ops.TimeUp):  # twice the channels, which become twice the frames
                    shape = (shape[0], 2 * shape[1], *shape[2:4], shape[4] // 2)
            else:
                shape, flops = calls[chunk], seen.flops_of[name][chunk]
            if isinstance(op, ops.AverageDown):
                flops = 0
            if isinstance(op, ops.ShortcutBegin) and not op.weights:
                continue
            wanted = op.opens if op.opens is not None else op.target
            assert shape == wanted.shape(latent, first=first), (op, chunk)
            assert flops == module_flops(op, latent, first=first), (op, chunk)
            compared += 1
    assert compared > len(program.ops) // 3


@pytest.mark.long
@SETTINGS
@given(configs(), st.integers(1, 4), st.integers(1, 4))
def test_decoder_ops_are_the_modules(config: dict[str, Any], rows: int, cols: int) -> None:
    vae = meta_vae(config)
    program = decoder_program(config)
    latent = LatentShape(1, 3, rows, cols)
    z = torch.empty(1, config["z_dim"], 3, rows, cols, device="meta")
    seen = Seen(vae, program, lambda: vae.decode(z))
    check_ops(program, seen, latent, 3)
    out = vae.decode(z).sample
    b, frames, height, width, channels = program.ops[-1].target.shape(latent, first=False)
    assert out.shape == (b, channels, program.picture_frames(3), height, width)
    assert (program.spatial * rows, program.picture_channels) == (height, channels)
    assert frames == program.temporal


@pytest.mark.long
@SETTINGS
@given(configs(halvings=2), st.integers(1, 3), st.integers(1, 3))
def test_encoder_ops_are_the_modules(config: dict[str, Any], rows: int, cols: int) -> None:
    vae = meta_vae(config)
    program = encoder_program(config)
    x = torch.empty(1, 3, 9, rows * program.spatial, cols * program.spatial, device="meta")
    latent = LatentShape(1, 1 + 2 * program.latents_per_chunk, rows, cols)
    with attention_in_encoder():
        seen = Seen(vae, program, lambda: vae.encode(x))
        moments = vae.encode(x).latent_dist.parameters
    check_ops(program, seen, latent, 3)
    assert moments.shape == (1, 2 * config["z_dim"], latent.frames, rows, cols)
    assert program.chunks(latent) == 3


@SETTINGS
@given(configs(halvings=2))
def test_weights_are_the_modules(config: dict[str, Any]) -> None:
    vae = meta_vae(config)
    state = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    named = [*decoder_program(config).weights(), *encoder_program(config).weights()]
    assert {w.name: w.shape for w in named} == state
    assert len(named) == len(state)
    decoder = sum(p.numel() for part in (vae.decoder, vae.post_quant_conv) for p in part.parameters())
    assert decoder_program(config).weight_elements() == decoder


@SETTINGS
@given(configs(halvings=2))
def test_every_cut_names_what_crosses_it(config: dict[str, Any]) -> None:
    for program in (decoder_program(config), encoder_program(config)):
        for cut, op in enumerate(program.ops):
            assert program.carried(cut)[0] == op.source
            if cut:
                assert program.ops[cut - 1].target == op.source
        assert program.carried(len(program)) == (program.ops[-1].target,)


def test_what_two_shortcuts_keep_crosses_a_cut_once() -> None:
    program = encoder_program(vae_config(WAN22, num_res_blocks=2))
    names = [op.name for op in program.ops]
    within = names.index("encoder.down_blocks.0.resnets.0.conv1")
    later = names.index("encoder.down_blocks.0.resnets.1.conv1")
    # The first residual block and the level around it begin with the same, the second with what the first made.
    assert (program.shortcuts(within), len(program.carried(within))) == ((0, 0), 2)
    assert (program.shortcuts(later), len(program.carried(later))) == ((0, 1), 3)
    wider = decoder_program(vae_config(WAN22))
    names = [op.name for op in wider.ops]
    within = names.index("decoder.up_blocks.2.resnets.0.conv1")
    assert wider.ops[within - 2].weights, "the shortcut has a convolution"
    assert (wider.shortcuts(within), len(wider.carried(within))) == ((0, 1), 3)
    assert wider.shortcuts(0) == wider.shortcuts(len(wider)) == ()


def test_wan22_has_the_published_size() -> None:
    config = vae_config(WAN22, base_dim=160, decoder_base_dim=256, z_dim=48, num_res_blocks=2)
    decoder, encoder = decoder_program(config).weight_elements(), encoder_program(config).weight_elements()
    assert round((decoder + encoder) / 1e6, 1) == 704.7


def test_the_first_chunk_is_cheaper_than_in_the_modules() -> None:
    program = decoder_program(vae_config(WAN22))
    image = LatentShape(1, 1, 4, 4)
    modules = sum(module_flops(op, image, first=True) for op in program.ops)
    assert program.flops(image) < 0.4 * modules


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"temperal_downsample": [True]}, "give one entry for each"),
        ({"out_channels": 10}, "give a multiple of 4"),
        ({"dim_mult": [1, 3, 5, 4]}, "widths divide"),
    ],
    ids=["too few steps", "patch", "shortcut"],
)
def test_a_config_without_a_program_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ProgramError, match=says):
        decoder_program(vae_config(WAN22, **changes))


def test_an_encoder_that_halves_three_times_is_refused() -> None:
    with pytest.raises(ProgramError, match="two halvings at most work"):
        encoder_program(vae_config(WAN22, temperal_downsample=[True, True, True]))


@pytest.mark.ranks
def test_nothing_here_imports_torch() -> None:
    code = """
import sys
import cosmos3_pipeline.vae, cosmos3_pipeline.vae.program, cosmos3_pipeline.vae.strategy
import cosmos3_pipeline.plugin_api, cosmos3_plugins.replicated, cosmos3_plugins.layer_pipeline
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.program import decoder_program
from vae_configs import CONFIG
plan = cosmos3_plugins.layer_pipeline.LayerPipeline().plan(decoder_program(CONFIG), LatentShape(1, 48, 45, 80), 4)
assert len(plan.shares) == 4
heavy = {"torch", "diffusers", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""
    code = code.replace("from vae_configs import CONFIG", f"CONFIG = {vae_config(WAN22)!r}")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=HANGS)
