"""The sizes of a clip in pixels, latents and tokens. Every other number of a plan is computed from them.

Source: diffusers `Cosmos3OmniPipeline.prepare_latents` and `_prepare_vision_segment`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cosmos3_pipeline.checkpoint.sound import HOP, SAMPLE_RATE
from cosmos3_pipeline.config.schema import Config, TaskName, TopologyConfig
from cosmos3_pipeline.config.tasks import controls_planned
from cosmos3_pipeline.denoise.cost import Stretch
from cosmos3_pipeline.denoise.shards import Grid
from cosmos3_pipeline.planning.actions import ACTION_TASKS, action_of
from cosmos3_pipeline.planning.chunks import Chunks


@dataclass(frozen=True)
class Clip:
    """A clip in pixels and frames, and the compression and patch size that turn it into latents and tokens."""

    height: int
    width: int
    num_frames: int
    spatial: int
    temporal: int
    patch: int

    @property
    def latent_frames(self) -> int:
        return (self.num_frames - 1) // self.temporal + 1

    @property
    def latent_rows(self) -> int:
        return self.height // self.spatial

    @property
    def latent_cols(self) -> int:
        return self.width // self.spatial

    @property
    def tokens_per_frame(self) -> int:
        """Vision tokens of one latent frame. Patches of the last row and column may be padded."""
        return math.ceil(self.latent_rows / self.patch) * math.ceil(self.latent_cols / self.patch)

    @property
    def vision_tokens(self) -> int:
        return self.latent_frames * self.tokens_per_frame


def clip_of(cfg: Config) -> Clip:
    """The clip that `cfg` asks for, or one chunk of a clip that is made in chunks."""
    return Clip(
        height=cfg.task.height,
        width=cfg.task.width,
        num_frames=chunks_of(cfg).frames,
        spatial=cfg.model.vae.scale_factor_spatial,
        temporal=cfg.model.vae.scale_factor_temporal,
        patch=cfg.model.transformer.latent_patch_size,
    )


def clean_frames(condition_latent_frames: list[int], latent_frames: int) -> list[int]:
    """The conditioning frames as indices from 0. A negative index counts from the end of `latent_frames`."""
    return [frame + latent_frames if frame < 0 else frame for frame in condition_latent_frames]


def encoded_of(cfg: Config) -> Clip:
    """The clip that the VAE encodes: frames up to the last conditioned latent frame, or a whole control clip.

    The picture of a task with actions is padded to a canvas before it is encoded. The padding is cut off the
    latents.
    """
    clip, action = clip_of(cfg), action_of(cfg.task)
    if cfg.task.name is TaskName.transfer:
        return clip
    height, width = (clip.height, clip.width) if action is None or action.canvas is None else action.canvas
    frames = max(clean_frames(cfg.task.condition_latent_frames, clip.latent_frames)) * clip.temporal + 1
    return replace(clip, height=height, width=width, num_frames=frames)


def chunks_of(cfg: Config) -> Chunks:
    """The chunks of the clip: as many as needed for transfer and forward dynamics, one for other tasks.

    If the number of frames is not known yet, one chunk is planned.
    """
    task = cfg.task
    frames = task.num_frames or task.num_video_frames_per_chunk or 1
    if (action := action_of(task)) is not None and not action.predicts:
        return Chunks(frames, action.chunk_size + 1, overlap=1, given=1, passed="uint8")
    if task.name is not TaskName.transfer:
        return Chunks(frames, frames, overlap=0, given=0)
    return Chunks.of(
        frames,
        at_most=task.num_video_frames_per_chunk or frames,  # the check refuses null, but calls this first
        overlap=task.num_conditional_frames or 0,
        given=task.num_first_chunk_conditional_frames or 0,
        temporal=cfg.model.vae.scale_factor_temporal,
    )


def stretches_of(cfg: Config, chunk: int = 0) -> tuple[Stretch, ...]:
    """The generation pathway's sequence: the controls, the clip, then sound and actions."""
    clip = clip_of(cfg)
    channels = cfg.model.vae.z_dim * cfg.model.transformer.latent_patch_size**2
    clean = frozenset(clean_frames(cfg.task.condition_latent_frames, clip.latent_frames))
    if cfg.task.name is TaskName.transfer:
        clean = frozenset(range(chunks_of(cfg).clean_latents(chunk, clip.temporal)))
    target = Stretch("vision", channels, clip.latent_frames, clip.tokens_per_frame, clean)
    found = [replace(target, clean=frozenset(range(target.frames)))] * controls_planned(cfg.task) + [target]
    if cfg.task.sound:
        assert cfg.model.transformer.sound_dim is not None
        found.append(Stretch("sound", cfg.model.transformer.sound_dim, sound_frames(cfg)))
    if (action := action_of(cfg.task)) is not None:
        given = frozenset() if action.predicts else frozenset(range(action.chunk_size))
        found.append(Stretch("action", cfg.model.transformer.action_dim, action.chunk_size, clean=given))
    return tuple(found)


def sound_frames(cfg: Config) -> int:
    """Latent frames of a sound as long as the clip; each is a token. Source: `Cosmos3SoundPrepareLatentsStep`."""
    samples = int(clip_of(cfg).num_frames / cfg.task.fps * SAMPLE_RATE)
    return -(-samples // HOP)


def tokens_beside(cfg: Config) -> dict[str, int]:
    """How many tokens the sequence has beside the clip's, by name: `control`, `sound`, `action`."""
    vision = [one for one in stretches_of(cfg) if one.modality == "vision"]
    controls = sum(one.tokens for one in vision[:-1])
    found = {"control": controls} if controls else {}
    return found | {one.modality: one.tokens for one in stretches_of(cfg) if one.modality != "vision"}


def modalities_of(cfg: Config) -> frozenset[str]:
    """The modalities of the sequence: vision, and sound or action if the task has them.

    They are those of an unchecked config, too, such as one with sound for a model that has no head for it.
    """
    asked = {"vision": True, "sound": cfg.task.sound, "action": cfg.task.name in ACTION_TASKS}
    return frozenset(modality for modality, wanted in asked.items() if wanted)


def nearest_multiple(value: int, step: int) -> int:
    """The multiple of `step` nearest to `value`, at least one `step`."""
    return max(round(value / step), 1) * step


def grid_of(topology: TopologyConfig) -> Grid:
    """How the ranks of `topology` share a sequence."""
    rows, columns = topology.cp
    return Grid(topology.ulysses, rows, columns)


def replica_ranks(topology: TopologyConfig) -> int:
    """How many ranks work on one clip together: all ranks, divided by the `topology.dp` replicas."""
    return topology.nodes * topology.ranks_per_node // topology.dp
