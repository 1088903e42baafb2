"""`weights=...` as a user says it: the same picture, told in plan and metrics, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import make_layout
from conftest import SMALL, launch
from PIL import Image
from safetensors.torch import load_file, save_file

from cosmos3_pipeline.stages.media import write_video

pytestmark = pytest.mark.long


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.effect_noise((96, 80), 90).convert("RGB").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def clip_file(tmp_path: Path) -> Path:
    frames = np.random.default_rng(0).integers(0, 256, (5, 80, 96, 3), dtype=np.uint8)
    with write_video(tmp_path / "clip.mp4", height=80, width=96, fps=24, crf=10, preset="ultrafast") as video:
        video.write(frames)
    return tmp_path / "clip.mp4"


def latents(folder: Path) -> torch.Tensor:
    return load_file(folder / "latents.safetensors")["latents"]


@pytest.mark.thorough
def test_a_streamed_run_is_the_resident_one(generate: Callable[..., Path]) -> None:
    resident, streamed = (generate("output.latents=true", *args) for args in ((), ("weights=streamed",)))
    assert torch.equal(latents(resident), latents(streamed))
    metrics = json.loads((streamed / "metrics.json").read_text())
    plan = json.loads((streamed / "plan.json").read_text())
    assert metrics["weights"] == plan["weights"]
    assert metrics["weights"]["placement"] == "streamed"
    # Between its layers a rank keeps only what is outside of them.
    kept = {
        run: json.loads((run / "metrics.json").read_text())["loading"]["transformer"]
        for run in (resident, streamed)
    }
    assert kept[streamed]["ranks"][0]["kept_bytes"] < kept[resident]["ranks"][0]["kept_bytes"] / 5
    assert all(run["ranks"][0]["kept_bytes"] == 0 for run in [metrics["loading"]["text"]])


@pytest.mark.sampled(1)
@pytest.mark.parametrize("task", ["t2i", "i2v", "v2v", "no guidance"])
def test_every_task_streams(task: str, generate: Callable[..., Path], photo: Path, clip_file: Path) -> None:
    asked = {
        "t2i": ("task=t2i", "task.num_frames=1"),
        "i2v": ("task=i2v", f"task.image={photo}"),
        "v2v": ("task=v2v", f"task.video={clip_file}"),
        "no guidance": ("sampler.guidance_scale=1.0",),
    }[task]
    placed = ("weights=resident", "weights=streamed", "weights=streamed weights.resident_layers=1")
    first, *others = (latents(generate("output.latents=true", *asked, *one.split())) for one in placed)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.thorough
def test_weights_that_are_no_numbers_end_the_run_with_their_name(tmp_path: Path) -> None:
    """On every rank and at once, whatever line of a prompt file it is at, and told once."""
    folder = make_layout(tmp_path / "nano", "nano")
    broken = "layers.2.post_attention_layernorm_moe_gen.weight"
    for file in (folder / "transformer").glob("*.safetensors"):
        tensors = load_file(file)
        if broken in tensors:
            tensors[broken][-1] = float("nan")
            save_file(tensors, file, metadata={"format": "pt"})
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red kite\na blue boat\n", encoding="utf-8")
    given = ("model=nano", f"model.path={folder}", *SMALL[1:], f"task.prompt_file={prompts}")
    for placed in (("weights=sharded", "topology=cpu_x2"), ("weights=streamed",), ("weights=resident",)):
        run = tmp_path / placed[0].partition("=")[2]
        done = launch(*given, *placed, f"hydra.run.dir={run}")
        assert done.returncode == 1
        assert f"{broken} in " in (run / "log.txt").read_text()
        assert done.stderr.count(f"{broken} in ") == 1, done.stderr
        assert "Traceback" not in done.stderr


THOROUGH = pytest.mark.thorough


@pytest.mark.thorough
@pytest.mark.parametrize(
    "weights", ["sharded", *(pytest.param(one, marks=THOROUGH) for one in ("resident", "streamed"))]
)
def test_prompts_of_a_file_are_encoded_in_one_pass(weights: str, tmp_path: Path) -> None:
    """The latents of each line are those of its own run."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red kite\na blue boat on a lake, far away\na red kite\n", encoding="utf-8")
    out = tmp_path / "all"
    given = (*SMALL, "topology=cpu_x2", f"weights={weights}", "output.latents=true")
    done = launch(*given, f"task.prompt_file={prompts}", f"hydra.run.dir={out}")
    made = sorted(out.glob("line_*"))
    assert len(made) == 3, done.stderr + done.stdout
    assert torch.equal(latents(made[0]), latents(made[2]))
    for folder, prompt in zip(made[:2], ("a red kite", "a blue boat on a lake, far away"), strict=True):
        alone = tmp_path / folder.name
        single = launch(*given, f"task.prompt='{prompt}'", f"hydra.run.dir={alone}")
        assert single.returncode == 0, single.stderr
        assert torch.equal(latents(folder), latents(alone)), prompt
    # The text weights were read before the first clip, and not again.
    texts = [json.loads((folder / "metrics.json").read_text())["loading"]["text"] for folder in made]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["weights=sharded"], "no other rank"),
        (["weights.resident_layers=2"], "weights=streamed"),
        (["weights=streamed", "weights.resident_layers=99"], "layers"),
        (["weights=stramed"], "streamed"),
    ],
)
def test_what_makes_no_sense_is_refused(overrides: list[str], words: str) -> None:
    done = launch(*SMALL, *overrides)
    assert done.returncode != 0
    assert words in done.stderr and "Traceback" not in done.stderr
