"""The toy's transformer: diffusers' `Cosmos3OmniTransformer`, narrow, trained by flow matching on latents."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import Cosmos3OmniTransformer
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import Cosmos3OmniPipeline
from look import QUESTIONS, answers
from scenes import Scene, draw_scene, render
from torch import Tensor

from cosmos3_pipeline.denoise.pathway import Pathway
from cosmos3_pipeline.vae import ParallelVAE

DIMENSIONS = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 320,
    "vocab_size": 512,
    "latent_patch_size": 1,
    # The positions of a small picture are close together, so rotations must be fast.
    "rope_theta": 1000.0,
}
LATENT = {"latent_channel": 48, "patch_latent_dim": 48, "rope_axes_dim": [6, 5, 5]}
FPS = 24
SHIFT = 3.0  # of the noise levels in the sampler
NO_WORDS = 0.1  # the share of batches with the empty prompt, which guidance needs
GUIDANCE, SAMPLE_STEPS = 3.0, 20  # of the samples that are measured
UNSEEN, UNSEEN_PROMPTS = 10**9, 16
Size = tuple[int, int, int]  # frames, height, width
TINY, SMALL, LARGE, IMAGE = (9, 64, 64), (17, 96, 96), (17, 96, 160), (1, 160, 160)
# The number of parts of each size. A part has PART scenes.
PART = 100
PARTS = {TINY: 60, SMALL: 40, LARGE: 40, IMAGE: 40}


@dataclass(frozen=True)
class Course:
    """The data that the steps of a training see."""

    steps: int
    # For each phase: its first step, the relative number of batches of each size, and the clips in a batch.
    phases: tuple[tuple[int, Mapping[Size, int], int], ...]
    shifts: tuple[float, ...]  # shifts of the noise levels; the clips of a batch take them in turn

    @property
    def sizes(self) -> set[Size]:
        return {size for _, weights, _ in self.phases for size in weights}


# The words are learnt on small clips, which have a seventh of the tokens of the sizes that users ask for.
WORDS = Course(
    steps=4200,
    phases=((0, {TINY: 8, SMALL: 1, IMAGE: 1}, 32), (2500, {TINY: 1, SMALL: 3, LARGE: 5, IMAGE: 2}, 16)),
    shifts=(SHIFT,),
)
# Then the sizes that users ask for. Shape is learnt last. It is decided at noise levels of 0.85 and more, and with
# the sampler's shift only one level in five is so high. Therefore half of the clips have a larger shift.
SIZES = Course(steps=7000, phases=((0, {SMALL: 4, LARGE: 4, IMAGE: 3}, 32),), shifts=(SHIFT, 9.0))


@dataclass(frozen=True)
class Latents:
    """Clips of one size as latents [clips, 48, T, h, w] with mean 0 and deviation 1, and their tokens."""

    latents: Tensor
    tokens: list[Tensor]  # the tokens of each clip's prompt
    nothing: Tensor  # tokens of the empty prompt
    positions: dict[int, Tensor]  # [3, tokens + T h w], by the number of text tokens

    def by_length(self) -> dict[int, list[int]]:
        """Clips grouped by the number of tokens of their prompts. A batch is taken from one group."""
        found: dict[int, list[int]] = {}
        for index, tokens in enumerate(self.tokens):
            found.setdefault(len(tokens), []).append(index)
        return found


def make_transformer() -> Cosmos3OmniTransformer:
    torch.manual_seed(0)
    model = Cosmos3OmniTransformer(**DIMENSIONS, **LATENT)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.02 if "embed" in name else parameter.shape[1] ** -0.5)
            if name.endswith(("to_out.weight", "to_add_out.weight", "down_proj.weight", "proj_out.weight")):
                parameter.mul_(0.1)
    return model


def velocity(
    model: Cosmos3OmniTransformer, tokens: Tensor, positions: Tensor, z: Tensor, sigma: Tensor, clean: int = 0
) -> Tensor:
    """The velocity, noise minus clip, as diffusers' forward computes it for one clip, for each clip of a batch.

    tokens [B, n], positions [3, n + T h w], z [B, 48, T, h, w], sigma [B]. The first `clean` latent frames of z
    are the condition. `test_train_toy` compares with diffusers.
    """
    n, shape = tokens.shape[1], z.shape
    text = model.embed_tokens(tokens)
    vision = model.proj_in(z.flatten(2).transpose(1, 2))
    level = model.time_embedder(model.time_proj(1000 * sigma * model.config.timestep_scale))
    noisy = torch.ones(shape[2])
    noisy[:clean] = 0
    rows = noisy.repeat_interleave(shape[3] * shape[4])
    vision = vision + rows[None, :, None] * level[:, None]
    cos, sin = model.rotary_emb(position_ids=positions[:, None], device=z.device, dtype=z.dtype)
    for index, layer in enumerate(model.layers):
        und, gen = Pathway.understanding(layer), Pathway.generation(layer)
        q, k, v = und.project(text, model.config.head_dim)
        k = rotate(und.key_norm(k), cos[:, :n], sin[:, :n])
        if index < len(model.layers) - 1:  # the last layer's text output is never read
            q = rotate(und.query_norm(q), cos[:, :n], sin[:, :n])
            text = finish(und, text, attend(q, k, v, causal=True))
        gq, gk, gv = gen.project(vision, model.config.head_dim)
        gq = rotate(gen.query_norm(gq), cos[:, n:], sin[:, n:])
        gk = rotate(gen.key_norm(gk), cos[:, n:], sin[:, n:])
        vision = finish(gen, vision, attend(gq, torch.cat((k, gk), 1), torch.cat((v, gv), 1), causal=False))
    found: Tensor = model.proj_out(model.norm_moe_gen(vision)).transpose(1, 2).reshape(shape)
    return found * noisy[None, None, :, None, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos[:, :, None] + torch.cat((-b, a), -1) * sin[:, :, None]


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def finish(pathway: Pathway, hidden: Tensor, attended: Tensor) -> Tensor:
    hidden = hidden + pathway.output(attended.flatten(-2))
    made: Tensor = hidden + pathway.mlp(pathway.mlp_norm(hidden))
    return made


def tokens_of(pipeline: Cosmos3OmniPipeline, caption: str, size: Size) -> tuple[Tensor, Tensor]:
    """The tokens of a prompt and of the empty prompt, as the pipeline writes them."""
    frames, height, width = size
    both = pipeline.tokenize_prompt(
        caption, "", num_frames=frames, height=height, width=width, fps=float(FPS), use_system_prompt=False
    )
    return torch.tensor(both[0]), torch.tensor(both[1])


def positions_of(pipeline: Cosmos3OmniPipeline, tokens: int, size: Size) -> Tensor:
    """Positions of text and vision, as the pipeline packs them."""
    frames, height, width = size
    text = pipeline._prepare_text_segment([0] * tokens, "cpu")
    vision = pipeline._prepare_vision_segment(
        torch.empty(1, 1, 1 + (frames - 1) // 4, height // 16, width // 16),
        has_image_condition=False,
        mrope_offset=text["vision_start_temporal_offset"],
        vision_fps=float(FPS),
        curr=tokens,
        device="cpu",
    )
    return torch.cat((text["text_mrope_ids"], vision["vision_mrope_ids"]), 1)


@torch.no_grad()
def encode_part(vae: ParallelVAE, size: Size, part: int) -> dict[str, Any]:
    """PART scenes of `size` as latents in half precision, with their captions."""
    first = (list(PARTS).index(size) + 1) * 10**6 + part * PART
    scenes = [draw_scene(seed) for seed in range(first, first + PART)]
    latents = [vae.encode(render(scene, *size)[None]).latent_dist.mode() for scene in scenes]
    return {"latents": torch.cat(latents).half(), "captions": [scene.caption for scene in scenes]}


def load_latents(out: Path, pipeline: Cosmos3OmniPipeline, sizes: Iterable[Size]) -> dict[Size, Latents]:
    """All latents of `sizes`, scaled so that every channel of the LARGE latents has mean 0 and deviation 1.

    Mean and deviation before scaling are written into the config of the pipeline's VAE, as in Cosmos3's.
    """
    made = {
        size: [torch.load(out / f"latents_{'x'.join(map(str, size))}_{part}.pt") for part in range(parts)]
        for size, parts in PARTS.items()
        if size in {*sizes, LARGE}
    }
    clips = torch.cat([part["latents"].float().transpose(0, 1).flatten(1) for part in made[LARGE]], 1)
    mean, deviation = clips.mean(1), clips.std(1)
    pipeline.vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())
    sets = {}
    for size, parts in made.items():
        tokens, nothing = [], torch.empty(0)
        for part in parts:
            for caption in part["captions"]:
                own, nothing = tokens_of(pipeline, caption, size)
                tokens.append(own)
        latents = torch.cat([part["latents"] for part in parts]).float()
        latents = (latents - mean.view(-1, 1, 1, 1)) / deviation.view(-1, 1, 1, 1)
        lengths = {len(own) for own in (*tokens, nothing)}
        positions = {length: positions_of(pipeline, length, size) for length in lengths}
        sets[size] = Latents(latents, tokens, nothing, positions)
    return sets


def loss_of(model: Cosmos3OmniTransformer, sets: Mapping[Size, Latents], course: Course, step: int) -> Tensor:
    """The flow-matching loss on one batch, with clips of one size and prompts of one length or without words."""
    rng = random.Random(step)
    _, weights, batch = next(phase for phase in reversed(course.phases) if step >= phase[0])
    data = sets[rng.choices(list(weights), list(weights.values()))[0]]
    batch = batch if data.latents.shape[2] < 5 else min(batch, 16)
    lengths = data.by_length()
    length = rng.choices(list(lengths), [len(clips) for clips in lengths.values()])[0]
    chosen = rng.choices(lengths[length], k=batch)
    x = data.latents[chosen]
    tokens = torch.stack([data.tokens[index] for index in chosen])
    if rng.random() < NO_WORDS:
        tokens = data.nothing.expand(batch, -1)
    # One clip in three begins with a photograph, and one in five with five frames of a clip. These latents are
    # clean.
    clean = 0 if x.shape[2] == 1 else rng.choices((0, 1, 2), (7, 5, 3))[0]
    sigma = torch.sigmoid(torch.randn(batch))
    shift = torch.tensor(course.shifts).repeat(batch)[:batch]
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    noise, level = torch.randn_like(x), sigma.view(-1, 1, 1, 1, 1)
    z = (1 - level) * x + level * noise
    z[:, :, :clean] = x[:, :, :clean]
    found = velocity(model, tokens, data.positions[tokens.shape[1]], z, sigma, clean)
    return F.mse_loss(found[:, :, clean:], (noise - x)[:, :, clean:])


@torch.no_grad()
def sample(
    model: Cosmos3OmniTransformer, tokens: Tensor, nothing: Tensor, positions: Sequence[Tensor], noise: Tensor
) -> Tensor:
    """Latents of prompts of equal length, by Euler steps with guidance. The pipeline's sampler is better."""
    levels = torch.linspace(1, 0, SAMPLE_STEPS + 1)
    levels = SHIFT * levels / (1 + (SHIFT - 1) * levels)
    z = noise
    for now, then in pairwise(levels):
        sigma = now.expand(len(z))
        without = velocity(model, nothing, positions[1], z, sigma)
        z = z + (then - now) * (without + GUIDANCE * (velocity(model, tokens, positions[0], z, sigma) - without))
    return z


@torch.no_grad()
def measure(pipeline: Cosmos3OmniPipeline, vae: ParallelVAE) -> dict[str, float]:
    """For each question, the share of right answers on UNSEEN_PROMPTS prompts of one thing, at the size SMALL."""
    scenes, seed, model = list[Scene](), UNSEEN, pipeline.transformer
    length = None
    while len(scenes) < UNSEEN_PROMPTS:
        scene = draw_scene(seed)
        own, nothing = tokens_of(pipeline, scene.caption, SMALL)
        seed += 1
        if length in (None, len(own)) and len(scene.things) == 1:
            length = len(own)
            scenes.append(scene)
    tokens = torch.stack([tokens_of(pipeline, scene.caption, SMALL)[0] for scene in scenes])
    shape = (len(scenes), 48, 1 + (SMALL[0] - 1) // 4, SMALL[1] // 16, SMALL[2] // 16)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    positions = [positions_of(pipeline, len(words), SMALL) for words in (tokens[0], nothing)]
    z = sample(model, tokens, nothing.expand(len(scenes), -1), positions, noise)
    mean, deviation = (
        torch.tensor(pipeline.vae.config[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std")
    )
    right = dict.fromkeys(QUESTIONS, 0.0)
    for latents, scene in zip(z, scenes, strict=True):
        clip = (vae.decode((latents * deviation + mean)[None]).sample[0].clamp(-1, 1) + 1) / 2
        for question, yes in answers(clip, scene).items():
            right[question] += yes / len(scenes)
    return right
