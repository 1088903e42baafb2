"""The scripts that train the toy: their data, what they measure, and that an interrupted training goes on."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cosmos3_pipeline.checkpoint.sound import HOP
from cosmos3_pipeline.config.compose import compose

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "train_toy"))

import export
import flow
import judge
import look
import scenes
import sound
import train
import vae
from optim import Optimisers, orthogonal


@pytest.mark.long
@pytest.mark.parametrize("size", [flow.SMALL, flow.LARGE, flow.IMAGE], ids=str)
def test_a_scene_shows_what_its_caption_says(size: flow.Size) -> None:
    for seed in range(25):
        scene = scenes.draw_scene(seed)
        clip = (scenes.render(scene, *size) + 1) / 2
        assert clip.shape == (3, *size) and clip.min() >= 0 and clip.max() <= 1
        assert all(look.answers(clip, scene).values()), scene.caption


def test_another_scene_is_told_from_it() -> None:
    right, asked = dict.fromkeys(look.QUESTIONS, 0), 40
    for seed in range(asked):
        scene, other = scenes.draw_scene(seed), scenes.draw_scene(1000 + seed)
        if len(scene.things) != len(other.things):
            continue
        for question, yes in look.answers((scenes.render(other, *flow.SMALL) + 1) / 2, scene).items():
            right[question] += yes
    assert right["background"] < 0.3 * asked and right["direction"] < 0.5 * asked and right["shape"] < 0.6 * asked


def test_the_words_are_those_of_the_captions() -> None:
    known = compose(["model=toy"]).typed().model.trained.words
    assert known is not None
    assert {word for caption in export.captions() for word in re.findall(r"\w+", caption.lower())} == set(known)
    tokenizer = export.toy_tokenizer()
    for word in ("red", "triangle", "left", "background"):
        assert len(tokenizer(f" {word}")["input_ids"]) == 1  # so that the transformer need not learn to spell


def test_the_sound_tokenizer_is_an_oscillator() -> None:
    """Tone n has 24 + n cycles in 40 ms without a click at the next latent frame, even if a latent is off."""
    tones = torch.tensor([[-12.0, -12.0, 0.0, 5.0, 5.0, 12.0], [3.0] * 6])
    latents = torch.cat([sound.SIGNS[:, None] * ear / sound.STEPS_PER_UNIT for ear in tones + 0.1])
    with torch.no_grad():
        waveform = sound.make_sound_tokenizer().decode(latents)
    time = torch.arange(HOP) / HOP
    expected = torch.sin(2 * torch.pi * (24 + tones)[..., None] * time).flatten(1) * sound.LOUDNESS
    assert (waveform - expected).abs().max() < 0.02 * sound.LOUDNESS


def test_the_pitch_follows_the_height() -> None:
    """The latents of a scene decode to the pitch of its shapes: the first on the left, the last on the right."""
    tokenizer = sound.make_sound_tokenizer()
    for seed in range(8):
        scene = scenes.draw_scene(seed)
        with torch.no_grad():
            waveform = tokenizer.decode(sound.sound_latents(scene, 17, 24.0))
        clip = (scenes.render(scene, *flow.SMALL) + 1) / 2
        off = judge.pitch_errors(clip, scene, judge.tones_of(waveform.numpy()))
        assert off.abs().max() < 1.2, (scene.caption, off)


@pytest.mark.parametrize(
    ("clean", "control", "tones"),
    [((), False, 0), ((0,), False, 4), ((0, 2), False, 0), ((0,), True, 0)],
    ids=["words", "photograph and sound", "both ends", "control"],
)
def test_a_batch_of_clips_has_the_velocity_that_diffusers_gives_each(
    clean: tuple[int, ...], control: bool, tones: int
) -> None:
    model, tokens, shape = flow.make_transformer(sound=True), torch.arange(40) % 30, (3, 2, 5)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        model.audio_modality_embed.normal_()
        pipeline = export.make_pipeline(vae.make_vae(), model)
        positions = flow.positions_of(pipeline, len(tokens), (9, 32, 80), control=control, sound=tones)
        z, sigma, n, count = torch.randn(2, 48, *shape), torch.tensor([0.3, 0.9]), len(tokens), 30
        heard, edges = (torch.randn(2, 4, tones) if tones else None), (torch.randn_like(z) if control else None)
        found, hums = flow.velocity(
            model, tokens.expand(2, -1), positions, z, sigma, clean, control=edges, sound=heard
        )
        begin = n + count * control
        frames = [frame for frame in range(3) if frame not in clean]
        noisy = torch.cat([torch.arange(10) + begin + 10 * frame for frame in frames])
        end = begin + count
        for number, level in enumerate(sigma):
            items = [*([] if edges is None else [edges[number][None]]), z[number][None]]
            more: dict[str, Any] = {}
            if heard is not None:
                more = {
                    "sound_tokens": [heard[number]],
                    "sound_token_shapes": [(tones, 1, 1)],
                    "sound_sequence_indexes": torch.arange(end, end + tones),
                    "sound_mse_loss_indexes": torch.arange(end, end + tones),
                    "sound_timesteps": torch.full((tones,), 1000 * level.item()),
                    "sound_noisy_frame_indexes": [torch.arange(tones)],
                }
            expected, expected_hums, _ = model(
                input_ids=tokens,
                text_indexes=torch.arange(n),
                position_ids=positions,
                und_len=n,
                sequence_length=end + tones,
                vision_tokens=items,
                vision_token_shapes=[shape] * len(items),
                vision_sequence_indexes=torch.arange(n, end),
                vision_mse_loss_indexes=noisy,
                vision_timesteps=torch.full((len(noisy),), 1000 * level.item()),
                vision_noisy_frame_indexes=[*[torch.arange(0)] * control, torch.tensor(frames)],
                return_dict=False,
                **more,
            )
            torch.testing.assert_close(found[number][None], expected[-1], atol=1e-4, rtol=1e-4)
            if hums is not None:
                torch.testing.assert_close(hums[number], expected_hums[0], atol=1e-4, rtol=1e-4)


def test_a_training_that_was_interrupted_ends_as_one_that_was_not(tmp_path: Path) -> None:
    def run(out: Path, stop: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(9, 8)
        out.mkdir(exist_ok=True)
        train.train(
            "line",
            model,
            lambda step: (model(torch.randn(4, 9)) - 1).square().mean(),
            lambda: {"norm": model.weight.norm().item()},
            optimisers=Optimisers(model, rate=1e-2, small_rate=1e-2, steps=12),
            steps=stop,
            out=out,
            measure_steps=3,
        )
        found: dict[str, torch.Tensor] = torch.load(out / "line.pt")
        return found

    run(tmp_path / "b", 6)
    at_once, broken_off = run(tmp_path / "a", 12), run(tmp_path / "b", 12)
    assert all(torch.equal(at_once[name], broken_off[name]) for name in at_once)
    curves = [(tmp_path / name / "line.csv").read_text().splitlines() for name in "ab"]
    assert [line.split(",")[0] for line in curves[1]] == ["step", "3", "6", "9", "12"]
    assert [line.split(",")[2:] for line in curves[0]] == [line.split(",")[2:] for line in curves[1]]


def test_an_update_of_muon_turns_and_does_not_stretch() -> None:
    torch.manual_seed(0)
    for shape in ((8, 30), (30, 8)):
        stretched = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert stretched.min() > 0.6 and stretched.max() < 1.4
