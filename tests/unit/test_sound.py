"""Video with sound: diffusers' waveform, its file, its plan, and where it is refused."""

from __future__ import annotations

import hashlib
import json
import wave
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from checkpoints import edit, make_layout
from diffusers import Cosmos3AVAEAudioTokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from toy_runs import PROMPT, clip_of, components, context_of, reference_pipeline, task_config, toy_dimensions

from cosmos3_pipeline import compose
from cosmos3_pipeline.checkpoint.inspect import CheckpointInfo, inspect_checkpoint
from cosmos3_pipeline.checkpoint.sound import HOP, MULTIPLES, SAMPLE_RATE, STRIDES, sound_weights
from cosmos3_pipeline.config.schema import Encoder, OutputConfig, SamplerConfig
from cosmos3_pipeline.errors import ConfigError
from cosmos3_pipeline.jobs.rehearse.rank import rehearse_ranks
from cosmos3_pipeline.models.loading import open_checkpoint
from cosmos3_pipeline.models.sound import load_sound_tokenizer, new_sound_tokenizer
from cosmos3_pipeline.planning.geometry import sound_frames
from cosmos3_pipeline.planning.plan import as_dict, make_plan
from cosmos3_pipeline.planning.sound import SoundCost
from cosmos3_pipeline.stages.decode import DecodeStage
from cosmos3_pipeline.stages.denoise import LEFT_OVER, DenoiseStage
from cosmos3_pipeline.stages.encode import EncodeStage
from cosmos3_pipeline.stages.export import ExportStage
from cosmos3_pipeline.stages.media import cut_to, frame_rate, sound_of, write_video, write_wav
from cosmos3_pipeline.stages.sound import SoundStage
from cosmos3_pipeline.stages.text import TextStage

SOUND = frozenset({"vision", "sound"})
CPU = torch.device("cpu")
STEREO = 2
FAST: Any = {"crf": 17, "preset": "ultrafast", "encoder": Encoder.libx264}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointInfo:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COSMOS3_CACHE", str(tmp_path_factory.mktemp("cache")))
        return open_checkpoint(None, sound=True, **toy_dimensions())


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_layout(tmp_path_factory.mktemp("layouts") / "nano", "nano")


def run(checkpoint: CheckpointInfo, directory: Path, frames: int, **settings: Any) -> Any:
    """A context after all stages, of a clip of 48 x 80 pixels with sound."""
    task = task_config(prompt=PROMPT, negative_prompt="dull", sound=True, **settings.pop("task", {}))
    sampler = SamplerConfig(steps=3, guidance_scale=5.0, flow_shift=10.0, seed=3)
    output = OutputConfig(
        latents=True, sound=True, against_replicated=False, crf=17, preset="ultrafast", encoder=Encoder.libx264
    )
    context = context_of(components(checkpoint, modalities=SOUND, **settings), clip_of(48, 80, frames), directory)
    for stage in (
        TextStage(task, sampler),
        EncodeStage(task),
        DenoiseStage(sampler, modalities=SOUND),
        SoundStage(task),
        DecodeStage(),
        ExportStage(output, modality="video"),
    ):
        stage(context)
    return context


@pytest.mark.long
@pytest.mark.parametrize(
    ("dtype", "frames", "condition"),
    [(torch.float32, 9, None), (torch.float32, 5, "image"), (torch.bfloat16, 5, None)],
    ids=["t2v", "i2v", "bfloat16"],
)
def test_the_waveform_is_that_of_diffusers(
    dtype: torch.dtype, frames: int, condition: str | None, checkpoint: CheckpointInfo, tmp_path: Path
) -> None:
    photo = tmp_path / "photo.png"
    Image.effect_noise((80, 48), 90).convert("RGB").save(photo)
    expected = reference_pipeline(checkpoint.folder, dtype=dtype)(
        prompt=PROMPT,
        negative_prompt="dull",
        height=48,
        width=80,
        num_frames=frames,
        num_inference_steps=3,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(3),
        enable_sound=True,
        output_type="latent",
        image=Image.open(photo) if condition else None,
    )
    task = {"image": str(photo), "condition_latent_frames": [0]} if condition else {}
    context = run(checkpoint, tmp_path, frames, dtype=dtype, vae_dtype=dtype, task=task)
    assert context.waveform.shape == expected.sound.shape and expected.sound.std() > 0.02
    assert expected.sound.abs().max() < 1  # nothing was cut
    # In fp32 measured 0; the tolerance is for processors whose matrix kernels round by the number of rows.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(context.waveform, expected.sound, rtol=0, atol=tolerance)
    torch.testing.assert_close(context.state.get("latents"), expected.video, rtol=0, atol=tolerance)


def test_files_and_numbers_of_a_run(checkpoint: CheckpointInfo, tmp_path: Path) -> None:
    context = run(checkpoint, tmp_path, 9)
    said, samples = context.picture.sound, 9 * SAMPLE_RATE // 24
    assert (said.samples, said.channels, said.seconds) == (samples, STEREO, 9 / 24)
    whole = context.waveform.numpy()
    assert whole.shape == (STEREO, 10 * HOP) and said.peak == np.abs(whole[:, :samples]).max()
    assert said.sha256 == hashlib.sha256(np.ascontiguousarray(whole[:, :samples]).tobytes()).hexdigest()
    with wave.open(str(tmp_path / "sound.wav")) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (STEREO, SAMPLE_RATE, samples)
        pcm = np.frombuffer(file.readframes(samples), "<i2").reshape(-1, STEREO).T / 32767
    assert np.abs(pcm - whole[:, :samples]).max() <= 0.51 / 32767
    latents = load_file(tmp_path / "latents.safetensors")
    assert latents["sound_latents"].shape == (64, 10) and latents["latents"].shape == (1, 48, 3, 3, 5)
    assert context.components.pipeline.sound_tokenizer is None
    assert all(context.state.get(name) is None for name in (*LEFT_OVER, "sound"))


def bursts(samples: int, at: list[float]) -> np.ndarray:
    """[2, samples]: silence, with a tone of 20 ms at each of the seconds `at`, in one channel after the other."""
    time = np.arange(samples) / SAMPLE_RATE
    waveform = np.zeros((STEREO, samples), dtype=np.float32)
    for number, second in enumerate(at):
        inside = (time >= second) & (time < second + 0.02)
        waveform[number % STEREO, inside] = 0.8 * np.sin(2 * np.pi * 1000 * time[inside])
    return waveform


@pytest.mark.parametrize(("fps", "frames"), [(24.0, 49), (29.97, 45), (10.0, 17)])
def test_sound_in_a_video_is_in_step_and_as_long(fps: float, frames: int, tmp_path: Path) -> None:
    """Silence with three tones, in one channel after the other: what is decoded has each where it should be."""
    length = frames / frame_rate(fps)
    tones = [0.0, 0.31, float(length) - 0.05]
    waveform = cut_to(bursts(int(float(length) * SAMPLE_RATE) + 1500, tones), length)
    pictures = np.full((frames, 32, 48, 3), 90, dtype=np.uint8)
    path = tmp_path / "video.mp4"
    size = {"height": 32, "width": 48}
    with write_video(path, fps=fps, crf=20, preset="ultrafast", waveform=waveform, **size) as writer:
        for start in range(0, frames, 4):
            writer.write(pictures[start : start + 4])
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (audio.codec_context.name, audio.rate, audio.layout.name) == ("aac", SAMPLE_RATE, "stereo")
        assert video.frames == frames and video.start_time == audio.start_time == 0
        seconds = [float(stream.duration * stream.time_base) for stream in (video, audio)]
        assert abs(seconds[0] - float(length)) < 1e-3 and abs(seconds[1] - float(length)) < 1e-3
        packets = [packet.stream.type for packet in container.demux() if packet.size]
    assert "audio" in packets[: len(packets) // 2] and "video" in packets[len(packets) // 2 :]  # side by side
    with av.open(str(path)) as container:
        parts = [frame.to_ndarray() for frame in container.decode(audio=0)]
    heard = np.concatenate(parts, axis=1)
    assert 0 <= heard.shape[1] - waveform.shape[1] < 1024  # a whole frame of AAC
    for number, second in enumerate(tones):
        channel, start = number % STEREO, round(second * SAMPLE_RATE)
        inside = np.square(heard[:, start : start + 960]).mean(1)
        assert 0.2 < inside[channel] < 0.4 and inside[1 - channel] < 0.01
    quiet = heard[:, round(0.1 * SAMPLE_RATE) : round(0.25 * SAMPLE_RATE)]
    assert np.abs(quiet).max() < 0.02


def test_the_same_sound_gives_the_same_bytes_and_none_gives_no_track(tmp_path: Path) -> None:
    waveform, pictures = bursts(12000, [0.1]), np.zeros((6, 32, 48, 3), dtype=np.uint8)
    digests = set()
    for name, sound, chunk in (("a", waveform, 1), ("b", waveform, 6), ("c", None, 6)):
        path = tmp_path / f"{name}.mp4"
        with write_video(path, height=32, width=48, fps=24, crf=20, preset="fast", waveform=sound) as writer:
            for start in range(0, 6, chunk):
                writer.write(pictures[start : start + chunk])
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 2
    with av.open(str(tmp_path / "c.mp4")) as container:
        assert not container.streams.audio


def test_a_sound_is_cut_to_whole_samples_and_described(tmp_path: Path) -> None:
    waveform = np.linspace(-1, 1, 2 * 4000, dtype=np.float32).reshape(2, -1)
    cut = cut_to(waveform, Fraction(1001 * 2, 30000))
    assert cut.shape == (2, 3203) and np.array_equal(cut, waveform[:, :3203])
    assert sound_of(cut).peak == 1.0
    write_wav(tmp_path / "sound.wav", cut)
    with wave.open(str(tmp_path / "sound.wav")) as file:
        assert file.readframes(1) == np.array([-32767, round(float(cut[1, 0]) * 32767)], "<i2").tobytes()


def test_the_table_of_tensors_is_that_of_the_class() -> None:
    with torch.device("meta"):
        model = new_sound_tokenizer({"dec_dim": 24, "vocoder_input_dim": 6, "enc_dim": 8})
        published = new_sound_tokenizer({})
    own = {name: tuple(t.shape) for name, t in model.state_dict().items() if not name.startswith("encoder.")}
    assert {weight.name: weight.shape for weight in sound_weights({"dec_dim": 24}, 6)} == own
    elements = sum(weight.elements for weight in sound_weights({"dec_dim": 320}, 64))
    assert elements == sum(t.numel() for n, t in published.state_dict().items() if n.startswith("decoder."))
    assert published._hop_size == HOP and published.config.sampling_rate == SAMPLE_RATE
    assert (published.config.dec_c_mults, published.config.dec_strides) == (MULTIPLES, STRIDES)


def test_the_weight_norm_is_applied_once_with_the_same_bits(checkpoint: CheckpointInfo) -> None:
    latents = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
    theirs = Cosmos3AVAEAudioTokenizer.from_pretrained(checkpoint.folder, subfolder="sound_tokenizer")
    ours = load_sound_tokenizer(checkpoint, dtype=torch.float32, device=CPU)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        waveform = ours.decode(latents)
        counted = counter.get_total_flops()
        assert torch.equal(waveform, theirs.decode(latents))
    cost = SoundCost.of(8, 64, 5)
    assert cost.flops == counted
    assert cost.weights == sum(parameter.numel() for parameter in ours.parameters())


@pytest.mark.parametrize(
    ("frames", "fps", "tokens"), [(189, 24, 197), (121, 30, 101), (17, 29.97, 15), (5, 120, 2), (93, 16, 146)]
)
def test_sound_tokens_are_those_of_diffusers(frames: int, fps: float, tokens: int) -> None:
    config = compose(["model=nano", f"task.num_frames={frames}", f"task.fps={fps}", "task.sound=true"])
    assert sound_frames(config) == tokens


def test_a_plan_says_what_sound_costs() -> None:
    nano = ["model=nano", "topology=h200_x4"]
    silent, loud = (make_plan(compose([*nano, *more])) for more in ([], ["task.sound=true"]))
    plan = as_dict(loud)
    assert plan["clip"]["sound_tokens"] == plan["summary"]["sound_tokens"] == 197
    assert "197 sound tokens" in str(loud) and "sound" not in str(silent)
    assert list(plan["stages"]) == ["text", "denoise", "sound", "decode"]
    assert loud.peak_bytes == pytest.approx(silent.peak_bytes, rel=0.02)
    root, other = loud.ranks[0].stages["sound"], loud.ranks[1].stages["sound"]
    assert other.weight_bytes == other.flops == 0 and root.flops > 4e12
    assert 0.9e9 < root.weight_bytes < 1.0e9  # half of the published file, which is float32
    assert root.peak_bytes < loud.ranks[0].stages["denoise"].peak_bytes
    tokens = sum(rank.stages["denoise"].share["tokens"] for rank in loud.ranks)
    assert tokens == 2 * (44_160 + 197)


@pytest.mark.parametrize(("threads", "said"), [(1, "bitwise"), (2, "rounding")])
def test_a_plan_says_that_threads_round_a_waveform(threads: int, said: str) -> None:
    asked = ["model=toy_random", "task.sound=true", "topology=cpu_x1", f"topology.threads_per_rank={threads}"]
    plan = make_plan(compose(asked))
    assert (plan.exactness["denoise"], plan.exactness["sound"]) == ("bitwise", said)


@pytest.mark.long
@pytest.mark.sampled(1)
@pytest.mark.parametrize("more", [(), ("task.prompt_file=",)], ids=["one", "clips"])
def test_a_rehearsal_finds_what_is_planned(more: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red kite\na blue kite\n")
    overrides = [f"{key}{tmp_path / 'prompts.txt'}" for key in more]
    config = compose(
        [*overrides, "model=toy_random", "topology=cpu_x2", "task.sound=true", "sampler.steps=3", "weights=auto"]
    )
    found = rehearse_ranks(config, None)
    assert found.findings == ()
    assert found.ranks[0].stages["sound"].flops > 0 and "sound" not in found.ranks[1].stages


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model=edge"], ("model=edge", "no head for sound", "task.sound=false")),
        (["model=nano", "task=t2i"], ("task=t2i", "one frame", "task=t2v")),
        (["model=super_t2i_4step", "task=t2v"], ("4 steps", "picture alone", "not distilled")),
        (["task.sound=false", "output.sound=true"], ("output.sound=true", "ignored", "output.sound=false")),
        (["model=toy_random", "model.transformer.sound_dim=null"], ("sound_dim=null", "channels", "sound_dim=64")),
    ],
    ids=["edge", "image", "distilled", "no sound", "no width"],
)
def test_where_sound_is_refused(overrides: list[str], said: tuple[str, str, str]) -> None:
    with pytest.raises(ConfigError) as refused:
        compose(["task.sound=true", *overrides])
    (problem,) = (one for one in refused.value.problems if said[0] in one.what)
    assert said[1] in problem.why and said[2] in problem.works


def without(folder: Path, name: str) -> None:
    """Leave the tensor `name` out of the sound tokenizer of `folder`."""
    file = folder / "sound_tokenizer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file)


BROKEN: dict[str, tuple[Any, str]] = {
    "no folder": (lambda f: (f / "sound_tokenizer/config.json").unlink(), "no sound_tokenizer/config.json"),
    "no weights": (
        lambda f: (f / "sound_tokenizer/diffusion_pytorch_model.safetensors").unlink(),
        "sound_tokenizer has no weights",
    ),
    "a tensor less": (lambda f: without(f, "decoder.conv2.weight_g"), "has no decoder.conv2.weight_g"),
    "another width": (lambda f: edit(f / "sound_tokenizer/config.json", dec_dim=16), "has the shape"),
    "another rate": (
        lambda f: edit(f / "sound_tokenizer/config.json", sampling_rate=44100),
        "sampling_rate: 44100",
    ),
    "other strides": (lambda f: edit(f / "sound_tokenizer/config.json", dec_strides=[2, 4]), "dec_strides"),
    "other latents": (lambda f: edit(f / "sound_tokenizer/config.json", vocoder_input_dim=8), "has sound_dim: 64"),
    "another class": (lambda f: edit(f / "sound_tokenizer/config.json", _class_name="Oobleck"), "class 'Oobleck'"),
    "not in the index": (lambda f: edit(f / "model_index.json", sound_tokenizer=None), "sound_tokenizer: None"),
    "no head": (lambda f: edit(f / "transformer/config.json", sound_gen=False), "sound"),
}


@pytest.mark.sampled(2)
@pytest.mark.long
@pytest.mark.parametrize("kind", BROKEN)
def test_a_checkpoint_that_cannot_make_sound_is_refused_before_work(kind: str, tmp_path: Path) -> None:
    folder = make_layout(tmp_path / "nano", "nano")
    spoil, said = BROKEN[kind]
    spoil(folder)
    with pytest.raises(ConfigError) as refused:
        compose(["model=nano", f"model.path={folder}", "task.sound=true"])
    (problem,) = refused.value.problems
    assert said in problem.what + problem.why and problem.works
    if kind != "no head":  # then its tensors are strangers in any task
        compose(["model=nano", f"model.path={folder}"])


@pytest.mark.long
def test_the_encoder_of_the_sound_tokenizer_may_be_absent(nano: Path, tmp_path: Path) -> None:
    whole = inspect_checkpoint(nano, sound=True)
    folder = make_layout(tmp_path / "nano", "nano")
    file = folder / "sound_tokenizer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    assert any(name.startswith("encoder.") for name in tensors)
    save_file({name: tensor for name, tensor in tensors.items() if name.startswith("decoder.")}, file)
    alone = inspect_checkpoint(folder, sound=True)
    for info in (whole, alone):
        assert "model_index.json: sound_tokenizer" not in info.not_read and not info.strangers
    latents = torch.randn(64, 3)
    decoders = [load_sound_tokenizer(info, dtype=torch.float32, device=CPU) for info in (whole, alone)]
    assert torch.equal(*(decoder.decode(latents) for decoder in decoders))


def test_the_checkpoints_own_width_is_planned(nano: Path) -> None:
    config = compose(["model=nano", f"model.path={nano}", "task.sound=true"])
    assert config.model.sound_tokenizer.dec_dim == toy_dimensions()["sound_tokenizer"]["dec_dim"] == 8
    silent = replace(config, task=replace(config.task, sound=False))
    assert "sound" not in make_plan(silent).ranks[0].stages
    assert json.loads((nano / "sound_tokenizer" / "config.json").read_text())["vocoder_input_dim"] == 64
