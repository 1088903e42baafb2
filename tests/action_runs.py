"""Runs of the tasks with actions, through the stages that a config builds, and the same by diffusers' pipeline."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import av
import numpy as np
import torch
from diffusers import Cosmos3OmniPipeline, CosmosActionCondition
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from toy_runs import components, context_of

from cosmos3_pipeline import compose
from cosmos3_pipeline.checkpoint.inspect import CheckpointInfo
from cosmos3_pipeline.config.schema import Config
from cosmos3_pipeline.distributed.mesh import RankMesh
from cosmos3_pipeline.planning.geometry import modalities_of
from cosmos3_pipeline.planning.plan import make_plan
from cosmos3_pipeline.stages.build import build_stages
from cosmos3_pipeline.stages.media import read_frames

WORDS = "Put the pot to the left of the purple item"
CHUNK = 8
ACTIONS = np.random.default_rng(5).standard_normal((CHUNK, 10)).astype(np.float32)
LONG_ACTIONS = np.random.default_rng(6).standard_normal((3 * CHUNK, 10)).astype(np.float32)


def pictures(height: int, width: int, count: int) -> list[NDArray[np.uint8]]:
    """`count` frames [height, width, 3] that move."""
    rows, cols = np.mgrid[0:height, 0:width]
    found = []
    for i in range(count):
        waves = np.sin((rows + 5 * i) / 11), np.cos((cols - 3 * i) / 8), np.sin(i + (rows + cols) / 9)
        found.append(((np.stack(waves, -1) + 1) * 127).astype(np.uint8))
    return found


def write_inputs(folder: Path, height: int, width: int) -> list[str]:
    """A photograph, a clip of chunk + 1 frames (both sides even) and actions; the keys of tasks that read them."""
    frames = pictures(height, width, CHUNK + 1)
    Image.fromarray(frames[0]).save(folder / "photo.png")
    np.save(folder / "actions.npy", ACTIONS)
    np.save(folder / "long.npy", LONG_ACTIONS)
    with av.open(str(folder / "clip.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = width - width % 2, height - height % 2, "yuv420p"
        for frame in frames:
            even = frame[: stream.height, : stream.width]
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")))
        file.mux(stream.encode(None))
    return asked(folder, "policy")


def asked(folder: Path, task: str, *others: str) -> list[str]:
    """The overrides of `task` on the inputs in `folder`, at few steps."""
    given = {
        "policy": [f"task.image={folder / 'photo.png'}"],
        "forward_dynamics": [f"task.image={folder / 'photo.png'}", f"task.actions={folder / 'actions.npy'}"],
        "inverse_dynamics": [f"task.video={folder / 'clip.mp4'}"],
    }[task]
    fixed = ["model=toy_random", f"task={task}", "task.domain=bridge_orig_lerobot", f"task.chunk_size={CHUNK}"]
    return [*fixed, *given, "sampler.steps=2", "sampler.seed=3", "task.view_point=wrist_view", *others]


@dataclass
class Made:
    """What a run has made: latents, actions [chunk, width] and uint8 frames [F, H, W, 3], those that it makes."""

    latents: Tensor
    actions: Tensor | None = None
    frames: Tensor | None = None


def in_chunks(folder: Path, *others: str) -> list[str]:
    """The overrides of forward dynamics over three chunks."""
    long = f"task.actions={folder / 'long.npy'}"
    return asked(folder, "forward_dynamics", long, "task.resolution_tier=256", "output.latents=true", *others)


def ours(
    overrides: list[str], checkpoint: CheckpointInfo, folder: Path, mesh: RankMesh | None = None, **changes: Any
) -> Made:
    """The result of our stages. With a `mesh`, this process is one of its ranks."""
    config: Config = compose(overrides)
    config = replace(config, task=replace(config.task, prompt=WORDS, negative_prompt="blurry"))
    plan = make_plan(config)
    settings = {} if mesh is None else {"mesh": mesh}
    parts = components(checkpoint, modalities=modalities_of(config), weights=plan.weights, **settings, **changes)
    context = context_of(parts, plan.clip, folder, chunks=plan.chunks, **settings)
    context = replace(context, fps=config.task.fps)
    made: list[Tensor] = []
    for name, stage in build_stages(config, plan).items():
        if name == "export" and context.frames is not None:
            made = list(context.frames)
            context.frames = iter(made)
        stage(context)
    actions = None
    if context.actions is not None:
        actions = torch.tensor(json.loads(context.actions.read_text())["actions"])
    return Made(context.state.get("latents"), actions, torch.cat(made) if made else None)


def theirs(overrides: list[str], pipeline: Cosmos3OmniPipeline, **call: Any) -> Made:
    """The result of diffusers' pipeline with a `CosmosActionCondition`. `call` replaces inputs of either."""
    config = compose(overrides)
    task = config.task
    source: dict[str, Any] = {}
    if "image" in call:
        source["image"] = call.pop("image")
    elif task.video is not None:
        source["video"], _ = read_frames(task.video, frames=CHUNK + 1, fps=task.fps)
    else:
        assert task.image is not None
        source["image"] = Image.open(task.image).convert("RGB")
    condition = CosmosActionCondition(
        mode=task.name.value,  # type: ignore[arg-type]
        chunk_size=CHUNK,
        domain_name=str(task.domain),
        resolution_tier=int(task.resolution_tier or 0),
        raw_actions=torch.from_numpy(call.pop("raw_actions", ACTIONS)),
        view_point=str(task.view_point),
        **source,
    )
    inputs = {
        "prompt": WORDS,
        "negative_prompt": "blurry",
        "action": condition,
        "fps": task.fps,
        "num_inference_steps": config.sampler.steps,
        "guidance_scale": config.sampler.guidance_scale,
        "use_system_prompt": False,
        "generator": torch.Generator().manual_seed(config.sampler.seed),
        "output_type": "latent",
    }
    found = pipeline(**{**inputs, **call})
    return Made(found.video, None if found.action is None else found.action[0])


def theirs_by_hand(overrides: list[str], pipeline: Cosmos3OmniPipeline) -> Made:
    """The result of one call of diffusers per chunk of `LONG_ACTIONS`. It begins with the previous last picture.

    NVIDIA's cookbook does the same. The latents are what the VAE decodes in all chunks, [chunks, C, T, h, w].
    """
    decoded: list[Tensor] = []
    decode, seed = type(pipeline.vae).decode, compose(overrides).sampler.seed

    def remember(vae: Any, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        decoded.append(z)
        return decode(vae, z, *args, **kwargs)

    video: list[Image.Image] = []
    for number, actions in enumerate(np.split(LONG_ACTIONS, len(LONG_ACTIONS) // CHUNK)):
        given: dict[str, Any] = {"image": video[-1]} if video else {}
        generator = torch.Generator().manual_seed(seed + number)
        with patch.object(type(pipeline.vae), "decode", remember):
            made = theirs(
                overrides, pipeline, raw_actions=actions, generator=generator, output_type="pil", **given
            )
        video += made.latents[1:] if video else made.latents
    frames = torch.stack([torch.from_numpy(np.array(picture)) for picture in video])
    return Made(torch.cat(decoded), frames=frames)
