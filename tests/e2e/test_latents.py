"""The command line gives the latents of diffusers' own pipeline, for a checkpoint of any size.

A condition that the VAE of this package encodes differs by rounding, which guidance multiplies. With
`vae=diffusers` the condition is equal.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_clip, make_photo
from cosmos_models import tiny_pipeline
from diffusers import Cosmos3OmniPipeline, UniPCMultistepScheduler
from PIL import Image
from safetensors.torch import load_file

from cosmos3_pipeline.stages.media import read_frames

PROMPT = "A lighthouse in the fog"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tiny_pipeline(seed=3, num_attention_heads=6, num_key_value_heads=3, num_hidden_layers=2).save_pretrained(path)
    return path


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("task", "vae"),
    [
        ("t2v", "replicated"),
        ("i2v", "replicated"),
        ("i2v", "diffusers"),
        ("v2v", "diffusers"),
        ("t2i", "diffusers"),
    ],
)
def test_latents_are_diffusers(
    task: str, vae: str, folder: Path, generate: Callable[..., Path], tmp_path: Path
) -> None:
    inputs, given = [], {}
    if task == "i2v":
        photo = make_photo(tmp_path / "photo.png")
        inputs, given = [f"task.image={photo}"], {"image": Image.open(photo)}
    if task == "v2v":
        clip = make_clip(tmp_path / "clip.mp4")
        inputs, given = [f"task.video={clip}"], {"video": read_frames(clip, frames=5, fps=24, size=(96, 80))[0]}
    frames = 1 if task == "t2i" else 9
    output = generate(
        f"task={task}",
        *inputs,
        f"model.path={folder}",
        f"vae={vae}",
        f"task.prompt='{PROMPT}'",
        f"task.num_frames={frames}",
        "sampler.steps=3",
        "sampler.seed=11",
        "sampler.guidance_scale=4.5",
        "sampler.flow_shift=5.0",
        "output.latents=true",
        f"topology.threads_per_rank={torch.get_num_threads()}",  # by which small products are divided and rounded
    )
    reference = Cosmos3OmniPipeline.from_pretrained(folder, enable_safety_checker=False)
    reference.scheduler = UniPCMultistepScheduler.from_config(
        reference.scheduler.config, flow_shift=5.0, use_karras_sigmas=False
    )
    reference.set_progress_bar_config(disable=True)
    expected = reference(
        PROMPT,
        **given,
        height=80,
        width=96,
        num_frames=frames,
        fps=24.0,
        num_inference_steps=3,
        guidance_scale=4.5,
        generator=torch.Generator("cpu").manual_seed(11),
        output_type="latent",
    ).video
    latents = load_file(output / "latents.safetensors")["latents"]
    assert latents.shape == expected.shape and latents.std() > 0.3
    # The text's keys and values are computed in a pass of their own. Measured 0; the tolerance is for
    # processors whose matrix kernels round by the number of rows.
    scale = expected.abs().max() if inputs and vae == "replicated" else 1
    assert (latents - expected).abs().max() < 1e-5 * scale
