"""A checkpoint folder is refused before anything heavy when it cannot be run, in words that help."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_runs import toy_dimensions

from cosmos3_pipeline import compose
from cosmos3_pipeline.checkpoint.adopt import adopt_checkpoint
from cosmos3_pipeline.checkpoint.inspect import inspect_checkpoint
from cosmos3_pipeline.errors import ConfigError, Refusal
from cosmos3_pipeline.models.loading import Components, load_scheduler, load_vae
from cosmos3_pipeline.models.toy import write_toy


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole")
    write_toy(path, **toy_dimensions())
    return path


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def shards(folder: Path) -> list[Path]:
    return sorted((folder / "transformer").glob("*.safetensors"))


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def nest(folder: Path) -> None:
    inside = [p for p in folder.iterdir()]
    (folder / "snapshot").mkdir()
    for path in inside:
        path.rename(folder / "snapshot" / path.name)


def point_to_lfs(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


# Each changes a whole folder. The refusal contains the words.
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no-folder": (lambda f: shutil.rmtree(f), "does not exist"),
    "a-file": (lambda f: (shutil.rmtree(f), f.write_text("")), "is a file"),
    "no-index": (lambda f: (f / "model_index.json").unlink(), "has no model_index.json"),
    "one-too-high": (nest, r"works: model.path=.*/snapshot"),
    "not-json": (lambda f: (f / "model_index.json").write_text("{"), "is not JSON"),
    "other-pipeline": (lambda f: edit(f / "model_index.json", _class_name="WanPipeline"), "holds a WanPipeline"),
    "no-vae": (lambda f: shutil.rmtree(f / "vae"), "has no vae/config.json"),
    "no-tokenizer": (lambda f: shutil.rmtree(f / "text_tokenizer"), "has no text_tokenizer/tokenizer_config.json"),
    "no-scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "has no scheduler/scheduler_config.json"),
    "other-transformer": (
        lambda f: edit(f / "transformer" / "config.json", _class_name="WanTransformer3DModel"),
        "names the class 'WanTransformer3DModel'",
    ),
    "distilled": (
        lambda f: edit(f / "scheduler" / "scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler"),
        "says scheduler",
    ),
    "other-vae": (lambda f: edit(f / "vae" / "config.json", scale_factor_spatial=8), "scale_factor_spatial: 8"),
    "no-weights": (lambda f: next((f / "vae").glob("*.safetensors")).unlink(), "has no weights"),
    "missing-shard": (lambda f: shards(f)[1].unlink(), "3 of 4 weight files"),
    "cut-shard": (lambda f: cut(shards(f)[2], 100_000), "it has 100000 bytes, its header speaks of"),
    "cut-header": (lambda f: cut(shards(f)[2], 100), "within its header"),
    "empty-shard": (lambda f: cut(shards(f)[0], 0), "within its header"),
    "git-lfs": (lambda f: point_to_lfs(shards(f)[0]), "git-lfs pointer"),
}


@pytest.mark.parametrize(("damage", "said"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_run_is_refused(damage: Callable[[Path], object], said: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(Refusal, match=said) as refused:
        inspect_checkpoint(folder)
    assert refused.value.problem.works


def test_a_whole_folder_is_told_by_its_numbers(folder: Path) -> None:
    info = inspect_checkpoint(folder)
    for component in ("transformer", "vae"):
        files = {placed.stored.file for placed in info.tensors[component]}
        found = {name: tensor for file in files for name, tensor in load_file(file).items()}
        placed = {one.weight.name: one for one in info.tensors[component]}
        assert set(found) == set(placed)
        assert all(tuple(found[name].shape) == placed[name].weight.shape for name in found)
        assert all(found[name].nbytes == placed[name].stored.nbytes for name in found)
    assert info.transformer["num_attention_heads"] == 8 and info.vae["z_dim"] == 48


@pytest.mark.ranks
def test_looking_at_it_imports_no_torch(folder: Path) -> None:
    program = (
        "import sys; from cosmos3_pipeline.checkpoint.inspect import inspect_checkpoint; "
        f"inspect_checkpoint({str(folder)!r}); "
        "print({'torch', 'diffusers', 'transformers', 'safetensors', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_checkpoints_own_dimensions_take_the_options_place(whole: Path) -> None:
    cfg = compose(["model=nano", f"model.path={whole}"])
    assert cfg.model.transformer.hidden_size == 64
    assert cfg.model.vae.base_dim == 16
    option = compose(["model=nano"])
    adopted = adopt_checkpoint(replace(option, model=replace(option.model, path=str(whole))))
    assert adopted is not None
    assert "model.transformer.num_hidden_layers=4, not 36" in adopted.changed


def test_checks_are_about_the_checkpoint_not_the_option(whole: Path, tmp_path: Path) -> None:
    layout = ["topology=cpu_x4", "topology.cfg=1", "topology.ulysses=4"]
    compose([*layout, f"model.path={whole}"])
    toy = toy_dimensions()
    six = {**toy["transformer"], "num_attention_heads": 6, "num_key_value_heads": 2}
    write_toy(tmp_path / "six", **{**toy, "transformer": six})
    with pytest.raises(ConfigError, match="6 attention heads"):
        compose([*layout, f"model.path={tmp_path / 'six'}"])


def test_the_shipped_schedule_or_the_shift_asked_for(folder: Path) -> None:
    # As the base checkpoints ship it.
    edit(folder / "scheduler" / "scheduler_config.json", use_karras_sigmas=True, sigma_max=200.0, sigma_min=0.147)
    sampler = inspect_checkpoint(folder).sampler
    shipped = load_scheduler(sampler, flow_shift=None)
    assert shipped.config.use_karras_sigmas is True and shipped.config.flow_shift == 10.0
    shifted = load_scheduler(sampler, flow_shift=3.0)
    assert shifted.config.use_karras_sigmas is False and shifted.config.flow_shift == 3.0
    assert shifted.config.sigma_max == 200.0
    schedules = []
    for scheduler in (shipped, shifted, load_scheduler(sampler, flow_shift=10.0)):
        scheduler.set_timesteps(8)
        schedules.append(scheduler.sigmas)
    assert not torch.equal(schedules[0], schedules[1]) and not torch.equal(schedules[1], schedules[2])


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_half_a_vae_decodes_like_a_whole_one(dtype: torch.dtype, whole: Path) -> None:
    info = inspect_checkpoint(whole)
    half, full = (
        load_vae(info, dtype=dtype, device=torch.device("cpu"), encoder=encoder) for encoder in (False, True)
    )
    assert half.encoder is None and half.quant_conv is None
    assert half.dtype == full.dtype == dtype and half.device == full.device
    assert not any(p.is_meta for p in half.parameters()) and not half.training
    z = torch.randn(1, 48, 2, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(half.decode(z).sample, full.decode(z).sample)


def test_components_are_loaded_once_and_only_when_asked_for(whole: Path) -> None:
    wrapped: list[object] = []
    parts = Components(
        inspect_checkpoint(whole),
        dtype=torch.bfloat16,
        vae_dtype=torch.float32,
        device=torch.device("cpu"),
        flow_shift=None,
        wrap_vae=lambda vae: wrapped.append(vae) or vae,
    )
    names = ("text_tokenizer", "transformer", "scheduler", "vae")
    assert all(getattr(parts.pipeline, name) is None for name in names)
    assert not parts.pipeline.requires_safety_checker
    placed = parts.transformer()
    transformer = placed.model
    assert parts.transformer() is placed and transformer is parts.pipeline.transformer
    assert all(parameter.is_meta for parameter in transformer.parameters())
    parts.load_vision()
    assert transformer.dtype == torch.bfloat16
    assert transformer.time_embedder.linear_1.weight.dtype == torch.float32
    assert parts.pipeline.vae is None and parts.pipeline.text_tokenizer is None
    assert parts.vae(encoder=False).encoder is None
    assert parts.vae(encoder=False) is wrapped[0]
    assert parts.vae(encoder=True).encoder is not None
    assert parts.vae(encoder=False) is wrapped[1] and len(wrapped) == 2
    assert not any(p.requires_grad for p in (*transformer.parameters(), *parts.vae(encoder=False).parameters()))


@pytest.mark.parametrize("default", [True, False])
def test_the_checkpoints_own_settings_reach_the_pipeline(default: bool, folder: Path) -> None:
    edit(folder / "model_index.json", default_use_system_prompt=default, use_native_flow_schedule=not default)
    parts = Components(
        inspect_checkpoint(folder),
        dtype=torch.float32,
        vae_dtype=torch.float32,
        device=torch.device("cpu"),
        flow_shift=None,
        wrap_vae=lambda vae: vae,
    )
    config = parts.pipeline.config
    assert (config.default_use_system_prompt, config.use_native_flow_schedule) == (default, not default)
