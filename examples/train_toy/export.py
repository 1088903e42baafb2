"""Writes the trained toy as a checkpoint of the published layout, in bfloat16, with its tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import flow
import sound as toy_sound
import torch
import vae as toy_vae
from diffusers import AutoencoderKLWan, Cosmos3OmniTransformer, UniPCMultistepScheduler
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import Cosmos3OmniPipeline
from safetensors.torch import save_file
from scenes import draw_scene
from torch import nn
from transformers import PreTrainedTokenizerFast

from cosmos3_pipeline.models.layouts import LAYOUTS
from cosmos3_pipeline.models.maker import write_checkpoint
from cosmos3_pipeline.models.toy_tokenizer import make_tokenizer, save_tokenizer

# The sentences that the pipeline adds to a caption, with the numbers of the trained sizes.
SENTENCES = """
user assistant system
The video is 0.7 seconds long and is of 24 FPS. This video is of 96x160 resolution.
The video is not 0.7 seconds long and is not of 24 FPS. This video is not of 96x96 resolution.
This image is of 160x160 resolution. This image is not of 160x160 resolution.
"""


def captions() -> list[str]:
    """Enough captions to contain every word."""
    return [draw_scene(seed).caption for seed in range(400)]


def toy_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(int(flow.DIMENSIONS["vocab_size"]), text="\n".join([*captions(), SENTENCES]))


def make_pipeline(vae: AutoencoderKLWan, transformer: Cosmos3OmniTransformer) -> Cosmos3OmniPipeline:
    """diffusers' pipeline of both models. It writes the prompts and packs the tokens."""
    return Cosmos3OmniPipeline(
        transformer=transformer,
        text_tokenizer=toy_tokenizer(),
        vae=vae,
        scheduler=UniPCMultistepScheduler(),
        sound_tokenizer=None,
        enable_safety_checker=False,
    )


def export(out: Path) -> None:
    """Write `out/toy`, which `model.path` opens."""
    vae, transformer = toy_vae.trained_vae(out)[0], flow.make_transformer(sound=True)
    transformer.load_state_dict(torch.load(out / "tasks.pt"))
    flow.load_latents(out, make_pipeline(vae, transformer), {})  # sets mean and deviation in the VAE's config
    folder = out / "toy"
    shutil.rmtree(folder, ignore_errors=True)
    sizes = {"transformer": flow.DIMENSIONS, "vae": toy_vae.DIMENSIONS}
    numbers = {**FIXED, **sizes["transformer"], **toy_sound.SOUND}
    write_checkpoint(
        folder, LAYOUTS["toy"], transformer=numbers, vae=sizes["vae"], sound_tokenizer=toy_sound.DIMENSIONS
    )
    save_tokenizer(toy_tokenizer(), folder / "text_tokenizer", class_name=LAYOUTS["toy"].tokenizer_class)
    for name, model in (("transformer", transformer), ("vae", vae)):
        _replace_weights(folder / name, model, torch.bfloat16)
    # An oscillator counts cycles, which bfloat16 rounds too far.
    _replace_weights(folder / "sound_tokenizer", toy_sound.make_sound_tokenizer(), torch.float32)
    file = folder / "vae" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    for key in ("latents_mean", "latents_std"):
        config[key] = [round(value, 6) for value in vae.config[key]]
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {total / 1e6:.2f} MB")


def _replace_weights(folder: Path, model: nn.Module, dtype: torch.dtype) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    state = {name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, str(folder / "diffusion_pytorch_model.safetensors"), metadata={"format": "pt"})


# Keys of the transformer's config that the layout needs beside the dimensions.
FIXED = {
    "hidden_act": "silu",
    "qk_norm_for_text": True,
    "use_und_k_norm_for_gen": False,
    "rms_norm_eps": 1e-6,
}
