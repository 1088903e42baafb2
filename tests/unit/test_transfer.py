"""Transfer on one rank: latents and frames of every chunk are those of diffusers' whole tree of blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers.modular_pipelines.cosmos.modular_blocks_cosmos3 import (
    Cosmos3OmniBlocks,
)
from diffusers.video_processor import VideoProcessor
from PIL import Image
from safetensors.torch import load_file
from toy_runs import PROMPT, clip_of, components, context_of, reference_pipeline, task_config, toy_dimensions

from cosmos3_pipeline.checkpoint.inspect import CheckpointInfo
from cosmos3_pipeline.config.schema import (
    STRENGTHS,
    ControlsConfig,
    Encoder,
    OutputConfig,
    SamplerConfig,
    TaskName,
)
from cosmos3_pipeline.config.shortcut import composition_of
from cosmos3_pipeline.distributed.mesh import RankMesh
from cosmos3_pipeline.errors import ConfigError
from cosmos3_pipeline.jobs.start import prepare
from cosmos3_pipeline.jobs.verify.rank import inputs
from cosmos3_pipeline.models.loading import open_checkpoint
from cosmos3_pipeline.planning.chunks import Chunks
from cosmos3_pipeline.stages.export import ExportStage
from cosmos3_pipeline.stages.made_controls import maker
from cosmos3_pipeline.stages.media import each_frame, look_at, read_frames
from cosmos3_pipeline.stages.progress import Silent
from cosmos3_pipeline.stages.text import TextStage
from cosmos3_pipeline.stages.transfer import TransferStage

NEGATIVE = "blurry, dark"
STEPS = 2
FAST: Any = {"crf": 17, "preset": "ultrafast", "encoder": Encoder.libx264}


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
    dtype: torch.dtype,
    **inputs: Any,
) -> tuple[list[torch.Tensor], np.ndarray]:
    """The latents of each chunk, and the frames [F, H, W, 3] in 0..1, of diffusers' whole tree of blocks."""
    whole, latents = reference_pipeline(checkpoint.folder, dtype=dtype), list[torch.Tensor]()
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
    "half precision": {"total": 9, "per_chunk": 5, "dtype": torch.bfloat16},
}


def ours(
    checkpoint: CheckpointInfo, clips: Mapping[str, Path | str], folder: Path, case: dict[str, Any], **output: Any
) -> Any:
    """The context of a run, with its files in `folder`, and its frames as `made`."""
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
        edge_threshold="medium",
        blur_strength="medium",
        video=str(clips["video"]) if "given" in case or "from_video" in files.values() else None,
    )
    sampler = SamplerConfig(steps=STEPS, guidance_scale=case.get("guidance", 3.0), flow_shift=10.0, seed=3)
    wanted = OutputConfig(
        **{
            "latents": True,
            "control": False,
            "crf": 17,
            "preset": "ultrafast",
            "encoder": Encoder.libx264,
            **output,
        }
    )
    dtype = case.get("dtype", torch.float32)
    parts = components(checkpoint, dtype=dtype, vae_dtype=dtype)
    context: Any = context_of(parts, clip_of(80, 112, chunks.frames), folder, chunks=chunks)
    stages = (
        TextStage(task, sampler),
        TransferStage(task, sampler, wanted, chunks, stays=case.get("stays", True)),
    )
    for stage in stages:
        stage(context)
    made = [portion.clone() for portion in context.frames]
    context.frames, context.made = iter(made), torch.cat(made).numpy()
    ExportStage(wanted, modality="transfer")(context)
    return context


@pytest.mark.sampled(1)
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
        case.get("dtype", torch.float32),
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
    pipeline, same_bits = context.components.pipeline, True
    dtype = pipeline.vae.dtype
    for chunk, expected in zip(found.to(dtype), latents, strict=True):
        assert chunk.std() > 0.4
        mean, inv_std = (
            values.to(dtype).view(-1, 1, 1, 1)
            for values in (pipeline._vae_latents_mean, pipeline._vae_latents_inv_std)
        )
        # Measured 0; the tolerance is for processors whose matrix kernels round by the number of rows.
        unscaled = chunk / inv_std + mean
        torch.testing.assert_close(unscaled, expected[0], rtol=0, atol=1e-5)
        same_bits = same_bits and torch.equal(unscaled, expected[0])
    assert context.picture.num_frames == case["total"]
    frames = (frames * 255).round().astype(np.uint8)
    assert frames.shape == (case["total"], 80, 112, 3)
    if same_bits:
        # diffusers' transfer makes bytes of a picture in float32, its other tasks and ours in the VAE's dtype.
        levels = np.abs(frames.astype(int) - context.made).max()
        assert levels == 0 if dtype == torch.float32 else levels <= 1
    assert context.picture.frames_sha256 == hashlib.sha256(context.made.tobytes()).hexdigest()


def test_strategies_are_verified_on_the_first_chunk(clips: dict[str, Path], tmp_path: Path) -> None:
    asked = ["model=toy_random", "task=transfer", "task.fps=24", "task.height=80", "task.width=112"]
    asked += ["task.num_video_frames_per_chunk=9", "sampler.steps=1", f"task.controls.depth={clips['depth']}"]
    asked += ["job=verify", "vae=parallel", "topology=cpu_x1", "output.control=true", "sampler.seed=3"]
    prepared = prepare(composition_of(asked))
    assert prepared.verification is not None and prepared.plan.chunks.count == 3
    vae, latents, *_ = inputs(prepared.config, prepared.plan, torch.device("cpu"), RankMesh(), reporter=Silent())
    given, _ = read_frames(clips["depth"], frames=9)
    processor = VideoProcessor(vae_scale_factor=16)
    assert vae.picture is not None
    assert torch.equal(vae.picture, processor.preprocess_video(given, height=80, width=112))
    assert latents.shape == (1, 48, 3, 5, 7) and latents.std() > 0.4
    for direction, tensor in (("encode", vae.picture), ("decode", latents)):
        shape = prepared.plan.vae[direction].shape
        assert (shape.frames, shape.rows, shape.cols) == (3, 5, 7), tensor.shape
    assert not Path("control.mp4").exists()


def refusals(*overrides: str) -> str:
    given = {override.partition("=")[0] for override in overrides}
    usual = ["model=toy_random", "task=transfer", "task.fps=24"]
    with pytest.raises(ConfigError) as caught:
        prepare(composition_of([*(one for one in usual if one.partition("=")[0] not in given), *overrides]))
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        pytest.param([], ["task=transfer without a control", "task.controls.edge=edges.mp4"], id="no control"),
        pytest.param(["task.controls.egde=x.mp4"], ["task.controls.egde", "did you mean"], id="unknown control"),
        pytest.param(
            ["task.controls.depth=from_video", "task.video={video}"],
            ["task.controls.depth=from_video", "what another model sees", "task.controls.depth=FILE"],
            id="a map that is not computed",
        ),
        pytest.param(
            ["task.controls.edge=from_video"],
            ["task.controls.edge=from_video without task.video", "task.video=clip.mp4"],
            id="from no video",
        ),
        pytest.param(
            ["task.controls.edge={edge}", "task.controls.depth={short}"],
            ["task.controls.depth has 7 frames and task.controls.edge 20"],
            id="another length",
        ),
        pytest.param(
            ["task.controls.edge={edge}", "task.controls.depth={short}", "job=rehearse"],
            ["task.controls.depth has 7 frames and task.controls.edge 20"],
            id="another length in a rehearsal",
        ),
        pytest.param(
            [
                "task.controls.edge={edge}",
                "task.video={short}",
                "task.num_first_chunk_conditional_frames=8",
            ],
            ["task.num_first_chunk_conditional_frames=8 with task.video of 7 frames", "frames=7 at most"],
            id="more frames than the video has",
        ),
        pytest.param(
            ["task.controls.edge={edge}", "task.controls.depth={wide}"],
            ["task.controls.depth is 2.000 times as wide as high", "of the same shape"],
            id="another shape",
        ),
        pytest.param(
            ["task.controls.edge={edge}", "task.num_frames=21"],
            ["task.num_frames=21 with task.controls.edge of 20 frames", "task.num_frames=20, or null"],
            id="beyond the control",
        ),
        pytest.param(["task.controls.edge=no.mp4"], ["task.controls.edge=no.mp4 is not a file"], id="no file"),
        pytest.param(["task.controls.edge={broken}"], ["is not a video that can be read"], id="no video"),
        pytest.param(["task.controls.edge={edge}", "task.num_frames=1"], ["task=t2i"], id="an image"),
        pytest.param(
            ["task.controls.edge={edge}", "task.video={video}"], ["it would be ignored"], id="video for nothing"
        ),
        pytest.param(
            ["task.controls.edge={edge}", "task.num_first_chunk_conditional_frames=1"],
            ["task.num_first_chunk_conditional_frames=1 without task.video"],
            id="given frames of nothing",
        ),
        pytest.param(
            [
                "task.controls.edge={edge}",
                "task.video={video}",
                "task.num_first_chunk_conditional_frames=17",
            ],
            ["first chunk of 17 frames", "frames=16 at most, or a larger task.num_video_frames_per_chunk"],
            id="a first chunk that is given",
        ),
        pytest.param(
            [
                "task.controls.edge={edge}",
                "task.video={video}",
                "task.num_frames=9",
                "task.num_first_chunk_conditional_frames=12",
            ],
            ["first chunk of 9 frames", "task.num_first_chunk_conditional_frames=8 at most\n"],
            id="a short clip that is given",
        ),
        pytest.param(
            ["task.controls.edge={edge}", "task.num_conditional_frames=17"],
            ["task.num_conditional_frames=17 with task.num_video_frames_per_chunk=17", "makes no new ones"],
            id="an overlap without end",
        ),
        pytest.param(
            [
                "task.controls.edge={edge}",
                "task.control_guidance=1",
                "sampler.guidance_scale=1",
                "topology=cpu_x2",
            ],
            ["topology.cfg=2", "one pass only", "topology.ulysses=2"],
            id="one pass for two ranks",
        ),
        pytest.param(
            ["task.controls.edge={edge}", "output.against_replicated=true"],
            ["output.against_replicated=true with task=transfer"],
            id="a second decode",
        ),
        pytest.param(
            ["task=t2v", "task.controls.edge={edge}", "task.num_frames=null", "output.control=true"],
            ["task.controls.edge", "only transfer reads it", "task.num_frames=null", "output.control=true"],
            id="controls of another task",
        ),
        pytest.param(
            ["model=super_t2i_4step", "task.controls.edge={edge}"],
            ["task=transfer with model=super_t2i_4step, which is distilled"],
            id="distilled",
        ),
    ],
)
def test_what_cannot_be_followed_is_refused(
    overrides: list[str], said: list[str], clips: dict[str, Path], tmp_path: Path
) -> None:
    files = {name: str(file) for name, file in clips.items()}
    files["short"] = str(write_clip(tmp_path / "short.mp4", frames=7, phase=0))
    files["wide"] = str(write_clip(tmp_path / "wide.mp4", frames=20, phase=0, size=(160, 80)))
    files["broken"] = str(tmp_path / "broken.mp4")
    Path(files["broken"]).write_bytes(b"no video")
    told = refusals(*(one.format(**files) for one in overrides)) + "\n"
    for words in said:
        assert words in told
    assert "task.num_frames=20 with" not in told  # which nobody set


def test_a_video_is_as_long_as_its_control(clips: dict[str, Path]) -> None:
    prepared = prepare(
        composition_of(
            ["model=toy_random", "task=transfer", "task.fps=24", f"task.controls.edge={clips['edge']}"]
        ),
        fetch=False,
    )
    assert prepared.config.task.num_frames == 20
    assert (prepared.plan.chunks.count, prepared.plan.clip.num_frames) == (2, 17)


@pytest.mark.parametrize("fps", [None, 24.0, 30.0, 11.0])
def test_frames_are_counted_as_they_are_read(fps: float | None, clips: dict[str, Path]) -> None:
    frames = list(each_frame(clips["edge"], fps=fps, size=(32, 16)))
    look = look_at(clips["edge"], fps=fps)
    assert look.frames == len(frames)
    assert look.aspect == Fraction(112, 80)
    assert len(frames) == (20 if fps is None else round(20 * fps / 24))
    told = {change.kind for _, changes in frames for change in changes}
    assert ("rate" in told) == (fps not in (None, 24.0))


@pytest.mark.long
def test_controls_are_made_of_a_clip_and_written_as_the_model_sees_them(
    checkpoint: CheckpointInfo, clips: dict[str, Path], tmp_path: Path
) -> None:
    case = {"total": 6, "per_chunk": 5, "controls": ("edge", "blur"), "control_guidance": 1.0, "guidance": 1.0}
    made = {**clips, "edge": "from_video", "blur": "from_video"}
    context = ours(checkpoint, made, tmp_path, case, control=True, crf=0, latents=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["control.mp4", "video.mp4"]
    assert context.picture.num_frames == 6
    shown, _ = read_frames(tmp_path / "control.mp4", frames=6)
    frames, _ = read_frames(clips["video"], frames=6, size=(112, 80))
    for control, frame in zip(shown, frames, strict=True):
        assert control.size == (224, 80)
        edges = np.asarray(control)[:, :112].astype(int)
        assert (edges < 20).any() and (edges > 235).any()
        assert ((edges < 20) | (edges > 235)).mean() > 0.95
        blur = np.asarray(control)[:, 112:].astype(int)
        assert np.abs(np.diff(blur, axis=0)).mean() < np.abs(np.diff(np.asarray(frame).astype(int), axis=0)).mean()


def test_strengths_go_from_much_to_little() -> None:
    rows, cols = np.mgrid[0:96, 0:160]
    picture = Image.fromarray(
        ((np.sin(rows / 3) + np.cos(cols * rows / 90) + 2)[..., None] * [60, 50, 40]).astype("u1")
    )
    edges, details = [], []
    for strength in STRENGTHS:
        task = task_config(edge_threshold=strength, blur_strength=strength)
        edges.append(np.asarray(maker("edge", task)(picture)).mean())
        details.append(np.abs(np.diff(np.asarray(maker("blur", task)(picture)).astype(int), axis=1)).mean())
    assert edges == sorted(edges, reverse=True) and edges[0] > edges[-1]
    assert details[0] > details[-1]


def test_without_opencv_a_control_is_asked_for(monkeypatch: pytest.MonkeyPatch, clips: dict[str, Path]) -> None:
    monkeypatch.setattr("cosmos3_pipeline.stages.made_controls.find_spec", lambda name: None)
    told = refusals("task.controls.edge=from_video", f"task.video={clips['video']}")
    assert "task.controls.edge=from_video without OpenCV" in told
    assert "pip install 'cosmos3-pipeline[transfer]'" in told
