"""Tasks with actions: the sizes that are planned, what is refused, and equality with diffusers' pipeline."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from action_runs import ACTIONS, CHUNK, WORDS, asked, in_chunks, ours, theirs, theirs_by_hand, write_inputs
from diffusers import Cosmos3OmniPipeline, SeaCacheConfig
from diffusers.pipelines.cosmos import pipeline_cosmos3_omni as omni
from diffusers.video_processor import VideoProcessor
from PIL import Image
from toy_runs import reference_pipeline, toy_dimensions

from cosmos3_pipeline import compose
from cosmos3_pipeline.checkpoint.inspect import CheckpointInfo
from cosmos3_pipeline.config.compose import Composition
from cosmos3_pipeline.config.schema import TaskName
from cosmos3_pipeline.config.shortcut import composition_of
from cosmos3_pipeline.distributed.mesh import RankMesh
from cosmos3_pipeline.errors import ConfigError, Refusal
from cosmos3_pipeline.jobs.start import prepare
from cosmos3_pipeline.jobs.verify.rank import inputs
from cosmos3_pipeline.models.loading import open_checkpoint
from cosmos3_pipeline.planning.action_files import actions_report, read_actions
from cosmos3_pipeline.planning.actions import (
    CANVASES,
    EMBODIMENTS,
    VIEW_POINTS,
    WITHOUT_WIDTH,
    action_of,
    canvas_for,
    content_on,
)
from cosmos3_pipeline.planning.pictures import clip_size, photograph_size
from cosmos3_pipeline.planning.plan import make_plan
from cosmos3_pipeline.stages.media import read_frames, read_picture
from cosmos3_pipeline.stages.progress import Silent

TASKS = ("policy", "forward_dynamics", "inverse_dynamics")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointInfo:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COSMOS3_CACHE", str(tmp_path_factory.mktemp("cache")))
        return open_checkpoint(None, **toy_dimensions())


@pytest.fixture(scope="module")
def reference(checkpoint: CheckpointInfo) -> Cosmos3OmniPipeline:
    return reference_pipeline(checkpoint.folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs of 133 x 211 pixels: neither side is a whole number of latent rows, nor of tier 256's canvases."""
    found = tmp_path_factory.mktemp("inputs")
    write_inputs(found, 133, 211)
    return found


def test_the_tables_are_those_of_diffusers() -> None:
    theirs = {int(tier): list(bins.values()) for tier, bins in omni._ACTION_RESOLUTION_BINS.items()}
    assert {tier: list(canvases.values()) for tier, canvases in CANVASES.items()} == theirs
    for tier, canvases in CANVASES.items():
        assert list(canvases) == [float(ratio) for ratio in omni._ACTION_RESOLUTION_BINS[str(tier)]]
    widths = {name: one.width for name, one in EMBODIMENTS.items()}
    assert widths == omni._EMBODIMENT_TO_RAW_ACTION_DIM
    assert {*widths, *WITHOUT_WIDTH} == set(omni._EMBODIMENT_TO_DOMAIN_ID)
    assert tuple(omni._ACTION_VIEWPOINT_TEMPLATES) == VIEW_POINTS


class Sizes:
    """As much of diffusers' pipeline as decides sizes."""

    video_processor = VideoProcessor(vae_scale_factor=16, resample="bilinear")
    vae_scale_factor_spatial = 16


@pytest.mark.parametrize("tier", CANVASES)
def test_canvas_and_content_are_those_of_diffusers(tier: int) -> None:
    draw = random.Random(tier)
    sizes = [(draw.randint(16, 900), draw.randint(16, 900)) for _ in range(25)]
    sizes += [(16, 700), (900, 17), (31, 31), (256, 256), (192, 320), (480, 832), (1, 1), (703, 1279), (720, 1280)]
    for height, width in sizes[:-3] + sizes[-2:]:
        frames, size, *canvas = Cosmos3OmniPipeline._prepare_action_video_conditioning(
            Sizes(), [Image.new("RGB", (width, height))], tier, 1, "cpu", torch.float32
        )
        latents = torch.empty(1, 1, 1, frames.shape[-2] // 16, frames.shape[-1] // 16)
        kept = Cosmos3OmniPipeline._remove_action_video_padding_from_latent(Sizes(), latents, size)
        planned = canvas_for((height, width), tier, 16)
        assert planned == tuple(canvas), (height, width)
        content = content_on(planned, (height, width), 16)
        assert (content[0] // 16, content[1] // 16) == tuple(kept.shape[-2:]), (height, width)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_photograph_is_planned_in_the_size_that_is_read(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (70, 40)).save(tmp_path / "photo.jpg", exif=exif)
    picture, _ = read_picture(tmp_path / "photo.jpg")
    assert photograph_size(str(tmp_path / "photo.jpg")) == (picture.height, picture.width)


@pytest.mark.parametrize("aspect", ["1/1", "4/3", "2/3"])
def test_a_clip_is_planned_in_the_size_that_is_read(aspect: str, tmp_path: Path) -> None:
    import av

    with av.open(str(tmp_path / "clip.mp4"), "w") as file:
        stream: Any = file.add_stream("libx264", rate=5, width=70, height=40)
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        file.mux(stream.encode(av.VideoFrame(70, 40, "rgb24")))
        file.mux(stream.encode(None))
    (picture,), _ = read_frames(tmp_path / "clip.mp4", frames=1)
    assert clip_size(str(tmp_path / "clip.mp4")) == (picture.height, picture.width)


@pytest.mark.parametrize("task", TASKS)
def test_the_plan_knows_the_clip_and_what_is_not_done(task: str, folder: Path) -> None:
    config = compose(asked(folder, task, "task.resolution_tier=256"))
    plan = make_plan(config)
    assert config.task.canvas == [192, 320]
    assert (plan.clip.height, plan.clip.width, plan.clip.num_frames) == (128, 208, CHUNK + 1)
    assert list(plan.vae) == (["encode"] if task == "inverse_dynamics" else ["encode", "decode"])
    assert ("decode" in plan.ranks[0].stages) == (task != "inverse_dynamics")
    encoded = plan.vae["encode"].shape
    assert (encoded.rows, encoded.cols) == (12, 20)
    assert encoded.frames == (3 if task == "inverse_dynamics" else 1)


def test_a_plan_has_every_chunk_of_the_actions(folder: Path) -> None:
    layout = ["topology=cpu_x2", "topology.cfg=1", "topology.ulysses=2", "vae=parallel"]
    one, three = (
        make_plan(compose([*made, *layout]))
        for made in (asked(folder, "forward_dynamics", "task.resolution_tier=256"), in_chunks(folder))
    )
    assert (three.chunks.count, three.chunks.total, three.clip.num_frames) == (3, 3 * CHUNK + 1, CHUNK + 1)
    for name, stage in three.ranks[0].stages.items():
        alone, times = one.ranks[0].stages[name], 1 if name == "text" else 3
        assert stage.flops == times * alone.flops
        passed = 2 * 3 * 128 * 208 if name == "decode" else 0  # the root's last frame, a byte a value
        assert stage.sent.bytes == times * alone.sent.bytes + passed


def test_strategies_are_verified_on_the_first_chunk_of_actions(folder: Path) -> None:
    asked_for = in_chunks(folder, f"task.prompt={WORDS}", "sampler.steps=1", "job=verify", "vae=parallel")
    prepared = prepare(composition_of([*asked_for, "topology=cpu_x1"]))
    vae, latents, *_ = inputs(prepared.config, prepared.plan, torch.device("cpu"), RankMesh(), Silent())
    assert vae.picture is not None and vae.picture.shape == (1, 3, 1, 192, 320)
    assert latents.shape == (1, 48, 3, 8, 13) and latents.std() > 0.3


def test_a_plan_without_a_picture_takes_the_models_own_size() -> None:
    config = compose(["model=nano", "task=policy", "task.chunk_size=32"])
    assert (config.task.height, config.task.width, config.task.num_frames) == (480, 832, 33)


def test_a_saved_config_is_the_same_again(folder: Path) -> None:
    config = compose(asked(folder, "inverse_dynamics"))
    assert prepare(Composition.of_saved(config)).config.task == config.task


@pytest.mark.sampled(1)
@pytest.mark.long
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("task", TASKS)
def test_one_rank_is_diffusers(
    task: str,
    guidance: float,
    checkpoint: CheckpointInfo,
    reference: Cosmos3OmniPipeline,
    folder: Path,
    tmp_path: Path,
) -> None:
    overrides = asked(folder, task, f"sampler.guidance_scale={guidance}")
    expected, found = theirs(overrides, reference), ours(overrides, checkpoint, tmp_path)
    assert expected.latents.std() > 0.3
    # Measured 0; the tolerance is for processors whose matrix kernels round by the number of rows.
    torch.testing.assert_close(found.latents, expected.latents, rtol=0, atol=1e-5)
    assert (found.actions is None) == (expected.actions is None) == (task == "forward_dynamics")
    if expected.actions is not None and found.actions is not None:
        torch.testing.assert_close(found.actions, expected.actions, rtol=0, atol=1e-5)
    assert (found.frames is None) == (task == "inverse_dynamics") == (not (tmp_path / "video.mp4").exists())
    if found.frames is not None:
        scales = (reference.vae.config[f"latents_{name}"] for name in ("mean", "std"))
        mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in scales)
        pixels = reference.vae.decode(found.latents / (1 / std) + mean).sample[0].permute(1, 2, 3, 0)
        assert torch.equal(found.frames, ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8))


@pytest.mark.thorough
@pytest.mark.long
@pytest.mark.parametrize(
    "others",
    [
        [],
        ["sampler.guidance_scale=3.0"],
        ["sampler/cache=seacache", "sampler.steps=4", "sampler.cache.threshold=2.0"],
    ],
    ids=["one pass", "guided", "cached"],
)
def test_chunks_are_diffusers_called_by_hand(
    others: list[str], checkpoint: CheckpointInfo, reference: Cosmos3OmniPipeline, folder: Path, tmp_path: Path
) -> None:
    overrides = in_chunks(folder, *others)
    if "sampler/cache=seacache" in others:
        reference.transformer.enable_cache(SeaCacheConfig(threshold=2.0))
    expected = theirs_by_hand(overrides, reference)
    reference.transformer.disable_cache()
    found = ours(overrides, checkpoint, tmp_path)
    scales = (reference.vae.config[f"latents_{name}"] for name in ("mean", "std"))
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in scales)
    latents = found.latents / (1 / std) + mean
    assert latents.shape == (3, 48, 3, 8, 13)
    # Measured 0; the tolerance is for processors whose matrix kernels round by the number of rows.
    torch.testing.assert_close(latents, expected.latents, rtol=0, atol=1e-5)
    assert found.frames is not None and expected.frames is not None
    assert found.frames.shape == (3 * CHUNK + 1, 128, 208, 3)
    if torch.equal(latents, expected.latents):
        assert torch.equal(found.frames, expected.frames)


# On a CPU without bfloat16 instructions diffusers' convolutions take 100 seconds here.
@pytest.mark.thorough
def test_half_precision_is_diffusers(checkpoint: CheckpointInfo, folder: Path, tmp_path: Path) -> None:
    overrides, half = asked(folder, "policy", "sampler.steps=1"), torch.bfloat16
    expected = theirs(overrides, reference_pipeline(checkpoint.folder, dtype=half))
    found = ours(overrides, checkpoint, tmp_path, dtype=half, vae_dtype=half)
    assert (found.latents[:, :, 0] - expected.latents[:, :, 0].float()).abs().max() == 0


def refusal(overrides: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        prepare(composition_of(overrides))
    for problem in caught.value.problems:
        assert problem.what and problem.why and problem.works
    return str(caught.value)


REFUSED = {
    "no weights": (["model=toy"], "action_gen is false", "model=toy_random"),
    "distilled": (["model=super_t2i_4step"], "distilled to 4 steps", "not distilled"),
    "unknown domain": (
        ["task.domain=bridge_lerobot"],
        "task.domain=bridge_lerobot",
        "did you mean bridge_orig_lerobot?",
    ),
    "domain without width": (["task.domain=libero"], "no fixed number of columns", "task.domain="),
    "no domain": (["task.domain=null"], "task.domain is not set", "task.domain="),
    "unknown view": (["task.view_point=egoview"], "task.view_point=egoview", "did you mean ego_view?"),
    "unknown tier": (["task.resolution_tier=512"], "task.resolution_tier=512", "480"),
    "odd chunk": (["task.chunk_size=10"], "task.chunk_size=10", "task.chunk_size=8"),
    "height by hand": (["task.height=480"], "task.height=480", "no task.height"),
    "canvas by hand": (["task.canvas=[480,832]"], "task.canvas=[480, 832]", "no task.canvas"),
    "frames by hand": (["task.num_frames=17"], "task.num_frames=17", "task.chunk_size"),
    "no picture": (["task.image=null"], "task.image is not set", "task.image=photo.jpg"),
    "missing picture": (["task.image=no.jpg"], "task.image=no.jpg", "a file that exists"),
    "actions of policy": (["task.actions=a.npy"], "task.actions=a.npy with task=policy", "task=forward_dynamics"),
}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_work(case: str, folder: Path) -> None:
    others, what, works = REFUSED[case]
    overrides = asked(folder, "policy", "task.resolution_tier=256", *others)
    if others[0].startswith("model="):
        overrides.remove("model=toy_random")
    text = refusal(overrides)
    assert what in text and works in text


@pytest.mark.long
def test_sources_that_do_not_fit_are_refused(folder: Path) -> None:
    clip, photo = f"task.video={folder / 'clip.mp4'}", f"task.image={folder / 'photo.png'}"
    assert "goes on from one of them" in refusal(asked(folder, "policy", clip))
    assert "shows no motion" in refusal(asked(folder, "inverse_dynamics", "task.video=null", photo))
    assert "task.video is not set" in refusal(asked(folder, "inverse_dynamics", "task.video=null"))
    told = refusal(asked(folder, "inverse_dynamics", "task.chunk_size=12"))
    assert "13 are needed" in told and "a longer clip, or task.chunk_size=8" in told
    assert "would be ignored" in refusal(["model=toy_random", "task.domain=av"])
    assert "would be ignored" in refusal(["model=toy_random", "task.chunk_size=16"])
    tiny = folder / "tiny.png"
    Image.new("RGB", (40, 15)).save(tiny)
    assert "40x15 pixels" in refusal(asked(folder, "policy", f"task.image={tiny}"))
    assert "decodes none" in refusal(asked(folder, "inverse_dynamics", "output.against_replicated=true"))
    assert "24 actions in 3 chunks" in refusal(in_chunks(folder, "output.against_replicated=true"))
    assert "task.num_frames=9" in refusal(in_chunks(folder, "task.num_frames=9"))


BAD_ACTIONS: dict[str, tuple[Any, str]] = {
    "width": (np.zeros((CHUNK, 9), np.float32), "task.domain=av or camera_pose"),
    "longer": (np.zeros((20, 10), np.float32), "has 20 actions with task.chunk_size=8"),
    "in other chunks": (np.zeros((20, 10), np.float32), "task.chunk_size=4"),
    "in no chunks": (np.zeros((21, 10), np.float32), "8 x 10 numbers, or of several such chunks"),
    "shorter": (np.zeros((4, 10), np.float32), "task.chunk_size=4"),
    "empty": (np.zeros((0, 10), np.float32), "has no actions"),
    "empty JSON": ("[]", "has no actions"),
    "rows of several widths": (json.dumps([[0.0] * 10, [0.0]] * 4), "has 1 and 10 columns"),
    "beyond any float": (json.dumps([[0] * 9 + [10**400]] * CHUNK), "in row 0"),
    "no NumPy file": (b"1, 2, 3", "written by numpy.save"),
    "cut off": (b"\x93NUMPY\x01\x00v\x00", "written by numpy.save"),
    "complex": (np.zeros((CHUNK, 10), np.complex64), "holds complex64"),
    "three axes": (np.zeros((1, CHUNK, 10), np.float32), "[1, 8, 10]"),
    "NaN": (np.where(np.arange(80).reshape(8, 10) == 13, np.nan, 0.0), "in row 1"),
    "NaN in JSON": (json.dumps([[0.0] * 10] * 7 + [[math.nan] * 10]), "in row 7"),
    "another rate": (json.dumps({"fps": 30, "actions": [[0.0] * 10] * CHUNK}), "task.fps=30"),
    "objects": (np.array([[{}]], dtype=object), "no array of NumPy"),
    "words": ("[[1, 2", "is no JSON"),
    "a number": ("3", "no rows of numbers"),
    "booleans": (json.dumps([[True] * 10] * CHUNK), "no rows of numbers"),
    "another domain": (json.dumps({"domain": "umi", "actions": []}), "task.domain=umi"),
}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("case", BAD_ACTIONS)
def test_actions_that_do_not_fit_are_refused(case: str, folder: Path, tmp_path: Path) -> None:
    content, said = BAD_ACTIONS[case]
    file = tmp_path / ("actions.json" if isinstance(content, str) else "actions.npy")
    if isinstance(content, str):
        file.write_text(content)
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.save(file, content, allow_pickle=True)
    assert said in refusal(asked(folder, "forward_dynamics", f"task.actions={file}"))
    assert "task.actions=no.npy is not a file" in refusal(asked(folder, "forward_dynamics", "task.actions=no.npy"))


def test_what_a_policy_leaves_goes_into_forward_dynamics(folder: Path, tmp_path: Path) -> None:
    action = action_of(compose(asked(folder, "policy")).task)
    assert action is not None
    rows = ACTIONS.astype(float).tolist()
    (tmp_path / "actions.json").write_text(actions_report(action, 5.0, rows))
    assert read_actions(str(tmp_path / "actions.json"), action, 5.0) == rows
    report = json.loads((tmp_path / "actions.json").read_text())
    assert report["columns"][-1] == "gripper" and len(report["columns"]) == action.width
    assert report["units"].startswith("normalised")


def test_a_picture_that_changes_after_the_plan_is_refused(
    checkpoint: CheckpointInfo, folder: Path, tmp_path: Path
) -> None:
    from toy_runs import components, context_of

    from cosmos3_pipeline.stages.actions import ActionDenoiseStage, ActionEncodeStage

    config = compose(asked(folder, "policy"))
    other = tmp_path / "photo.png"
    Image.new("RGB", (64, 96)).save(other)
    action = action_of(config.task)
    assert action is not None
    config.task.image = str(other)
    context = context_of(components(checkpoint), make_plan(config).clip, tmp_path)
    with pytest.raises(Refusal, match="another picture than when the run was planned"):
        ActionEncodeStage(config.task, action)(context)
    config.task.name, config.task.actions = TaskName.forward_dynamics, str(folder / "long.npy")
    given = replace(action, mode=TaskName.forward_dynamics)
    with pytest.raises(Refusal, match="it has 24 actions now, and 8 were planned"):
        ActionDenoiseStage(config.task, config.sampler, given).blocks(context)
