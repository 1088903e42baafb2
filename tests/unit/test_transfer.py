"""Transfer on one rank: latents and frames of every chunk are those of diffusers' whole tree of blocks."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers.modular_pipelines.cosmos.modular_blocks_cosmos3 import (
    Cosmos3OmniBlocks,
)
from PIL import Image
from safetensors.torch import load_file
from toy_runs import PROMPT, clip_of, components, context_of, reference_pipeline, task_config, toy_dimensions

from cosmos3_pipeline.checkpoint.inspect import CheckpointInfo
from cosmos3_pipeline.config.schema import ControlsConfig, OutputConfig, SamplerConfig, TaskName
from cosmos3_pipeline.models.loading import open_checkpoint
from cosmos3_pipeline.planning.chunks import Chunks
from cosmos3_pipeline.stages.export import ExportStage
from cosmos3_pipeline.stages.media import read_frames
from cosmos3_pipeline.stages.text import TextStage
from cosmos3_pipeline.stages.transfer import TransferStage

NEGATIVE = "blurry, dark"
STEPS = 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointInfo:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COSMOS3_CACHE", str(tmp_path_factory.mktemp("cache")))
        return open_checkpoint(None, **toy_dimensions())


def write_clip(
    path: Path, *, frames: int, phase: float, size: tuple[int, int] = (112, 80), rate: int = 24
) -> Path:
    width, height = size
    rows, cols = np.mgrid[0:height, 0:width]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(frames):
            waves = [np.sin((rows + 5 * i) / 11 + phase), np.cos((cols - 3 * i) / 8), np.sin(i + phase + rows / 5)]
            picture = ((np.stack(waves, -1) + 1) * 127).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    return {
        name: write_clip(folder / f"{name}.mp4", frames=20, phase=phase)
        for phase, name in enumerate(("edge", "depth", "video"))
    }


def theirs(
    checkpoint: CheckpointInfo,
    controls: dict[str, list[Image.Image]],
    monkeypatch: pytest.MonkeyPatch,
    **inputs: Any,
) -> tuple[list[torch.Tensor], np.ndarray]:
    """The latents of each chunk, and the frames [F, H, W, 3] in 0..1, of diffusers' whole tree of blocks."""
    whole, latents = reference_pipeline(checkpoint.folder), list[torch.Tensor]()
    pipeline = Cosmos3OmniBlocks().init_pipeline()
    names = ("transformer", "vae", "scheduler", "text_tokenizer")
    pipeline.update_components(**{name: getattr(whole, name) for name in names})
    pipeline.disable_safety_checker()
    decode = type(whole.vae).decode

    def remember(self: Any, z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        latents.append(z)
        return decode(self, z, *args, **kwargs)

    monkeypatch.setattr(type(whole.vae), "decode", remember)
    state = pipeline(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        control_videos=controls,
        height=80,
        width=112,
        fps=24.0,
        num_inference_steps=STEPS,
        output_type="np",
        **inputs,
    )
    monkeypatch.undo()
    return latents, np.asarray(state.get("videos"))


CASES: dict[str, dict[str, Any]] = {
    "one chunk, one control": {"total": 9, "per_chunk": 9},
    "chunks that end beyond the clip": {"total": 20, "per_chunk": 9},
    "two controls, given frames, a long overlap": {
        "total": 18,
        "per_chunk": 13,
        "controls": ("edge", "depth"),
        "overlap": 5,
        "given": 6,
    },
    "controls alone guide": {
        "total": 12,
        "per_chunk": 9,
        "stays": False,
        "guidance": 1.0,
        "control_guidance": 3.0,
    },
    "words alone guide": {"total": 12, "per_chunk": 9, "control_guidance": 1.0},
    "no guidance": {"total": 9, "per_chunk": 9, "guidance": 1.0, "control_guidance": 1.0},
}


def ours(
    checkpoint: CheckpointInfo, clips: dict[str, Path], folder: Path, case: dict[str, Any], **output: Any
) -> Any:
    """The context of a run, with its files in `folder`."""
    chunks = Chunks.of(
        case["total"],
        at_most=case["per_chunk"],
        overlap=case.get("overlap", 1),
        given=case.get("given", 0),
        temporal=4,
    )
    files = {name: str(clips[name]) for name in case.get("controls", ("edge",))}
    task = task_config(
        name=TaskName.transfer,
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        controls=ControlsConfig(**{**dict.fromkeys(("edge", "blur", "depth", "seg", "wsm")), **files}),
        control_guidance=case.get("control_guidance", 1.5),
        video=str(clips["video"]) if "given" in case else None,
    )
    sampler = SamplerConfig(steps=STEPS, guidance_scale=case.get("guidance", 3.0), flow_shift=10.0, seed=3)
    wanted = OutputConfig(**{"latents": True, "control": False, "crf": 17, "preset": "ultrafast", **output})
    context = context_of(components(checkpoint), clip_of(80, 112, chunks.frames), folder, chunks=chunks)
    stages = (
        TextStage(task, sampler),
        TransferStage(task, sampler, wanted, chunks, stays=case.get("stays", True)),
    )
    for stage in (*stages, ExportStage(wanted, modality="transfer")):
        stage(context)
    return context


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_every_chunk_is_that_of_diffusers(
    name: str, checkpoint: CheckpointInfo, clips: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    context = ours(checkpoint, clips, tmp_path, case)
    pictures = {key: read_frames(file, frames=20)[0] for key, file in clips.items()}
    latents, frames = theirs(
        checkpoint,
        {key: pictures[key] for key in case.get("controls", ("edge",))},
        monkeypatch,
        video=pictures["video"] if "given" in case else None,
        num_frames=case["total"],
        num_video_frames_per_chunk=case["per_chunk"],
        num_conditional_frames=case.get("overlap", 1),
        num_first_chunk_conditional_frames=case.get("given", 0),
        guidance_scale=case.get("guidance", 3.0),
        control_guidance=case.get("control_guidance", 1.5),
        generator=torch.Generator().manual_seed(3),
    )
    found = load_file(tmp_path / "latents.safetensors")["latents"]
    assert len(found) == len(latents) == context.chunks.count
    pipeline = context.components.pipeline
    for chunk, expected in zip(found, latents, strict=True):
        assert chunk.std() > 0.4
        mean, inv_std = (
            values.view(-1, 1, 1, 1) for values in (pipeline._vae_latents_mean, pipeline._vae_latents_inv_std)
        )
        assert torch.equal(chunk / inv_std + mean, expected[0])
    assert context.picture.num_frames == case["total"]
    frames = (frames * 255).round().astype(np.uint8)
    assert frames.shape == (case["total"], 80, 112, 3)
    assert context.picture.frames_sha256 == hashlib.sha256(frames.tobytes()).hexdigest()
