"""The toy's transformer: diffusers' `Cosmos3OmniTransformer`, narrow, trained by flow matching on latents."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection, Mapping, Sequence
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
from sound import SOUND
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
STATISTICS = "statistics.json"
ENCODED = 4  # clips that the VAE encodes at once
PARTS = {TINY: 60, SMALL: 40, LARGE: 40, IMAGE: 40}


@dataclass(frozen=True)
class Course:
    """The data that the steps of a training see."""

    steps: int
    # For each phase: its first step, the relative number of batches of each size, and the clips in a batch.
    phases: tuple[tuple[int, Mapping[Size, int], int], ...]
    shifts: tuple[float, ...]  # shifts of the noise levels; the clips of a batch take them in turn

    @property
    def parts(self) -> dict[Size, int]:
        """The number of parts of the latents of each size."""
        sizes = {size for _, weights, _ in self.phases for size in weights}
        return {size: parts for size, parts in PARTS.items() if size in sizes}


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


def by_length(tokens: Sequence[Tensor]) -> dict[int, list[int]]:
    """Prompts grouped by the number of their tokens. A batch is taken from one group."""
    found: dict[int, list[int]] = {}
    for index, own in enumerate(tokens):
        found.setdefault(len(own), []).append(index)
    return found


def make_transformer(*, sound: bool = False) -> Cosmos3OmniTransformer:
    """The transformer with random weights. The first parts of the training have no sound."""
    torch.manual_seed(0)
    model = Cosmos3OmniTransformer(**DIMENSIONS, **LATENT, **(SOUND if sound else {}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.02 if "embed" in name else parameter.shape[1] ** -0.5)
            if name.endswith(("to_out.weight", "to_add_out.weight", "down_proj.weight", "proj_out.weight")):
                parameter.mul_(0.1)
    return model


def velocity(
    model: Cosmos3OmniTransformer,
    tokens: Tensor,
    positions: Tensor,
    z: Tensor,
    sigma: Tensor,
    clean: Collection[int] = (),
    *,
    control: Tensor | None = None,
    sound: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The velocity, noise minus clip, as diffusers' forward computes it for one clip, for each clip of a batch.

    tokens [B, n], positions [3, all tokens], z [B, 48, T, h, w], sigma [B]. The latent frames `clean` of z are the
    condition. `control`, clean latents of the same shape, is in front of z, and `sound` [B, 4, t] behind it. The
    second velocity is that of the sound. `test_train_toy` compares with diffusers.
    """
    n, shape = tokens.shape[1], z.shape
    text = model.embed_tokens(tokens)
    level = model.time_embedder(model.time_proj(1000 * sigma * model.config.timestep_scale))[:, None]
    noisy = torch.ones(shape[2])
    noisy[list(clean)] = 0
    rows = noisy.repeat_interleave(shape[3] * shape[4])
    parts = [model.proj_in(z.flatten(2).transpose(1, 2)) + rows[None, :, None] * level]
    if control is not None:
        parts.insert(0, model.proj_in(control.flatten(2).transpose(1, 2)))
    if sound is not None:
        parts.append(model.audio_proj_in(sound.transpose(1, 2)) + model.audio_modality_embed + level)
    made = torch.cat(parts, 1)
    cos, sin = model.rotary_emb(position_ids=positions[:, None], device=z.device, dtype=z.dtype)
    for index, layer in enumerate(model.layers):
        und, gen = Pathway.understanding(layer), Pathway.generation(layer)
        q, k, v = und.project(text, model.config.head_dim)
        k = rotate(und.key_norm(k), cos[:, :n], sin[:, :n])
        if index < len(model.layers) - 1:  # the last layer's text output is never read
            q = rotate(und.query_norm(q), cos[:, :n], sin[:, :n])
            text = finish(und, text, attend(q, k, v, causal=True))
        gq, gk, gv = gen.project(made, model.config.head_dim)
        gq = rotate(gen.query_norm(gq), cos[:, n:], sin[:, n:])
        gk = rotate(gen.key_norm(gk), cos[:, n:], sin[:, n:])
        made = finish(gen, made, attend(gq, torch.cat((k, gk), 1), torch.cat((v, gv), 1), causal=False))
    made = model.norm_moe_gen(made)
    begin = 0 if control is None else len(rows)
    found = model.proj_out(made[:, begin : begin + len(rows)]).transpose(1, 2).reshape(shape)
    heard = None if sound is None else model.audio_proj_out(made[:, begin + len(rows) :]).transpose(1, 2)
    return found * noisy[None, None, :, None, None], heard


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


def positions_of(
    pipeline: Cosmos3OmniPipeline, tokens: int, size: Size, *, control: bool = False, sound: int = 0
) -> Tensor:
    """Positions of text and vision, as the pipeline packs them, with a control clip or latent frames of sound."""
    frames, height, width = size
    text = pipeline._prepare_text_segment([0] * tokens, "cpu")
    packed = {"mrope_offset": text["vision_start_temporal_offset"], "curr": tokens, "device": "cpu"}
    clip = torch.empty(1, 1, 1 + (frames - 1) // 4, height // 16, width // 16)
    vision = pipeline._prepare_vision_segment(clip, has_image_condition=False, vision_fps=float(FPS), **packed)
    found = [text["text_mrope_ids"], vision["vision_mrope_ids"]]
    if control:
        found.append(vision["vision_mrope_ids"])
    if sound:
        rate = float(SOUND["sound_latent_fps"])
        heard = pipeline._prepare_sound_segment(torch.empty(1, sound), sound_fps=rate, **packed)
        found.append(heard["sound_mrope_ids"])
    return torch.cat(found, 1)


def scenes_of(size: Size, part: int) -> list[Scene]:
    """The scenes of a part of the latents of `size`."""
    first = (list(PARTS).index(size) + 1) * 10**6 + part * PART
    return [draw_scene(seed) for seed in range(first, first + PART)]


@torch.no_grad()
def encode_part(
    vae: ParallelVAE, size: Size, part: int, draw: Callable[..., Tensor] = render, frames: slice = slice(None)
) -> dict[str, Any]:
    """PART scenes of `size`, drawn by `draw`, as latents in half precision, with their captions.

    Of each clip the latent frames `frames` are kept.
    """
    scenes = scenes_of(size, part)
    clips = torch.stack([draw(scene, *size) for scene in scenes])
    latents = [vae.encode(few).latent_dist.mode()[:, :, frames].half() for few in clips.split(ENCODED)]
    return {"latents": torch.cat(latents), "captions": [scene.caption for scene in scenes]}


def statistics(out: Path) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel of the LARGE latents, [48, 1, 1, 1]: from a file, or computed once."""
    file = out / STATISTICS
    if not file.exists():
        made = [load_part(out, "latents", LARGE, part)["latents"].float() for part in range(PARTS[LARGE])]
        clips = torch.cat(made).transpose(0, 1).flatten(1)
        found = {"latents_mean": clips.mean(1).tolist(), "latents_std": clips.std(1).tolist()}
        file.write_text(json.dumps(found), encoding="utf-8")
    found = json.loads(file.read_text(encoding="utf-8"))
    mean, deviation = (torch.tensor(found[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return mean, deviation


def part_file(out: Path, kind: str, size: Size, part: int) -> Path:
    return out / f"{kind}_{'x'.join(map(str, size))}_{part}.pt"


def load_part(out: Path, kind: str, size: Size, part: int) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(part_file(out, kind, size, part))
    return found


def scaled_latents(out: Path, kind: str, size: Size, parts: int) -> Tensor:
    """The first parts of `kind`, scaled so that every channel of the LARGE clips has mean 0 and deviation 1."""
    mean, deviation = statistics(out)
    latents = torch.cat([load_part(out, kind, size, part)["latents"] for part in range(parts)]).float()
    return (latents - mean) / deviation


def load_latents(out: Path, pipeline: Cosmos3OmniPipeline, parts: Mapping[Size, int]) -> dict[Size, Latents]:
    """The latents of so many parts of each size, scaled.

    Mean and deviation before scaling are written into the config of the pipeline's VAE, as in Cosmos3's.
    """
    mean, deviation = (values.flatten().tolist() for values in statistics(out))
    pipeline.vae.register_to_config(latents_mean=mean, latents_std=deviation)
    sets = {}
    for size, count in parts.items():
        tokens, nothing = [], torch.empty(0)
        for part in range(count):
            for caption in load_part(out, "latents", size, part)["captions"]:
                own, nothing = tokens_of(pipeline, caption, size)
                tokens.append(own)
        lengths = {len(own) for own in (*tokens, nothing)}
        positions = {length: positions_of(pipeline, length, size) for length in lengths}
        sets[size] = Latents(scaled_latents(out, "latents", size, count), tokens, nothing, positions)
    return sets


def loss_of(model: Cosmos3OmniTransformer, sets: Mapping[Size, Latents], course: Course, step: int) -> Tensor:
    """The flow-matching loss on one batch, with clips of one size and prompts of one length or without words."""
    rng = random.Random(step)
    _, weights, batch = next(phase for phase in reversed(course.phases) if step >= phase[0])
    data = sets[rng.choices(list(weights), list(weights.values()))[0]]
    batch = batch if data.latents.shape[2] < 5 else min(batch, 16)
    lengths = by_length(data.tokens)
    length = rng.choices(list(lengths), [len(clips) for clips in lengths.values()])[0]
    chosen = rng.choices(lengths[length], k=batch)
    x = data.latents[chosen]
    tokens = torch.stack([data.tokens[index] for index in chosen])
    if rng.random() < NO_WORDS:
        tokens = data.nothing.expand(batch, -1)
    # One clip in three begins with a photograph, and one in five with five frames of a clip. These latents are
    # clean.
    clean = 0 if x.shape[2] == 1 else rng.choices((0, 1, 2), (7, 5, 3))[0]
    found, noise, _ = noised(x, course.shifts, range(clean))
    predicted, _ = velocity(model, tokens, data.positions[tokens.shape[1]], *found, range(clean))
    return F.mse_loss(predicted[:, :, clean:], (noise - x)[:, :, clean:])


def noised(
    x: Tensor, shifts: Sequence[float], clean: Collection[int], sound: Tensor | None = None
) -> tuple[tuple[Tensor, Tensor], Tensor, tuple[Tensor, Tensor] | None]:
    """The clips `x` at random noise levels, and the noise: (z, sigma), noise, and the same sound with its noise.

    The latent frames `clean` stay.
    """
    batch = len(x)
    sigma = torch.sigmoid(torch.randn(batch))
    shift = torch.tensor(shifts).repeat(batch)[:batch]
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    noise, level = torch.randn_like(x), sigma.view(-1, 1, 1, 1, 1)
    z = (1 - level) * x + level * noise
    z[:, :, list(clean)] = x[:, :, list(clean)]
    if sound is None:
        return (z, sigma), noise, None
    hiss = torch.randn_like(sound)
    return (z, sigma), noise, ((1 - level[..., 0, 0]) * sound + level[..., 0, 0] * hiss, hiss)


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
        without, _ = velocity(model, nothing, positions[1], z, sigma)
        words, _ = velocity(model, tokens, positions[0], z, sigma)
        z = z + (then - now) * (without + GUIDANCE * (words - without))
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
