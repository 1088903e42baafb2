"""`ParallelVAE` in one process: a drop-in for `AutoencoderKLWan`, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from cosmos_models import tiny_pipeline
from diffusers.video_processor import VideoProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from vae_models import WAN21, WAN22, make_vae, vae_config, wan_video

from cosmos3_pipeline.vae import ParallelVAE
from cosmos3_pipeline.vae.inputs import VaeInputError
from cosmos3_pipeline.vae.program import Program, decoder_program, encoder_program
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.strategy import Exactness, StrategyError, StrategyPlan
from cosmos3_plugins.layer_pipeline import LayerPipeline, moving
from cosmos3_plugins.layer_pipeline.balance import Run, best_runs, speed_up
from cosmos3_plugins.layer_pipeline.costs import op_costs
from cosmos3_plugins.layer_pipeline.moving import moving_runs
from cosmos3_plugins.layer_pipeline.passing import Passing
from cosmos3_plugins.replicated import Replicated

CONFIG = vae_config(WAN22)


def alone(model: Any) -> ParallelVAE:
    return ParallelVAE(model, Replicated(), Replicated())


def latent(frames: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, CONFIG["z_dim"], frames, 3, 2, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_bytes_are_those_of_the_video_processor(dtype: torch.dtype) -> None:
    vae = alone(make_vae(CONFIG, dtype=dtype))
    z = latent().to(dtype) * 3  # some pixels are clamped
    chunks = list(vae.decode_stream(z))
    assert [tuple(chunk.shape) for chunk in chunks] == [(1, 48, 32, 3)] + 4 * [(2, 48, 32, 3)]
    assert all(chunk.dtype == torch.uint8 for chunk in chunks)
    frames = VideoProcessor(vae_scale_factor=16).postprocess_video(vae.decode(z).sample, output_type="np")[0]
    expected = torch.from_numpy((frames * 255).round().astype("uint8"))
    assert torch.equal(torch.cat(chunks), expected)


def test_the_stream_holds_one_chunk_at_a_time() -> None:
    vae = alone(make_vae(CONFIG))
    stream = vae.decode_stream(latent(64))
    for _ in range(2):
        next(stream)
    # 62 chunks have not been computed: nothing else would be prompt about it.
    stream.close()  # type: ignore[attr-defined]
    assert vae.decode(latent()).sample.shape == (1, 3, 9, 48, 32)


def test_attributes_and_return_values_are_those_of_the_model() -> None:
    model = make_vae(CONFIG)
    vae = alone(model)
    assert vae.config == model.config
    assert (vae.dtype, vae.device) == (model.dtype, model.device)
    assert (vae.z_dim, vae.temperal_downsample) == (model.z_dim, model.temperal_downsample)
    z = latent()
    assert torch.equal(vae.decode(z, return_dict=False)[0], vae.decode(z).sample)
    x = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    assert torch.equal(vae.encode(x, return_dict=False)[0].mode(), vae.encode(x).latent_dist.mode())
    assert torch.allclose(vae(x).sample, model(x).sample, atol=1e-5)
    # As diffusers does, three frames beyond 1 + 4k are left out.
    more = torch.cat([x, x[:, :, :3]], dim=2)
    assert torch.equal(vae.encode(more).latent_dist.mode(), vae.encode(x).latent_dist.mode())


def test_to_changes_what_it_computes_in() -> None:
    model = make_vae(CONFIG)
    expected = alone(make_vae(CONFIG, dtype=torch.bfloat16)).decode(latent().bfloat16()).sample
    vae = alone(model)
    vae.decode(latent())
    vae.to(torch.bfloat16)
    assert vae.dtype == torch.bfloat16
    assert torch.equal(vae.decode(latent().bfloat16()).sample, expected)


def test_the_half_that_is_not_called_may_be_on_meta() -> None:
    model = make_vae(CONFIG)
    expected = alone(model).decode(latent()).sample
    model.encoder.to("meta")
    model.quant_conv.to("meta")
    vae = alone(model)
    assert torch.equal(vae.decode(latent()).sample, expected)
    assert torch.equal(vae.to("cpu").decode(latent()).sample, expected)
    with pytest.raises(ValueError, match="load the half of the VAE"):
        vae.encode(torch.zeros(1, 3, 1, 32, 32))


def test_after_release_only_what_was_bound_works() -> None:
    model = make_vae(CONFIG)
    vae = alone(model)
    expected = vae.decode(latent()).sample
    vae.release("decode")
    assert all(p.is_meta for p in model.parameters())
    assert torch.equal(vae.decode(latent()).sample, expected)
    with pytest.raises(ValueError, match="was released"):
        vae.encode(torch.zeros(1, 3, 1, 32, 32))
    with pytest.raises(RuntimeError, match="before release"):
        vae.to(torch.bfloat16)


def test_from_folder_is_the_model(tmp_path: Any) -> None:
    model = make_vae(CONFIG)
    expected = alone(model).decode(latent()).sample
    for shards, size in (("one file", "10GB"), ("several", "1MB")):
        folder = tmp_path / shards
        model.save_pretrained(folder, max_shard_size=size)
        vae = ParallelVAE.from_folder(folder, Replicated(), Replicated())
        assert torch.equal(vae.decode(latent()).sample, expected)
        assert vae.config.latents_mean == model.config.latents_mean
        half = ParallelVAE.from_folder(folder, Replicated(), Replicated(), dtype=torch.bfloat16)
        assert half.decode(latent().bfloat16()).sample.dtype == torch.bfloat16
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    listed = json.loads(index.read_text())
    del listed["weight_map"]["decoder.conv_in.weight"]
    index.write_text(json.dumps(listed))
    with pytest.raises(
        ValueError, match=r"lacks 1 of \d+ weights that this rank needs, such as decoder.conv_in.weight"
    ):
        ParallelVAE.from_folder(folder, Replicated(), Replicated()).decode(latent())
    index.unlink()
    with pytest.raises(FileNotFoundError, match="give the `vae` folder"):
        ParallelVAE.from_folder(folder, Replicated(), Replicated())


NAN = latent()
NAN[0, 1, 2, 0, 0] = float("inf")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda v: v.decode(latent()[0]), r"shape \[6, 3, 3, 2\]"),
        (lambda v: v.decode(latent()[:, :, :0]), "none of them 0"),
        (lambda v: v.decode(latent()[:, 1:]), "has 5 channels"),
        (lambda v: v.decode(latent().half()), "torch.float16"),
        (lambda v: v.decode(NAN), "1 of 108 values"),
        (lambda v: list(v.decode_stream(torch.cat([latent(), latent()]))), "batch 2"),
        (lambda v: v.encode(torch.zeros(1, 4, 1, 32, 32)), "has 4 channels"),
        (lambda v: v.encode(torch.zeros(1, 3, 1, 33, 32)), "resize it to 32 x 32"),
        (lambda v: v.encode(torch.full((1, 3, 1, 32, 32), float("nan"))), "NaN"),
    ],
    ids=["ndim", "empty", "channels", "dtype", "inf", "batch", "rgba", "size", "nan"],
)
def test_bad_input_is_refused(call: Any, says: str) -> None:
    with pytest.raises(VaeInputError, match=says):
        call(alone(make_vae(CONFIG)))


def test_a_strategy_for_one_direction_is_refused_for_the_other() -> None:
    class DecodeOnly(Replicated):
        directions = frozenset(("decode",))

    with pytest.raises(StrategyError, match="can decode only"):
        ParallelVAE(make_vae(CONFIG), DecodeOnly(), Replicated())


def test_layer_pipeline_refuses_more_ranks_than_ops() -> None:
    program = decoder_program(CONFIG)
    shape = LatentShape(1, 4, 3, 2)
    plan = LayerPipeline().plan(program, shape, len(program))
    assert [stop - start for start, stop in (share.ops for share in plan.shares)] == [1] * len(program)
    with pytest.raises(StrategyError, match=f"use {len(program)} ranks or fewer"):
        LayerPipeline().plan(program, shape, len(program) + 1)
    with pytest.raises(StrategyError, match="give 0 or more"):
        LayerPipeline(flops_per_element=-1.0).plan(program, shape, 2)
    with pytest.raises(StrategyError, match="give 0 for those of each clip"):
        LayerPipeline(pixels=-1).plan(program, shape, 2)


def test_layer_pipeline_settled_keeps_its_runs_for_any_clip() -> None:
    program = decoder_program(vae_config(WAN22, base_dim=160, decoder_base_dim=256, z_dim=48, num_res_blocks=2))
    small, medium, large, huge = (LatentShape(1, 3, n, n) for n in (1, 16, 32, 80))
    strategy = LayerPipeline()
    settled = strategy.settled(program, small, 2)
    assert strategy.depends_on_clip and not settled.depends_on_clip
    assert strategy.runs(program, small, 2) != strategy.runs(program, large, 2)
    assert strategy.runs(program, large, 2) == strategy.runs(program, huge, 2)
    assert settled.runs(program, huge, 2) == strategy.runs(program, small, 2)
    assert settled.settled(program, huge, 2) == settled
    assert strategy.settled(program, medium, 2) == LayerPipeline(pixels=256)


@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
def test_layer_pipeline_is_balanced_within_one_op(ranks: int) -> None:
    program = decoder_program(vae_config(WAN22, base_dim=160, decoder_base_dim=256, z_dim=48, num_res_blocks=2))
    costs = op_costs(program, 40.0).later
    runs = [run.ops for run in best_runs(program, ranks, op_costs(program, 40.0))]
    assert [runs[0][0], *(stop for _, stop in runs)] == [*(start for start, _ in runs), len(program)]
    assert max(sum(costs[a:b]) for a, b in runs) <= 1.01 * (sum(costs) / ranks + max(costs))
    shares = LayerPipeline().plan(program, LatentShape(1, 48, 45, 80, 2), ranks).shares
    assert sum(share.flops for share in shares) == program.flops(LatentShape(1, 48, 45, 80, 2))


@pytest.mark.parametrize("width", [24, 64, 256])
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_moving_cuts_make_a_line_end_sooner(ranks: int, width: int) -> None:
    config = vae_config(WAN22, base_dim=width, decoder_base_dim=width, num_res_blocks=2)
    gains: dict[int, list[float]] = {4: [], 16: [], 32: []}
    for program, pixels in product((decoder_program(config), encoder_program(config)), (12, 240, 1024)):
        costs = op_costs(program, 50.0, pixels)
        whole = best_runs(program, ranks, costs)
        for chunks, found in gains.items():
            runs = moving_runs(program, ranks, costs, chunks)
            found.append(speed_up(program, costs, runs, chunks) / speed_up(program, costs, whole, chunks))
            assert [run.ops for run in runs] == [run.ops for run in moving_runs(program, ranks, costs, 1)]
            assert_can_be_run(program, runs, chunks)
    assert min(gains[32]) >= 1
    assert min(gains[16]) >= 1 and min(gains[4]) > 0.97
    assert sum(gains[16]) / len(gains[16]) > 1.02


@settings(deadline=None, max_examples=60)
@given(
    width=st.sampled_from([4, 24, 96]),
    blocks=st.integers(1, 3),
    ranks=st.integers(1, 9),
    pixels=st.integers(1, 1024),
    chunks=st.integers(1, 40),
    encode=st.booleans(),
    old=st.booleans(),
)
def test_moving_cuts_can_be_run(
    width: int, blocks: int, ranks: int, pixels: int, chunks: int, *, encode: bool, old: bool
) -> None:
    config = vae_config(WAN21 if old else WAN22, base_dim=width, num_res_blocks=blocks)
    program = (encoder_program if encode else decoder_program)(config)
    assert_can_be_run(program, moving_runs(program, ranks, op_costs(program, 50.0, pixels), chunks), chunks)


def test_a_clip_that_a_ramp_does_not_fit_is_cut_as_the_middle_of_a_long_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = decoder_program(vae_config(WAN22, base_dim=24, num_res_blocks=2))
    costs = op_costs(program, 50.0, 480)
    long = moving_runs(program, 3, costs, moving.CHUNKS)
    monkeypatch.setattr(moving._Line, "improved", lambda line, parts: None)
    runs = moving_runs.__wrapped__(program, 3, costs, 4)
    assert_can_be_run(program, runs, 4)
    assert [run.ops for run in runs] == [run.ops for run in long]
    assert all(len(set(run.runs)) == 1 for run in runs)


def assert_can_be_run(program: Program, runs: Sequence[Run], chunks: int) -> None:
    """On every chunk every op is run by one rank, which has what it needs or gets it from the one before it."""
    for chunk in range(chunks):
        edges = [run.on(chunk) for run in runs]
        assert edges[0][0] == 0 and edges[-1][1] == len(program)
        assert all(a[1] == b[0] for a, b in pairwise(edges)) and all(start < stop for start, stop in edges)
        assert all(
            run.ops[0] <= start < stop <= run.ops[1] for run, (start, stop) in zip(runs, edges, strict=True)
        )
    for run in runs:
        passing = Passing(program, LatentShape(1, chunks, 1, 1), [run.on(chunk) for chunk in range(chunks)])
        for chunk in range(chunks):
            # These assert that what is needed has been seen, and that it may be handed over.
            passing.keeps_passed(chunk)
            passing.handed_over(chunk)
    for above, below in pairwise(runs):
        for chunk in range(1, chunks):
            assert below.on(chunk)[0] >= above.on(chunk - 1)[0], "handed over by a rank that is not the one before"


@pytest.mark.parametrize("frames", [1, 4, 48])
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_layer_pipeline_promises_what_its_line_can_do(frames: int, element_bytes: int) -> None:
    program = decoder_program(vae_config(WAN22, base_dim=160, decoder_base_dim=256, z_dim=48, num_res_blocks=2))
    shape = LatentShape(1, frames, 5, 4, element_bytes)
    plan = LayerPipeline(flops_per_element=30.0).plan(program, shape, 3)
    costs = op_costs(program, 30.0, 20, element_bytes)
    promised = speed_up(program, costs, plan.shares, frames)
    assert plan.note.endswith(f": at best {promised:.2f} times one rank")
    assert promised == pytest.approx(1) if frames == 1 else 1 < promised <= 3
    assert ("moving cuts" in plan.note) == (frames > 1)


def test_exactness_is_ordered() -> None:
    assert Exactness.BITWISE.satisfies(Exactness.ROUNDING)
    assert Exactness.ROUNDING.satisfies(Exactness.ROUNDING)
    assert not Exactness.APPROXIMATE.satisfies(Exactness.ROUNDING)


def test_wan_pipeline_runs_unchanged() -> None:
    model = make_vae(vae_config(WAN21, z_dim=16))
    assert (wan_video(alone(model)) - wan_video(model)).abs().max() <= 1e-5


@pytest.mark.parametrize("image", [False, True], ids=["t2v", "i2v"])
def test_cosmos3_pipeline_runs_unchanged(image: bool) -> None:
    pipe = tiny_pipeline()
    model = pipe.vae
    photo = Image.effect_noise((40, 48), 60).convert("RGB") if image else None

    def video() -> torch.Tensor:
        return pipe(
            "a red kite",
            image=photo,
            height=48,
            width=32,
            num_frames=9,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).video

    expected = video()
    pipe.register_modules(vae=alone(model))
    assert isinstance(pipe.vae, ParallelVAE)
    assert expected.std() > 0.01
    assert (video() - expected).abs().max() <= 1e-4


def test_a_plan_is_asked_for_once_for_each_shape_and_every_refusal_again() -> None:
    asked: list[int] = []

    class Asked(Replicated):
        def plan(self, program: Program, shape: LatentShape, ranks: int) -> StrategyPlan:
            asked.append(shape.frames)
            if shape.frames == 3:
                raise StrategyError("three frames")
            return super().plan(program, shape, ranks)

    vae = ParallelVAE(make_vae(CONFIG), Replicated(), Asked())
    for frames in (2, 2, 1, 2):
        vae.decode(latent(frames))
    assert asked == [2, 1]
    for _ in range(2):
        with pytest.raises(StrategyError, match="three frames"):
            vae.decode(latent(3))
    assert asked == [2, 1, 3, 3]
