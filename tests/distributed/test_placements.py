"""Where the weights are changes no bit, takes what the plan says, and leaves nothing of the text behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_layout
from ranks import run_on_ranks
from torch import Tensor
from toy_runs import PROMPT, clip_of, components, context_of, task_config

from cosmos3_pipeline import compose
from cosmos3_pipeline.checkpoint.inspect import inspect_checkpoint
from cosmos3_pipeline.checkpoint.weights import Part
from cosmos3_pipeline.config.plain import plain
from cosmos3_pipeline.config.schema import CacheConfig, CacheName, Config, HiddenAct, Placement, SamplerConfig
from cosmos3_pipeline.distributed.mesh import RankMesh
from cosmos3_pipeline.models.layouts import DISTILLED_SIGMAS, LAYOUTS
from cosmos3_pipeline.models.make_checkpoint import numbers_of
from cosmos3_pipeline.planning.plan import make_plan
from cosmos3_pipeline.planning.transformer import TransformerSize
from cosmos3_pipeline.planning.weights import WeightsPlan
from cosmos3_pipeline.plugin_kit.live_bytes import LiveBytes
from cosmos3_pipeline.stages.denoise import DenoiseStage
from cosmos3_pipeline.stages.text import TextStage

SIZE = 80, 112, 9  # 5 x 7 x 3 latents, an odd grid of patches
STEPS, GUIDANCE = 2, 6.0
# There are five layers, so that some stay, and the others move at an uneven pace.
NUMBERS = {"hidden_size": 192, "num_hidden_layers": 5, "intermediate_size": 416}
PLACEMENTS = {
    "resident": {},
    "text stays": {"keep_text": True},
    "streamed": {"placement": Placement.streamed},
    "streamed, 2 stay": {"placement": Placement.streamed, "resident_layers": 2},
    "streamed, 4 stay": {"placement": Placement.streamed, "resident_layers": 4},
    "streamed, the text stays": {"placement": Placement.streamed, "keep_text": True},
    "sharded": {"placement": Placement.sharded},
}
RESIDENT = WeightsPlan(Placement.resident, resident_layers=0, keep_text=False, stays=False)


# Layouts and dimensions of their transformers: Edge's has no gate, and norms the text's keys twice.
LAYOUT = {
    "nano": ("nano", NUMBERS),
    "one layer": ("nano", {**NUMBERS, "num_hidden_layers": 1}),
    "edge": ("edge", {"hidden_size": 192, "num_hidden_layers": 3, "intermediate_size": 416}),
    "distilled": ("distilled", NUMBERS),
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def made(name: str) -> Path:
        layout, changes = LAYOUT[name]
        numbers = numbers_of(LAYOUTS[layout], full_size=False)
        numbers["transformer"] |= changes
        return make_layout(tmp_path_factory.mktemp("placed") / layout, layout, **numbers)

    return made


@pytest.fixture(scope="module")
def folder(folder_of: Callable[[str], Path]) -> Path:
    return folder_of("nano")


def placements(ranks: int, layers: int) -> dict[str, WeightsPlan]:
    found = {name: replace(RESIDENT, **changes) for name, changes in PLACEMENTS.items()}  # type: ignore[arg-type]
    if layers < 5:  # no more can stay than there are
        found = {name: plan for name, plan in found.items() if not plan.resident_layers}
    return found if ranks > 1 else {name: plan for name, plan in found.items() if name != "sharded"}


def run(
    folder: str,
    plan: WeightsPlan,
    mesh: RankMesh,
    dtype: torch.dtype,
    clips: int = 1,
    **settings: Any,
) -> tuple[Tensor, dict[str, Any]]:
    """The latents of a prompt, `clips` times, and what was alive in each stage of the last."""
    parts = components(inspect_checkpoint(folder), dtype=dtype, weights=plan, mesh=mesh)
    measured: dict[str, Any] = {}
    for _ in range(clips):
        context = context_of(parts, clip_of(*SIZE), Path(folder), mesh=mesh)
        sigmas = parts.checkpoint.sampler.distilled_sigmas
        steps, guidance = (STEPS, GUIDANCE) if sigmas is None else (len(sigmas), 1.0)
        sampler = SamplerConfig(steps=steps, guidance_scale=guidance, seed=1, **settings)
        text, denoise = TextStage(task_config(prompt=PROMPT), sampler), DenoiseStage(sampler)
        with LiveBytes([]) as live:
            text(context)
            measured["text"], live.peak = live.peak, live.now
            measured["und after text"] = parts.transformer().here_bytes[Part.TEXT]
            measured["alive after text"] = live.now - parts.texts.nbytes
            denoise(context)
            measured["denoise"] = live.peak
        measured["gen after denoise"] = parts.transformer().here_bytes[Part.VISION]
        measured["tokens"] = [len(context.state.get(f"{name}_input_ids")) for name in ("cond", "uncond")]
    measured["sent"] = mesh.comm("replica").ledger.sent_bytes
    latents = context.state.get("latents")
    assert isinstance(latents, Tensor) and latents.std() > 0.3
    return latents, measured


def every_placement(
    rank: int, folder: str, layers: int, cfg: int, ulysses: int, dtype: torch.dtype
) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    mesh = RankMesh.build(cfg=cfg, ulysses=ulysses)
    expected, _ = run(folder, RESIDENT, mesh, dtype)
    found = []
    for name, plan in placements(cfg * ulysses, layers).items():
        mesh = RankMesh.build(cfg=cfg, ulysses=ulysses)
        latents, measured = run(folder, plan, mesh, dtype, clips=2)
        assert torch.equal(latents, expected), name
        found.append({"name": name, "rank": rank, **measured})
    return found


def config_of(plan: WeightsPlan, cfg: int, ulysses: int, dtype: torch.dtype, name: str = "nano") -> Config:
    composed = compose(
        [
            "model=toy_random",
            f"model.dtype={'float32' if dtype == torch.float32 else 'bfloat16'}",
            f"weights.placement={plan.placement.value}",
            f"weights.resident_layers={plan.resident_layers}",
            f"weights.keep_text={plan.keep_text}",
            f"topology.ranks_per_node={cfg * ulysses}",
            f"topology.cfg={cfg}",
            f"topology.ulysses={ulysses}",
            f"sampler.steps={STEPS}",
            f"sampler.guidance_scale={GUIDANCE}",
            *(f"task.{key}={value}" for key, value in zip(("height", "width", "num_frames"), SIZE, strict=True)),
        ]
    )
    layout, changes = LAYOUT[name]
    numbers = numbers_of(LAYOUTS[layout], full_size=False)["transformer"] | changes
    own = {key: value for key, value in numbers.items() if key in vars(composed.model.transformer)}
    own["hidden_act"] = HiddenAct(own["hidden_act"])
    transformer = replace(composed.model.transformer, **own)
    model = replace(composed.model, transformer=transformer)
    if name == "distilled":
        sigmas = list(DISTILLED_SIGMAS)
        sampler = replace(composed.sampler, steps=len(sigmas), guidance_scale=1.0, flow_shift=None)
        return replace(composed, model=replace(model, distilled_sigmas=sigmas), sampler=sampler)
    return replace(composed, model=model)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("name", "cfg", "ulysses", "dtype", "path"),
    [
        ("edge", 1, 2, torch.bfloat16, "host"),  # first, because it has the fewest layers of those on two ranks
        ("nano", 1, 1, torch.float32, "host"),
        ("nano", 1, 1, torch.bfloat16, "host"),
        ("nano", 1, 2, torch.float32, "host"),
        ("nano", 1, 2, torch.float32, "accelerator"),
        ("nano", 2, 2, torch.bfloat16, "host"),
        ("one layer", 1, 1, torch.float32, "host"),
        ("distilled", 1, 1, torch.float32, "host"),
        ("distilled", 1, 2, torch.float32, "host"),
    ],
    indirect=["path"],
    ids=str,
)
def test_every_placement_has_the_bits_of_the_resident_one(
    name: str, cfg: int, ulysses: int, dtype: torch.dtype, path: str, folder_of: Callable[[str], Path]
) -> None:
    layers = int(LAYOUT[name][1]["num_hidden_layers"])
    asked = (str(folder_of(name)), layers, cfg, ulysses, dtype)
    for measured in run_on_ranks(every_placement, cfg * ulysses, *asked):
        for one in measured:
            plan = placements(cfg * ulysses, layers)[one["name"]]
            assert (one["und after text"] == 0) == (not plan.keep_text), one
            # Nothing but the prompts' keys and values outlives the text, however it is looked for.
            assert plan.keep_text or one["alive after text"] < 20_000, one
            assert one["gen after denoise"] == 0, one
            if path == "accelerator":
                continue  # gloo gathers into a memory of its own, which NCCL does not need
            config = config_of(plan, cfg, ulysses, dtype, name)
            planned = make_plan(config, text_tokens=tuple(one["tokens"])).ranks[one["rank"]].stages
            assert planned["text"].peak_bytes == pytest.approx(one["text"], rel=0.05), one
            assert planned["denoise"].peak_bytes <= 1.05 * one["denoise"], one
            # Where a peer's processor is busy, a part of a layer is still held for it while the next one comes.
            late = layer_bytes(config, dtype) if plan.placement is Placement.sharded else 0
            assert one["denoise"] <= 1.05 * planned["denoise"].peak_bytes + late, one


def layer_bytes(config: Config, dtype: torch.dtype) -> int:
    size = TransformerSize.of(plain(config.model.transformer), latent_channels=48)
    return size.slabs(Part.VISION)[0].elements * dtype.itemsize


FASTER: dict[str, dict[str, Any]] = {
    "interval": {"guidance_interval": [990.0, 1000.0]},
    "cache": {"cache": CacheConfig(CacheName.seacache, threshold=100.0, cache_end_steps=0)},
}


def faster(rank: int, folder: str, settings: dict[str, Any]) -> int:
    """The bytes that this rank sends where each has a part of every layer, and not every pass is computed."""
    torch.set_num_threads(1)
    found, sent = [], 0
    for name in ("resident", "streamed", "sharded"):
        mesh = RankMesh.build(cfg=2)
        plan = replace(RESIDENT, **PLACEMENTS[name])  # type: ignore[arg-type]
        latents, measured = run(folder, plan, mesh, torch.float32, **settings)
        found.append(latents)
        sent = measured["sent"]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    return sent


def test_passes_that_are_not_computed_change_no_bit_and_bring_no_layer(folder: Path) -> None:
    """Without a pass in a step, a rank gives its part of the layers to the others, unless all spare theirs."""
    interval, cache = (run_on_ranks(faster, 2, str(folder), settings) for settings in FASTER.values())
    # The second step is spared; its first layer has come ahead of it.
    assert len(set(cache)) == len(set(interval)) == 1
    layers = NUMBERS["num_hidden_layers"]
    assert cache[0] / interval[0] == pytest.approx((layers + 1) / (STEPS * layers + 1), rel=0.01)


PROMPTS = ("a red kite 1", "a red kite 2", "a red kite 1", "a red kite 3")


def prompt_file(rank: int, folder: str, ulysses: int) -> dict[str, Any]:
    """The live bytes while the prompts of four clips are encoded together, and while the first is denoised."""
    torch.set_num_threads(1)
    mesh = RankMesh.build(ulysses=ulysses)
    parts = components(inspect_checkpoint(folder), dtype=torch.bfloat16, weights=RESIDENT, mesh=mesh)
    sampler = SamplerConfig(steps=STEPS, guidance_scale=GUIDANCE, seed=1)
    contexts = [context_of(parts, clip_of(*SIZE), Path(folder), mesh=mesh) for _ in PROMPTS]
    stages = [TextStage(task_config(prompt=prompt), sampler) for prompt in PROMPTS]
    found = []
    for stage, context in zip(stages, contexts, strict=True):
        stage.tokenize(context)
        found += stage.prompts(context)
    with LiveBytes([]) as live:
        parts.encode_texts(found, wait=True)
        text, live.peak = live.peak, live.now
        waiting = parts.texts.nbytes
        DenoiseStage(sampler)(contexts[0])
        denoise = live.peak
    for context in contexts[1:]:
        DenoiseStage(sampler)(context)
    tokens = [len(contexts[0].state.get(f"{name}_input_ids")) for name in ("cond", "uncond")]
    assert len({len(context.state.get("cond_input_ids")) for context in contexts}) == 1
    left = parts.texts.nbytes
    return {"text": text, "denoise": denoise, "waiting": waiting, "tokens": tokens, "left": left}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("ulysses", [1, 2])
def test_the_prompts_of_a_file_take_what_is_planned(ulysses: int, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"{prompt}\n" for prompt in PROMPTS), encoding="utf-8")
    config = config_of(RESIDENT, 1, ulysses, torch.bfloat16)
    config = replace(config, task=replace(config.task, prompt_file=str(file)))
    for rank, one in enumerate(run_on_ranks(prompt_file, ulysses, str(folder), ulysses)):
        plan = make_plan(config, text_tokens=tuple(one["tokens"]))
        stages = plan.ranks[rank].stages
        # One prompt is there twice, and encoded once: the plan counts lines.
        twice = stages["text"].text_bytes - one["waiting"]
        assert 0 < twice < one["waiting"] / 3
        # The plan is that of any clip: from the second on the decoder's weights are there, which are not here.
        decoder = plan.vae["decode"].plan.shares[rank].held_bytes
        for name, beside in (("text", 0), ("denoise", decoder)):
            assert stages[name].peak_bytes - twice - beside == pytest.approx(one[name], rel=0.05), name
        assert one["left"] == 0  # who was waited for has been taken
