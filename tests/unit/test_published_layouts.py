"""Every published layout of Cosmos3: opened with diffusers' own latents, or refused by its true name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from checkpoints import TRANSFORMER_PARTS, drop, edit, make_layout, open_whole
from diffusers import AutoencoderKLWan, Cosmos3OmniPipeline, Cosmos3OmniTransformer, UniPCMultistepScheduler
from PIL import Image
from toy_runs import PROMPT, clip_of, components, context_of, task_config

from cosmos3_pipeline import compose
from cosmos3_pipeline.checkpoint.files import NEGATIVE_PROMPT
from cosmos3_pipeline.checkpoint.inspect import inspect_checkpoint
from cosmos3_pipeline.checkpoint.weights import transformer_weights, vae_weights
from cosmos3_pipeline.config.schema import SamplerConfig
from cosmos3_pipeline.errors import ConfigError, Refusal
from cosmos3_pipeline.models.layouts import LAYOUTS
from cosmos3_pipeline.models.loading import load_scheduler
from cosmos3_pipeline.models.make_checkpoint import numbers_of
from cosmos3_pipeline.models.placement import empty_transformer
from cosmos3_pipeline.stages.denoise import DenoiseStage
from cosmos3_pipeline.stages.encode import EncodeStage
from cosmos3_pipeline.stages.text import TextStage

pytestmark = pytest.mark.long

RUN = [(name, task) for name in ("nano", "edge") for task in ("t2v", "i2v", "t2i")]
RUN += [(name, "t2v") for name in ("super", "nano-converted", "edge-converted")]
EDGE_CLASS = "Cosmos3EdgeUniPCMultistepScheduler"


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a layout, which is made when a test first asks for it."""
    root = tmp_path_factory.mktemp("layouts")
    return cache(lambda name: make_layout(root / name, name))


def reference(folder: Path, *, flow_shift: float) -> Cosmos3OmniPipeline:
    """diffusers' own pipeline with the sampler of NVIDIA's recommended call."""
    scheduler = UniPCMultistepScheduler.from_pretrained(
        folder, subfolder="scheduler", flow_shift=flow_shift, use_karras_sigmas=False
    )
    pipeline = Cosmos3OmniPipeline.from_pretrained(
        folder, scheduler=scheduler, dtype=torch.float32, enable_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("name", "task"), RUN)
def test_latents_are_diffusers_own(name: str, task: str, layout: Callable[[str], Path], tmp_path: Path) -> None:
    folder = layout(name)
    shift = 3.0 if name.startswith("edge") else 10.0
    photo = tmp_path / "photo.png"
    Image.effect_noise((70, 50), 90).convert("RGB").save(photo)
    frames = 1 if task == "t2i" else 9
    # diffusers cannot open a folder that names the converter's class; the weights of both layouts are the same.
    theirs = layout("edge") if name == "edge-converted" else folder
    expected = reference(theirs, flow_shift=shift)(
        prompt=PROMPT,
        negative_prompt=json.dumps(json.loads((folder / NEGATIVE_PROMPT).read_text())),
        height=80,
        width=48,
        num_frames=frames,
        num_inference_steps=3,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        **({"image": Image.open(photo)} if task == "i2v" else {}),
    ).video
    context = context_of(
        components(inspect_checkpoint(folder), flow_shift=shift), clip_of(80, 48, frames), tmp_path
    )
    TextStage(task_config(prompt=PROMPT), SamplerConfig(guidance_scale=5.0))(context)
    assert context.words is not None and NEGATIVE_PROMPT in context.words.negative_prompt_from
    if task == "i2v":
        EncodeStage(task_config(image=str(photo), condition_latent_frames=[0]))(context)
    DenoiseStage(SamplerConfig(steps=3, guidance_scale=5.0, seed=3))(context)
    ours = context.state.get("latents")
    assert expected.std() > 0.5
    assert (ours - expected).abs().max().item() <= 1e-5


# Layouts that are not run, with words of the refusal's what, why and works.
REFUSED = {
    "fp8": ("quantized .modelopt FP8_FP8 FP8", "float32, bfloat16 and float16", "unquantized"),
    "int4": ("quantized .auto-round 4", "float32, bfloat16 and float16", "unquantized"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_run_is_refused_by_its_true_name(name: str, layout: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError) as refused:
        compose(["model=nano", f"model.path={layout(name)}"])
    (problem,) = refused.value.problems
    for said, part in zip(REFUSED[name], (problem.what, problem.why, problem.works), strict=True):
        assert re.search(said, part), part


@pytest.mark.sampled(1)
@pytest.mark.parametrize("file", ["weights", "transformer/config.json", "hf_quant_config.json"])
def test_quantized_weights_are_found_by_any_trace(file: str, tmp_path: Path) -> None:
    """Whichever of the three traces of a quantizer is left, the others removed."""
    folder = make_layout(tmp_path / "fp8", "fp8")
    if file != "transformer/config.json":
        drop(folder / "transformer" / "config.json", "quantization_config")
    if file != "hf_quant_config.json":
        (folder / "hf_quant_config.json").unlink()
    with pytest.raises(Refusal, match="quantized"):
        inspect_checkpoint(folder)


def test_both_names_of_the_index_are_one_pipeline(tmp_path: Path) -> None:
    folder = make_layout(tmp_path / "nano", "nano")
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "Cosmos3OmniDiffusersPipeline"
    open_whole(folder)
    edit(folder / "model_index.json", _class_name="Cosmos3OmniPipeline")
    open_whole(folder)


# Timesteps of NVIDIA's framework (FlowUniPCMultistepScheduler) and the test of TensorRT-LLM's Edge pipeline.
UPSTREAM_TIMESTEPS = {
    (3.0, 4): [999, 899, 749, 499],
    (3.0, 10): [999, 963, 922, 874, 817, 749, 666, 562, 428, 249],
    (10.0, 7): [999, 983, 961, 930, 882, 799, 624],
    (5.0, 13): [999, 983, 964, 943, 918, 888, 853, 810, 757, 689, 599, 475, 293],
}
UPSTREAM_SIGMAS = (
    *(0.99966645, 0.96394110, 0.92272168, 0.87463522, 0.81780970),
    *(0.74962479, 0.66629612, 0.56214833, 0.42826521, 0.24979164, 0.0),
)


def native_schedule(folder: Path, flow_shift: float | None, steps: int) -> Any:
    """The scheduler after the block that diffusers' workflow sets timesteps with."""
    from diffusers.modular_pipelines.cosmos.before_denoise import Cosmos3SetTimestepsStep
    from diffusers.modular_pipelines.modular_pipeline import PipelineState

    parts = components(inspect_checkpoint(folder), flow_shift=flow_shift)
    parts.scheduler()
    state = PipelineState()
    state.set("num_inference_steps", steps)
    Cosmos3SetTimestepsStep()(parts.pipeline, state)
    return parts.pipeline.scheduler


@pytest.mark.parametrize("name", ["edge", "edge-converted"])
@pytest.mark.parametrize(("shift", "steps"), UPSTREAM_TIMESTEPS)
def test_the_schedule_of_edge_is_nvidias(
    name: str, shift: float, steps: int, layout: Callable[[str], Path]
) -> None:
    scheduler = native_schedule(layout(name), shift, steps)
    assert scheduler.timesteps.tolist() == UPSTREAM_TIMESTEPS[shift, steps]


@pytest.mark.parametrize("name", ["edge", "edge-converted"])
def test_the_schedule_of_edge_without_a_shift_is_its_own(name: str, layout: Callable[[str], Path]) -> None:
    """null is the checkpoint's own shift, 3.0, and never the Karras sigmas that the published file switches on."""
    scheduler = native_schedule(layout(name), None, 10)
    assert scheduler.timesteps.tolist() == UPSTREAM_TIMESTEPS[3.0, 10]
    torch.testing.assert_close(scheduler.sigmas, torch.tensor(UPSTREAM_SIGMAS), rtol=0, atol=3e-8)


def test_the_own_class_of_edge_is_used_where_diffusers_has_it(
    layout: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cosmos3EdgeUniPC(UniPCMultistepScheduler):
        pass

    monkeypatch.setattr(diffusers, EDGE_CLASS, Cosmos3EdgeUniPC, raising=False)
    sampler = inspect_checkpoint(layout("edge-converted")).sampler
    assert type(load_scheduler(sampler, flow_shift=None)) is Cosmos3EdgeUniPC


def test_the_shift_of_an_index_is_the_default(tmp_path: Path) -> None:
    folder = make_layout(tmp_path / "edge", "edge-converted")
    edit(folder / "model_index.json", native_flow_shift=7.5)
    cfg = compose(["model=edge", f"model.path={folder}"])
    assert cfg.sampler.flow_shift == 7.5
    assert compose(["model=edge", f"model.path={folder}", "sampler.flow_shift=4"]).sampler.flow_shift == 4


def test_what_is_not_read_is_listed_and_what_is_unknown_told(
    layout: Callable[[str], Path], tmp_path: Path
) -> None:
    info = inspect_checkpoint(layout("nano"))
    assert info.strangers == ()
    listed = {"model_index.json: sound_tokenizer", "model_index.json: vision_encoder", "transformer: use_cache"}
    assert listed <= set(info.not_read)
    folder = make_layout(tmp_path / "nano", "nano")
    edit(folder / "transformer" / "config.json", use_new_trick=True)
    edit(folder / "model_index.json", motion_adapter=["diffusers", "MotionAdapter"])
    strangers = inspect_checkpoint(folder).strangers
    assert strangers == ("model_index.json: motion_adapter", "transformer: use_new_trick")


def test_lm_head_and_the_end_of_the_text_are_never_read(tmp_path: Path) -> None:
    """The text's queries of the last layer, and all that follows them, change no result. Even NaN reaches none."""
    from safetensors.torch import load_file, save_file

    folder = make_layout(tmp_path / "edge", "nano")
    info = inspect_checkpoint(folder)
    model = empty_transformer(info, TRANSFORMER_PARTS, dtype=torch.float32, device=torch.device("cpu"))
    unread = {p.weight.name for p in info.tensors["transformer"]} - set(model.state_dict())
    last = "layers.3."
    assert {"lm_head.weight", "norm.weight", f"{last}self_attn.to_q.weight", f"{last}mlp.up_proj.weight"} <= unread
    for file in (folder / "transformer").glob("*.safetensors"):
        tensors = load_file(file)
        for name in unread & set(tensors):
            tensors[name].fill_(float("nan"))
        save_file(tensors, file, metadata={"format": "pt"})
    open_whole(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden_act": "relu2", "qk_norm_for_text": False},
        {"qk_norm_for_text": False, "use_und_k_norm_for_gen": True},
        {"action_gen": True, "action_dim": 7, "num_embodiment_domains": 3, "sound_gen": True, "sound_dim": 5},
    ],
    ids=["nano", "relu2", "edge", "other modalities"],
)
def test_the_table_of_weights_is_diffusers_own(changes: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = Cosmos3OmniTransformer(**{"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 300, **changes})
    table = [(weight.name, weight.shape) for weight in transformer_weights(model.config)]
    assert table == [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]


def test_the_table_of_the_vae_is_diffusers_own() -> None:
    config = numbers_of(LAYOUTS["nano"], full_size=True)["vae"]
    with torch.device("meta"):
        model = AutoencoderKLWan(**config)
    table = {weight.name: weight.shape for weight in vae_weights(config)}
    assert table == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "tensors", "elements"), [("nano", 814, 15_173_669_120), ("edge", 549, 3_369_657_024)]
)
def test_the_real_sizes_are_those_that_others_counted(name: str, tensors: int, elements: int) -> None:
    layout = LAYOUTS[name]
    weights = transformer_weights({**layout.transformer, **numbers_of(layout, full_size=True)["transformer"]})
    assert (len(weights), sum(weight.elements for weight in weights)) == (tensors, elements)
