"""The scripts that train the toy: their data, what they measure, and that an interrupted training goes on."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cosmos3_pipeline.config.compose import compose

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "train_toy"))

import export
import flow
import look
import scenes
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


@pytest.mark.parametrize("clean", [0, 1])
def test_a_batch_of_clips_has_the_velocity_that_diffusers_gives_each(clean: int) -> None:
    model, tokens, shape = flow.make_transformer(), torch.arange(40) % 30, (3, 2, 5)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        pipeline = export.make_pipeline(vae.make_vae(), model)
        positions = flow.positions_of(pipeline, len(tokens), (9, 32, 80))
        z, sigma, count = torch.randn(2, 48, *shape), torch.tensor([0.3, 0.9]), 30
        found = flow.velocity(model, tokens.expand(2, -1), positions, z, sigma, clean)
        for each, level, own in zip(z, sigma, found, strict=True):
            noisy = torch.arange(len(tokens) + clean * 10, len(tokens) + count)
            expected = model(
                input_ids=tokens,
                text_indexes=torch.arange(len(tokens)),
                position_ids=positions,
                und_len=len(tokens),
                sequence_length=len(tokens) + count,
                vision_tokens=[each[None]],
                vision_token_shapes=[shape],
                vision_sequence_indexes=torch.arange(len(tokens), len(tokens) + count),
                vision_mse_loss_indexes=noisy,
                vision_timesteps=torch.full((len(noisy),), 1000 * level.item()),
                vision_noisy_frame_indexes=[torch.arange(clean, 3)],
                return_dict=False,
            )[0][0]
            torch.testing.assert_close(own[None], expected, atol=1e-4, rtol=1e-4)


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
