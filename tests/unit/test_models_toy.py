"""The toy model: the same bytes every time, loadable by diffusers, and a lively picture."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Cosmos3OmniPipeline, Cosmos3OmniTransformer
from limits import HANGS
from toy_runs import PROMPT, clip_of, components, context_of, task_config, toy_dimensions

from cosmos3_pipeline.checkpoint.inspect import inspect_checkpoint
from cosmos3_pipeline.config.schema import SamplerConfig
from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.models import toy
from cosmos3_pipeline.models.toy_tokenizer import SMALLEST_VOCABULARY, make_tokenizer
from cosmos3_pipeline.stages.decode import DecodeStage
from cosmos3_pipeline.stages.denoise import DenoiseStage
from cosmos3_pipeline.stages.text import TextStage


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COSMOS3_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("toy")
    toy.write_toy(path, **toy_dimensions())
    return path


def digest(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_every_time_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    toy.write_toy(tmp_path, **toy_dimensions())
    assert digest(tmp_path) == digest(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_has_the_layout_of_a_checkpoint(folder: Path) -> None:
    info = inspect_checkpoint(folder)
    files = {placed.stored.file for placed in info.tensors["transformer"]}
    assert len(files) > 1  # shards and an index, as the real one
    assert sum(placed.stored.nbytes for tensors in info.tensors.values() for placed in tensors) < 40e6
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    wanted = {
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
        "flow_shift": 10.0,
        "use_karras_sigmas": False,
    }
    assert {key: scheduler[key] for key in wanted} == wanted


def test_diffusers_loads_it_as_a_pipeline(folder: Path) -> None:
    pipeline = Cosmos3OmniPipeline.from_pretrained(folder)
    assert isinstance(pipeline.transformer, Cosmos3OmniTransformer)
    assert pipeline.safety_checker is None
    assert pipeline.vae.config.z_dim == 48
    vocabulary = pipeline.transformer.config.vocab_size
    words = "Ein Kätzchen läuft 跑.\n"
    ids = pipeline.text_tokenizer(words).input_ids
    assert max(ids) < vocabulary and pipeline.text_tokenizer.decode(ids) == words
    cond, uncond = pipeline.tokenize_prompt(PROMPT, num_frames=17, height=96, width=160)
    assert cond[-2:] == [pipeline.text_tokenizer.eos_token_id, pipeline.llm_special_tokens["start_of_generation"]]
    assert len(set(cond[-2:])) == 2 and len(cond) != len(uncond)


# The default clip first; then another seed, another size, an image.
@pytest.mark.sampled(2)
@pytest.mark.long
@pytest.mark.parametrize(
    ("size", "guidance", "shift", "seed"),
    [
        ((96, 160, 17), 6.0, 10.0, 0),
        ((96, 160, 9), 6.0, 10.0, 1),
        ((80, 112, 9), 1.0, 10.0, 2),
        ((160, 160, 1), 4.0, 3.0, 0),
    ],
    ids=["default", "seed", "size", "image"],
)
def test_the_picture_is_lively(
    size: tuple[int, int, int], guidance: float, shift: float, seed: int, folder: Path, tmp_path: Path
) -> None:
    context = context_of(components(inspect_checkpoint(folder), flow_shift=shift), clip_of(*size), tmp_path)
    TextStage(task_config(prompt=PROMPT, negative_prompt=""), SamplerConfig(guidance_scale=guidance))(context)
    DenoiseStage(SamplerConfig(steps=8, guidance_scale=guidance, seed=seed))(context)
    DecodeStage()(context)
    assert context.frames is not None
    frames = torch.cat(list(context.frames)).numpy()
    assert frames.shape == (size[2], size[0], size[1], 3)
    assert ((frames == 0) | (frames == 255)).mean() < 0.02
    levels = frames.astype(np.float32)
    assert levels.std(axis=(1, 2, 3)).min() > 25
    # In every quarter of the picture, and with patches that are larger than a pixel.
    quarters = levels.reshape(len(levels), 2, size[0] // 2, 2, size[1] // 2, 3)
    assert quarters.std(axis=(2, 4)).min() > 15
    down, across = (np.abs(np.diff(levels, axis=axis)).mean() for axis in (1, 2))
    assert 3 < across < 0.6 * levels.std()
    assert 0.75 < across / down < 1.33  # no stripes
    if size[2] > 1:
        assert np.abs(np.diff(levels, axis=0)).mean(axis=(1, 2, 3)).min() > 3


def test_the_prompt_and_the_guidance_show(folder: Path, tmp_path: Path) -> None:
    parts = components(inspect_checkpoint(folder))

    def latents(prompt: str, guidance: float) -> torch.Tensor:
        context = context_of(parts, clip_of(48, 64, 5), tmp_path)
        TextStage(task_config(prompt=prompt, negative_prompt=""), SamplerConfig(guidance_scale=guidance))(context)
        DenoiseStage(SamplerConfig(steps=4, guidance_scale=guidance, seed=0))(context)
        found = context.state.get("latents")
        assert isinstance(found, torch.Tensor)
        return found

    base = latents(PROMPT, 6.0)
    assert (latents("A dog on a beach.", 6.0) - base).std() > 0.1
    assert (latents(PROMPT, 1.0) - base).std() > 0.1


def test_the_cache_is_used_and_knows_the_dimensions(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dimensions = toy_dimensions()
    first = toy.toy_checkpoint(**dimensions)
    assert first.parent == cache
    with monkeypatch.context() as patch:
        patch.setattr(toy, "write_toy", lambda *args, **kwargs: pytest.fail("made twice"))
        assert toy.toy_checkpoint(**dimensions) == first
    dimensions["transformer"] |= {"hidden_act": "relu2", "qk_norm_for_text": False, "num_hidden_layers": 1}
    other = toy.toy_checkpoint(**dimensions)
    assert other != first
    assert inspect_checkpoint(other).transformer["hidden_act"] == "relu2"
    assert sorted(p.name for p in cache.iterdir()) == sorted([first.name, other.name])


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("COSMOS3_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert toy.cache_folder() == tmp_path / "cosmos3_pipeline"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert toy.cache_folder() == tmp_path / ".cache" / "cosmos3_pipeline"


@pytest.mark.long
def test_makers_at_the_same_time_leave_one_whole_toy(
    cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    barrier = threading.Barrier(3)
    write = toy.write_toy

    def write_together(path: Path, **dimensions: Any) -> None:
        write(path, **dimensions)
        barrier.wait(timeout=HANGS)  # all are whole before the first is renamed

    monkeypatch.setattr(toy, "write_toy", write_together)
    found: list[Path] = []
    makers = [
        threading.Thread(target=lambda: found.append(toy.toy_checkpoint(**toy_dimensions()))) for _ in range(3)
    ]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert len(found) == 3 and len(set(found)) == 1
    assert list(cache.iterdir()) == [found[0]]
    assert digest(found[0]) == digest(folder)


def test_a_maker_that_fails_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, **dimensions: Any) -> None:
        (path / "half").write_text("x")
        raise RuntimeError("disk full")

    monkeypatch.setattr(toy, "write_toy", write)
    with pytest.raises(RuntimeError, match="disk full"):
        toy.toy_checkpoint(**toy_dimensions())
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COSMOS3_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(Refusal, match="COSMOS3_CACHE"):
        toy.toy_checkpoint(**toy_dimensions())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: make_tokenizer(200), f"vocab_size={SMALLEST_VOCABULARY}"),
        (
            lambda: toy.write_toy(
                Path("unwritten"),
                **{**toy_dimensions(), "vae": {**toy_dimensions()["vae"], "z_dim": 16}},
            ),
            "z_dim=48",
        ),
    ],
    ids=["vocabulary", "channels"],
)
def test_impossible_dimensions_are_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(Refusal, match=said):
        make()


def test_the_smallest_vocabulary_still_writes_any_text() -> None:
    tokenizer = make_tokenizer(SMALLEST_VOCABULARY)
    assert len(tokenizer) == SMALLEST_VOCABULARY
    assert tokenizer.decode(tokenizer("Grüße 跑").input_ids) == "Grüße 跑"
