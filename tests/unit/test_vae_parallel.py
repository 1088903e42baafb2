"""`ParallelVAE` in one process: a drop-in for `AutoencoderKLWan`, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from cosmos_models import tiny_pipeline
from diffusers.video_processor import VideoProcessor
from PIL import Image
from vae_models import WAN21, WAN22, make_vae, vae_config, wan_video

from cosmos3_pipeline.vae import ParallelVAE
from cosmos3_pipeline.vae.inputs import VaeInputError
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.strategy import Exactness, StrategyError
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
    vae.release(decode=LatentShape(1, 3, 3, 2))
    assert all(p.is_meta for p in model.parameters())
    assert torch.equal(vae.decode(latent()).sample, expected)
    with pytest.raises(ValueError, match="was released"):
        vae.encode(torch.zeros(1, 3, 1, 32, 32))
    with pytest.raises(RuntimeError, match="before release"):
        vae.to(torch.bfloat16)


@pytest.mark.long
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


def test_exactness_is_ordered() -> None:
    assert Exactness.BITWISE.satisfies(Exactness.ROUNDING)
    assert Exactness.ROUNDING.satisfies(Exactness.ROUNDING)
    assert not Exactness.APPROXIMATE.satisfies(Exactness.ROUNDING)


@pytest.mark.long
def test_wan_pipeline_runs_unchanged() -> None:
    model = make_vae(vae_config(WAN21, z_dim=16))
    assert (wan_video(alone(model)) - wan_video(model)).abs().max() <= 1e-5


@pytest.mark.long
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
