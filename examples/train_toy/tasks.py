"""The last part of the transformer's training: sound, clips of edges to follow, first and last photographs."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from diffusers import Cosmos3OmniTransformer
from diffusers.modular_pipelines.cosmos.encoders import Cosmos3TransferTextStep
from diffusers.modular_pipelines.modular_pipeline import PipelineState
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import Cosmos3OmniPipeline
from flow import (
    FPS,
    IMAGE,
    LARGE,
    NO_WORDS,
    SIZES,
    SMALL,
    Latents,
    Size,
    by_length,
    load_latents,
    noised,
    positions_of,
    scaled_latents,
    scenes_of,
    velocity,
)
from scenes import both_ends, edges, render
from sound import sound_latents
from torch import Tensor

STEPS = 1400
BATCH = 8
# What is encoded, of the first scenes of a size: how it is drawn, its latent frames that are kept, the parts.
ENCODED: dict[str, tuple[Callable[..., Tensor], slice, dict[Size, int]]] = {
    "latents": (render, slice(None), {LARGE: 6, SMALL: 4, IMAGE: 10}),
    "edges": (edges, slice(None), {LARGE: 6, SMALL: 3}),
    "ends": (both_ends, slice(-1, None), {LARGE: 4, SMALL: 2}),
}
# The relative number of batches: a video from words, a photograph or a clip; an image; a video between two
# photographs; a video that follows edges.
KINDS = {"video": 6, "image": 3, "ends": 2, "edges": 4}
# Latent frames that are given, with their relative numbers. A further chunk of a transfer begins with one.
GIVEN = {
    "video": {(): 7, (0,): 5, (0, 1): 3},
    "image": {(): 1},
    "ends": {(0, -1): 1},
    "edges": {(): 3, (0,): 1},
}
WITH_SOUND = 0.6  # share of the batches of videos, but for edges
NO_CONTROL = 0.15  # share of the batches of edges without the edges, which the guidance by controls needs
SOUND_WEIGHT = 0.5  # of the sound in the loss; the picture has 1


@dataclass(frozen=True)
class Data:
    """What the steps see, by size. `edges` and `ends` are of the first scenes of a size."""

    clips: dict[Size, Latents]
    edges: dict[Size, Tensor]  # latents of control clips
    ends: dict[Size, Tensor]  # the latent frame that a photograph of the last frame becomes
    sounds: dict[Size, Tensor]
    transfer: dict[Size, tuple[list[Tensor], Tensor]]  # tokens of each prompt, and of the empty prompt
    positions: Callable[[int, Size, bool, int], Tensor]


def load(out: Path, pipeline: Cosmos3OmniPipeline) -> Data:
    """All data, from the latents in `out`."""
    parts = {kind: counts for kind, (_, _, counts) in ENCODED.items()}
    clips, transfer, sounds = load_latents(out, pipeline, parts["latents"]), {}, {}
    controls, ends = (
        {size: scaled_latents(out, kind, size, count) for size, count in parts[kind].items()}
        for kind in ("edges", "ends")
    )
    for size in (LARGE, SMALL):
        scenes = [scene for part in range(parts["latents"][size]) for scene in scenes_of(size, part)]
        both = [transfer_tokens(pipeline, scene.caption) for scene in scenes]
        transfer[size] = [words for words, _ in both], both[0][1]
        sounds[size] = torch.stack([sound_latents(scene, size[0], FPS) for scene in scenes])

    @cache
    def positions(tokens: int, size: Size, control: bool, sound: int) -> Tensor:
        return positions_of(pipeline, tokens, size, control=control, sound=sound)

    return Data(clips, controls, ends, sounds, transfer, positions)


def transfer_tokens(pipeline: Cosmos3OmniPipeline, caption: str) -> tuple[Tensor, Tensor]:
    """The tokens of a prompt and of the empty prompt, as the pipeline writes them for a transfer."""
    parts = SimpleNamespace(
        text_tokenizer=pipeline.text_tokenizer,
        llm_special_tokens=pipeline.llm_special_tokens,
        requires_safety_checker=False,
    )
    state = PipelineState()
    for key, value in (("prompt", caption), ("negative_prompt", ""), ("use_system_prompt", True)):
        state.set(key, value)
    Cosmos3TransferTextStep()(parts, state)
    words, nothing = (torch.tensor(state.get(f"{name}_input_ids")) for name in ("cond", "uncond"))
    return words, nothing


def kind_of(step: int) -> str:
    """The kind of the batch of a step."""
    return random.Random(step).choices(list(KINDS), list(KINDS.values()))[0]


def loss_of(model: Cosmos3OmniTransformer, data: Data, step: int) -> Tensor:
    """The flow-matching loss on one batch, of one kind and size, with prompts of one length or without words."""
    rng, kind = random.Random(f"batch {step}"), kind_of(step)
    size = IMAGE if kind == "image" else rng.choices((LARGE, SMALL), (2, 1))[0]
    clips = data.clips[size]
    latents, prompts, nothing = clips.latents, clips.tokens, clips.nothing
    if kind == "edges":
        prompts, nothing = data.transfer[size]
    if kind in ("edges", "ends"):
        prompts = prompts[: len((data.edges if kind == "edges" else data.ends)[size])]
    lengths = by_length(prompts)
    length = rng.choices(list(lengths), [len(group) for group in lengths.values()])[0]
    chosen = rng.choices(lengths[length], k=BATCH)
    x, tokens = latents[chosen], torch.stack([prompts[index] for index in chosen])
    if rng.random() < NO_WORDS:
        tokens = nothing.expand(BATCH, -1)
    control = data.edges[size][chosen] if kind == "edges" and rng.random() >= NO_CONTROL else None
    sound = data.sounds[size][chosen] if kind in ("video", "ends") and rng.random() < WITH_SOUND else None
    if kind == "ends":
        x = torch.cat([x[:, :, :-1], data.ends[size][chosen]], 2)
    frames = x.shape[2]
    given = rng.choices(list(GIVEN[kind]), list(GIVEN[kind].values()))[0]
    clean = [frame % frames for frame in given]
    noisy = [frame for frame in range(frames) if frame not in clean]
    found, noise, heard = noised(x, SIZES.shifts, clean, sound)
    positions = data.positions(tokens.shape[1], size, control is not None, 0 if sound is None else sound.shape[2])
    picture, tone = velocity(
        model, tokens, positions, *found, clean, control=control, sound=None if heard is None else heard[0]
    )
    loss = F.mse_loss(picture[:, :, noisy], (noise - x)[:, :, noisy])
    if sound is not None and heard is not None and tone is not None:
        loss = loss + SOUND_WEIGHT * F.mse_loss(tone, heard[1] - sound)
    return loss
