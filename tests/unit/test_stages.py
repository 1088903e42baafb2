"""The stages against diffusers' `Cosmos3OmniPipeline` on the same folder, for every task."""

from __future__ import annotations

import hashlib
import io
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers import Cosmos3OmniPipeline, Cosmos3OmniTransformer
from diffusers.modular_pipelines.cosmos.denoise import Cosmos3LoopDenoiser
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from toy_runs import PROMPT, clip_of, components, context_of, reference_pipeline, task_config, toy_dimensions

from cosmos3_pipeline.checkpoint.inspect import CheckpointInfo
from cosmos3_pipeline.config.schema import Encoder, Keep, OutputConfig, SamplerConfig
from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.models.loading import open_checkpoint
from cosmos3_pipeline.stages.context import RunContext
from cosmos3_pipeline.stages.decode import DecodeStage
from cosmos3_pipeline.stages.denoise import DenoiseStage
from cosmos3_pipeline.stages.encode import EncodeStage
from cosmos3_pipeline.stages.export import ExportStage
from cosmos3_pipeline.stages.media import read_frames, read_picture
from cosmos3_pipeline.stages.media.shown import filling
from cosmos3_pipeline.stages.progress import Bars
from cosmos3_pipeline.stages.text import TextStage

NEGATIVE = "blurry, dark"
FAST: Any = {"crf": 17, "preset": "ultrafast", "encoder": Encoder.libx264}


class PlainDenoise(DenoiseStage):
    """The stage with diffusers' own denoiser block, which runs the text every time, and so all of its layers."""

    def __call__(self, context: RunContext) -> None:
        parts = context.components
        whole = Cosmos3OmniTransformer.from_pretrained(
            parts.checkpoint.folder, subfolder="transformer", dtype=parts._dtype
        )
        parts.pipeline.update_components(transformer=whole)
        super().__call__(context)

    def denoiser(self, context: RunContext) -> Any:
        return Cosmos3LoopDenoiser()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointInfo:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COSMOS3_CACHE", str(tmp_path_factory.mktemp("cache")))
        return open_checkpoint(None, **toy_dimensions())


@pytest.fixture(scope="module")
def reference(checkpoint: CheckpointInfo) -> Cosmos3OmniPipeline:
    return reference_pipeline(checkpoint.folder)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    rows, cols = np.mgrid[0:131, 0:173]
    channels = [np.sin(rows / 9) + np.cos(cols / 13), np.sin((rows + cols) / 7), np.cos(rows * cols / 900)]
    Image.fromarray(((np.stack(channels, -1) + 2) * 63).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    rows, cols = np.mgrid[0:122, 0:162]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 162, 122, "yuv420p"
        for i in range(12):
            picture = np.stack([np.sin((rows + 5 * i) / 11), np.cos((cols - 3 * i) / 8), np.sin(i + rows / 5)], -1)
            frame = av.VideoFrame.from_ndarray(((picture + 1) * 127).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def cropped(path: Path, size: tuple[int, int, int]) -> list[Image.Image]:
    """All frames, in a shape in which diffusers has nothing to stretch."""
    with av.open(str(path)) as container:
        return [filling(frame.to_image(), (size[1], size[0])) for frame in container.decode(video=0)]


def text(**changes: Any) -> TextStage:
    task = task_config(**{"prompt": PROMPT, "negative_prompt": NEGATIVE, **changes})
    return TextStage(task, SamplerConfig(guidance_scale=6.0))


def encode(**changes: Any) -> EncodeStage:
    return EncodeStage(task_config(**changes))


def sampler(steps: int, guidance_scale: float, seed: int) -> SamplerConfig:
    return SamplerConfig(steps=steps, guidance_scale=guidance_scale, flow_shift=10.0, seed=seed)


def export(*, modality: str = "video", latents: bool = False) -> ExportStage:
    output = OutputConfig(
        latents=latents, against_replicated=False, crf=17, preset="ultrafast", encoder=Encoder.libx264
    )
    return ExportStage(output, modality=modality)


def denoised(context: RunContext, encode_stage: EncodeStage, denoise_stage: DenoiseStage) -> torch.Tensor:
    for stage in (text(), encode_stage, denoise_stage):
        stage(context)
    latents = context.state.get("latents")
    assert isinstance(latents, torch.Tensor)
    return latents


# Latent rows and columns: 5x7 and 3x5 are odd patch grids, padded by the transformer.
@pytest.mark.sampled(5)
@pytest.mark.long
@pytest.mark.parametrize(
    ("size", "steps", "guidance", "seed"),
    [((80, 112, 9), 3, 6.0, 0), ((96, 64, 5), 2, 1.0, 1), ((48, 80, 17), 2, 6.0, 2)],
    ids=["5x7x3", "6x4x2", "3x5x5"],
)
@pytest.mark.parametrize("task", ["t2v", "i2v", "v2v", "v2v-last", "t2i", "flf2v"])
def test_latents_equal_diffusers(
    task: str,
    size: tuple[int, int, int],
    steps: int,
    guidance: float,
    seed: int,
    checkpoint: CheckpointInfo,
    reference: Cosmos3OmniPipeline,
    photo: Path,
    clip_file: Path,
    tmp_path: Path,
) -> None:
    height, width, num_frames = size if task != "t2i" else (*size[:2], 1)
    condition: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    if task == "i2v":
        condition = {"image": str(photo), "condition_latent_frames": [0]}
        theirs = {"image": Image.open(photo)}
    elif task == "v2v":
        condition = {"video": str(clip_file), "condition_latent_frames": [0, 1]}
        theirs = {"video": cropped(clip_file, size), "condition_frame_indexes_vision": [0, 1]}
    elif task == "v2v-last":
        condition = {"video": str(clip_file), "condition_latent_frames": [1], "condition_keep": Keep.last}
        theirs = {
            "video": cropped(clip_file, size),
            "condition_frame_indexes_vision": [1],
            "condition_video_keep": "last",
        }
    elif task == "flf2v":
        last = tmp_path / "last.png"
        Image.open(photo).rotate(180).save(last)
        condition = {"image": str(photo), "last_image": str(last), "condition_latent_frames": [0, -1]}
        ends = [read_picture(file, size=(width, height))[0] for file in (photo, last)]
        theirs = {"video": ends, "condition_frame_indexes_vision": [0, (num_frames - 1) // 4]}
    expected = reference(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        height=height,
        width=width,
        num_frames=num_frames,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        **theirs,
    ).video
    for stage, tolerance in ((PlainDenoise, 0.0), (DenoiseStage, 1e-5)):
        parts = components(checkpoint)
        # Ours multiplies text and vision tokens apart. Measured 0 as well; the tolerance is for processors whose
        # matrix kernels round by the number of rows.
        context = context_of(parts, clip_of(height, width, num_frames), tmp_path)
        latents = denoised(context, encode(**condition), stage(sampler(steps, guidance, seed)))
        assert latents.shape == expected.shape and latents.dtype == torch.float32
        assert (latents - expected).abs().max().item() <= tolerance, stage.__name__
    assert parts._vae_has_encoder == bool(condition)


def test_latents_equal_diffusers_in_bfloat16(checkpoint: CheckpointInfo, photo: Path, tmp_path: Path) -> None:
    half = {"dtype": torch.bfloat16, "vae_dtype": torch.bfloat16}
    expected = reference_pipeline(checkpoint.folder, dtype=torch.bfloat16)(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        image=Image.open(photo),
        height=80,
        width=64,
        num_frames=5,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(4),
        output_type="latent",
    ).video
    parts = components(checkpoint, **half)
    context = context_of(parts, clip_of(80, 64, 5), tmp_path)
    condition = encode(image=str(photo), condition_latent_frames=[0])
    assert torch.equal(denoised(context, condition, PlainDenoise(sampler(2, 6.0, seed=4))), expected)
    kept = components(checkpoint, **half).transformer().model.time_embedder.linear_1.weight.dtype
    assert kept == torch.float32


@pytest.mark.parametrize("task", ["t2v", "i2v", "v2v"])
def test_only_what_conditions_is_encoded(
    task: str, checkpoint: CheckpointInfo, photo: Path, clip_file: Path, tmp_path: Path
) -> None:
    condition: dict[str, dict[str, Any]] = {
        "t2v": {},
        "i2v": {"image": str(photo), "condition_latent_frames": [0]},
        "v2v": {"video": str(clip_file), "condition_latent_frames": [0, 1]},
    }
    parts = components(checkpoint)
    context = context_of(parts, clip_of(48, 64, 17), tmp_path)
    encode(**condition[task])(context)
    if task == "t2v":
        assert parts.pipeline.vae is None
        vae = parts.vae(encoder=False)
        assert vae.encoder is None and vae.quant_conv is None
        return
    encoded = parts.pipeline.vae.encoded_frames
    assert encoded == [2 if task == "i2v" else 5]  # of two frames the VAE encodes one
    latents = context.state.get("x0_tokens_vision")
    assert latents.shape == (1, 48, 5, 3, 4)
    known = 1 if task == "i2v" else 2
    assert latents[:, :, :known].abs().amin(dim=(0, 1, 3, 4)).gt(0).all()
    assert latents[:, :, known:].eq(0).all()


def run(context: RunContext, *stages: Any) -> None:
    for stage in stages:
        stage(context)


@pytest.mark.long
def test_a_video_from_words_to_a_file(
    checkpoint: CheckpointInfo, reference: Cosmos3OmniPipeline, tmp_path: Path
) -> None:
    measured: list[str] = []
    reported: list[tuple[str, int]] = []

    @contextmanager
    def measure(stage: str, /, *, portion: bool = False) -> Any:
        measured.append(stage)
        yield

    class Reporter:
        @contextmanager
        def track(self, what: str, total: int) -> Any:
            counts: list[int] = []
            yield lambda units=1: counts.append(units)
            reported.append((what, sum(counts)))
            assert sum(counts) == total

    parts = components(checkpoint)
    context = context_of(parts, clip_of(80, 112, 9), tmp_path, measure=measure, reporter=Reporter())
    denoise = PlainDenoise(sampler(2, 6.0, seed=0))
    run(context, text(), encode(), denoise, DecodeStage(), export(latents=True))

    expected = reference(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        height=80,
        width=112,
        num_frames=9,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).video
    frames = (expected * 255).round().astype(np.uint8)
    assert context.picture is not None
    assert context.picture.frames_sha256 == hashlib.sha256(frames.tobytes()).hexdigest()
    assert context.picture.num_frames == 9
    how = context.picture.written
    assert how is not None and how.seconds_after_last_frame > 0 and how.encoder_seconds > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latents.safetensors", "video.mp4"]
    assert context.picture.path == tmp_path / "video.mp4"
    assert torch.equal(load_file(tmp_path / "latents.safetensors")["latents"], context.state.get("latents"))
    written = np.stack([np.asarray(frame) for frame in read_frames(tmp_path / "video.mp4", frames=9)[0]])
    assert written.shape == frames.shape
    assert reported == [("denoising steps", 2), ("decoded frames", 9)]
    assert measured[:3] == ["text", "encode", "denoise"] and measured[-1] == "export"
    # Three chunks, the end of the thread that writes them, the end of the file, and the latents.
    assert measured.count("export") == 6
    assert not parts._vae_has_encoder


def test_an_image_is_a_png_of_the_very_pixels(
    checkpoint: CheckpointInfo, reference: Cosmos3OmniPipeline, tmp_path: Path
) -> None:
    context = context_of(components(checkpoint), clip_of(80, 112, 1), tmp_path)
    denoise = PlainDenoise(sampler(2, 4.0, seed=3))
    run(context, text(), encode(), denoise, DecodeStage(), export(modality="image"))
    (expected,) = reference(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        height=80,
        width=112,
        num_frames=1,
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(3),
    ).video
    assert [p.name for p in tmp_path.iterdir()] == ["image.png"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "image.png")), np.asarray(expected))


def test_a_rank_that_is_not_the_root_takes_part_and_writes_nothing(
    checkpoint: CheckpointInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = context_of(components(checkpoint), clip_of(48, 64, 5), tmp_path)
    monkeypatch.setattr(RunContext, "is_root", property(lambda self: False))
    taken: list[int] = []

    def frames() -> Any:
        taken.append(1)
        return
        yield

    context.frames = frames()
    export(latents=True)(context)
    assert taken == [1] and context.picture is None and not list(tmp_path.iterdir())


def test_nothing_is_left_when_decoding_fails(checkpoint: CheckpointInfo, tmp_path: Path) -> None:
    context = context_of(components(checkpoint), clip_of(48, 64, 5), tmp_path)

    def frames() -> Any:
        yield torch.zeros(1, 48, 64, 3, dtype=torch.uint8)
        raise RuntimeError("out of memory")

    context.frames = frames()
    with pytest.raises(RuntimeError, match="out of memory"):
        export(latents=True)(context)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("use_system_prompt", [None, True, False])
def test_tokens_are_those_of_diffusers(
    use_system_prompt: bool | None, checkpoint: CheckpointInfo, reference: Cosmos3OmniPipeline, tmp_path: Path
) -> None:
    words = tmp_path / "words.txt"
    words.write_text("Ein Kätzchen läuft\n", encoding="utf-8")
    context = context_of(components(checkpoint), clip_of(80, 112, 9), tmp_path)
    text(prompt=f"@{words}", system_prompt=use_system_prompt)(context)
    expected = reference.tokenize_prompt(
        "Ein Kätzchen läuft",
        NEGATIVE,
        num_frames=9,
        height=80,
        width=112,
        use_system_prompt=use_system_prompt,
    )
    found = context.state.get("cond_input_ids"), context.state.get("uncond_input_ids")
    assert found == expected


def test_tokens_of_a_caption_are_those_of_diffusers_without_its_sentences(
    checkpoint: CheckpointInfo, reference: Cosmos3OmniPipeline, tmp_path: Path
) -> None:
    context = context_of(components(checkpoint), clip_of(80, 112, 9), tmp_path)
    text(prompt='{"temporal_caption": "Ein Kätzchen läuft"}')(context)
    expected = reference.tokenize_prompt(
        '{"temporal_caption": "Ein K\\u00e4tzchen l\\u00e4uft", "duration": "0s", "fps": 24.0, '
        '"resolution": {"H": 80, "W": 112}, "aspect_ratio": "4,3"}',
        NEGATIVE,
        num_frames=9,
        height=80,
        width=112,
        add_resolution_template=False,
        add_duration_template=False,
    )
    found = context.state.get("cond_input_ids"), context.state.get("uncond_input_ids")
    assert found == expected


@pytest.mark.parametrize(
    ("prompt", "said"),
    [("@absent.txt", "absent.txt is not a file of words"), ("  ", "the prompt is empty"), ("@bytes", "utf-8")],
    ids=["no-file", "empty", "not-text"],
)
def test_words_that_cannot_be_used_are_refused(
    prompt: str, said: str, checkpoint: CheckpointInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Refusal, match=said):
        text(prompt=prompt)(context_of(components(checkpoint), clip_of(48, 64, 5), tmp_path))


def test_the_bar_shows_what_is_done() -> None:
    screen = io.StringIO()
    with Bars(Console(file=screen, width=100)).track("decoded frames", 9) as advance:
        advance()
        advance(8)
    assert "decoded frames" in screen.getvalue() and "9/9" in screen.getvalue()


def test_where_no_bar_moves_a_line_comes_now_and_then() -> None:
    for terminal in (False, True):
        screen, seconds = io.StringIO(), iter((100.0, 101.0, 131.0, 132.0, 170.0, 171.0))
        console = Console(file=screen, width=100, force_terminal=terminal)
        with Bars(console, seconds.__next__).track("benchmark", 9) as advance:
            for units in (2, 2, 2, 2, 1):
                advance(units)
        told = [line for line in screen.getvalue().splitlines() if " of " in line]
        assert told == ([] if terminal else ["benchmark: 4 of 9 after 31 s", "benchmark: 8 of 9 after 70 s"])
