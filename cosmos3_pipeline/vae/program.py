"""The Wan VAE as a flat list of ops, built only from a config: one program, many schedules.

A strategy is a schedule of these ops over ranks. It cuts the list (each rank has a run of ops), or the picture
(each rank has a slab of rows), or both. Because ops open and close shortcuts, a cut may be inside a residual
block. `Program.carried` says which tensors cross the cut.

Follows `diffusers.AutoencoderKLWan` 0.42: Wan2.1 and the residual Wan2.2 layout. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from cosmos3_pipeline.vae.builder import Builder, ProgramError
from cosmos3_pipeline.vae.ops import LatentShape, Op, Shape, TensorSpec, TimeUp, Weight

Direction = Literal["decode", "encode"]

# After the first frame, diffusers gives the encoder this many picture frames at once.
ENCODE_CHUNK = 4

# Frames of one portion of a later chunk, in the ops after the last doubling of frames, which have most of the
# arithmetic and the largest activations. It is half of the VAEs' four frames there. Portions of one frame would
# take longer, because each convolution copies its two kept frames for every portion.
_PORTION = 2


@dataclass(frozen=True)
class Program:
    """The ops of one direction, with facts that do not depend on the clip.

    z_dim: latent channels.
    picture_channels: 3 for RGB.
    patch: pixels per side that patchify folds into channels.
    spatial: pixels per latent row.
    temporal: picture frames per latent frame after the first.
    latents_per_chunk: latent frames of a later chunk.
    portions_from, portions: a later chunk runs through the ops from `portions_from` on in `portions` equal
    portions, one after the other. Portions need less memory, and the next rank waits for a portion instead of a
    chunk.
    """

    direction: Direction
    ops: tuple[Op, ...]
    z_dim: int
    picture_channels: int
    patch: int
    spatial: int
    temporal: int
    latents_per_chunk: int
    portions_from: int
    portions: int

    def __len__(self) -> int:
        return len(self.ops)

    def chunks(self, latent: LatentShape) -> int:
        """The number of chunks of a clip of `latent.frames` latent frames: one of one frame, then equal chunks."""
        later = latent.frames - 1
        if later % self.latents_per_chunk:
            raise ProgramError(
                f"{latent.frames} latent frames are not 1 + k x {self.latents_per_chunk}",
                f"the encoder takes {ENCODE_CHUNK} picture frames at once, which are {self.latents_per_chunk} "
                "latent frames",
                f"give {latent.frames - later % self.latents_per_chunk} latent frames",
            )
        return 1 + later // self.latents_per_chunk

    def picture_frames(self, latent_frames: int) -> int:
        """The number of picture frames that `latent_frames` latent frames decode to."""
        return 1 + (latent_frames - 1) * self.temporal

    def flops(self, latent: LatentShape, start: int = 0, stop: int | None = None) -> int:
        """FLOPs of the ops [start, stop) over the whole clip, with those of dropped outputs."""

        def of_chunk(first: bool) -> int:
            ops = self.ops[start:stop]
            return sum(op.flops(latent, first=first) + op.dropped_flops(latent, first=first) for op in ops)

        later = self.chunks(latent) - 1
        return of_chunk(True) + (later and later * of_chunk(False))

    def weight_elements(self, start: int = 0, stop: int | None = None) -> int:
        """Elements of the weights of the ops [start, stop)."""
        return sum(op.weight_elements for op in self.ops[start:stop])

    def weights(self, start: int = 0, stop: int | None = None) -> tuple[Weight, ...]:
        """The weights of the ops [start, stop), in program order."""
        return tuple(w for op in self.ops[start:stop] for w in op.weights)

    @cached_property
    def _open(self) -> tuple[tuple[tuple[int, TensorSpec], ...], ...]:
        """For each cut the open shortcuts, oldest first: (op that made the shortcut's tensor, its spec)."""
        at: list[tuple[tuple[int, TensorSpec], ...]] = []
        shortcuts: list[tuple[int, TensorSpec]] = []
        made = -1  # the op that made the activation
        for number, op in enumerate(self.ops):
            at.append(tuple(shortcuts))
            if op.opens is not None:
                shortcuts.append((number if op.weights else made, op.opens))
            else:
                made = number
            if op.closes:
                shortcuts.pop()
        return (*at, ())

    @cached_property
    def _carried(self) -> tuple[tuple[TensorSpec, ...], ...]:
        activations = [*(op.source for op in self.ops), self.ops[-1].target]
        return tuple((at, *dict(open_).values()) for at, open_ in zip(activations, self._open, strict=True))

    def carried(self, cut: int) -> tuple[TensorSpec, ...]:
        """The tensors that cross the cut before op `cut`: the activation, then the open shortcuts, oldest first.

        A tensor that two shortcuts share is listed once; see `shortcuts`.
        """
        return self._carried[cut]

    def shortcuts(self, cut: int) -> tuple[int, ...]:
        """For each shortcut open at `cut`, oldest first, the index of its tensor in `carried(cut)[1:]`."""
        made = [number for number, _ in self._open[cut]]
        distinct = list(dict.fromkeys(made))
        return tuple(map(distinct.index, made))

    def portions_at(self, cut: int, *, first: bool) -> int:
        """In how many portions one chunk crosses the cut before op `cut`."""
        return 1 if first or cut <= self.portions_from else self.portions

    def kept_shape(self, number: int, latent: LatentShape) -> Shape:
        """[B, T, H, W, C] of the frames that op `number`, one of `keeping`, keeps from one chunk for the next."""
        op = self.ops[number]
        b, _, h, w, c = op.source.shape(latent, first=False)
        return b, op.cached_frames, h, w, c

    def may_be_cut(self, number: int) -> bool:
        """Whether a cut before op `number` is useful. Cuts that differ only by ops of nearly no cost are left out.

        Between two neighbouring useful cuts there is at most one op that keeps frames.
        """
        scales = [op.source.scale != op.target.scale for op in self.ops[number - 1 : number + 1]]
        return bool(self.ops[number].cached_frames) or any(scales)

    def chunks_kept(self, number: int) -> int:
        """How many past chunks the temporal cache of op `number` covers."""
        op = self.ops[number]
        return -(-op.cached_frames // op.source.frames)

    def keeping(self, start: int, stop: int) -> list[int]:
        """The numbers of the ops in [start, stop) that keep frames from one chunk for the next."""
        return [number for number in range(start, stop) if self.ops[number].cached_frames]


def decoder_program(config: Mapping[str, Any]) -> Program:
    """The decoder's ops: post_quant_conv, decoder, unpatchify and clamp.

    `config` has the names and values of `AutoencoderKLWan.config`. Raises ProgramError.
    """
    c = _Config(config)
    build = Builder(TensorSpec(c.z_dim, 1, 1))
    build.conv("post_quant_conv", c.z_dim, (1, 1, 1))
    widths = [c.decoder_base_dim * m for m in (c.dim_mult[-1], *reversed(c.dim_mult))]
    build.conv("decoder.conv_in", widths[0], (3, 3, 3))
    build.mid("decoder.mid_block")
    doublings = c.temporal_steps("decode")
    for i, width in enumerate(widths[1:]):
        block = f"decoder.up_blocks.{i}"
        up = i < len(doublings)
        ft = 2 if up and doublings[i] else 1
        shortcut = c.is_residual and up
        if shortcut:
            build.keep(f"{block}.avg_shortcut")
        for j in range(c.num_res_blocks + 1):
            build.residual(f"{block}.resnets.{j}", width)
        if up:
            resample = f"{block}.upsampler" if c.is_residual else f"{block}.upsamplers.0"
            build.up(resample, width if c.is_residual else width // 2, doubles_time=ft == 2, duplicates=shortcut)
    build.norm("decoder.norm_out")
    build.conv("decoder.conv_out", c.out_channels, (3, 3, 3))
    build.unpatchify(c.patch)
    return c.program("decode", build.ops)


def encoder_program(config: Mapping[str, Any]) -> Program:
    """The encoder's ops: patchify, encoder and quant_conv, which computes the moments (mean and log-variance).

    `config` has the names and values of `AutoencoderKLWan.config`. Raises ProgramError.
    """
    c = _Config(config)
    steps = c.temporal_steps("encode")
    halvings = sum(steps)
    if ENCODE_CHUNK % 2**halvings:
        raise ProgramError(
            f"temperal_downsample={list(steps)} halves the frames {halvings} times",
            f"the encoder takes {ENCODE_CHUNK} frames at once, which do not divide by {2**halvings}",
            "two halvings at most work",
        )
    build = Builder(TensorSpec(c.picture_channels("encode"), c.spatial, ENCODE_CHUNK))
    build.patchify(c.patch)
    build.conv("encoder.conv_in", c.base_dim, (3, 3, 3))
    block = 0
    scale = 1.0
    for i, mult in enumerate(c.dim_mult):
        width = c.base_dim * mult
        down = i < len(steps)
        ft = 2 if down and steps[i] else 1
        if c.is_residual:
            name = f"encoder.down_blocks.{i}"
            build.keep(f"{name}.avg_shortcut")
            for j in range(c.num_res_blocks):
                build.residual(f"{name}.resnets.{j}", width)
            if down:
                build.down(f"{name}.downsampler", halves_time=ft == 2)
            build.average_down(f"{name}.avg_shortcut", ft, 2 if down else 1)
            continue
        for _ in range(c.num_res_blocks):
            build.residual(f"encoder.down_blocks.{block}", width)
            block += 1
            if scale in c.attn_scales:
                build.attention(f"encoder.down_blocks.{block}")
                block += 1
        if down:
            build.down(f"encoder.down_blocks.{block}", halves_time=ft == 2)
            block += 1
            scale /= 2
    build.mid("encoder.mid_block")
    build.norm("encoder.norm_out")
    build.conv("encoder.conv_out", 2 * c.z_dim, (3, 3, 3))
    build.conv("quant_conv", 2 * c.z_dim, (1, 1, 1))
    return c.program("encode", build.ops)


def program_for(direction: Direction, config: Mapping[str, Any]) -> Program:
    """`decoder_program` or `encoder_program`."""
    return decoder_program(config) if direction == "decode" else encoder_program(config)


class _Config:
    """The values of a VAE config that decide the program, checked against each other."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.z_dim = int(config["z_dim"])
        self.base_dim = int(config["base_dim"])
        self.decoder_base_dim = int(config.get("decoder_base_dim") or self.base_dim)
        self.dim_mult = tuple(int(m) for m in config["dim_mult"])
        self.num_res_blocks = int(config["num_res_blocks"])
        self.attn_scales: Sequence[float] = tuple(config.get("attn_scales") or ())
        self.is_residual = bool(config.get("is_residual", False))
        self.in_channels = int(config.get("in_channels", 3))
        self.out_channels = int(config.get("out_channels", 3))
        self.patch = int(config.get("patch_size") or 1)
        steps = tuple(bool(t) for t in config["temperal_downsample"])
        resamples = len(self.dim_mult) - 1
        if len(steps) < resamples:
            raise ProgramError(
                f"temperal_downsample={list(steps)} for dim_mult={list(self.dim_mult)}",
                f"{len(self.dim_mult)} levels have {resamples} resamplings between them",
                "give one entry for each",
            )
        # The encoder reads the list from its start and the decoder from its end, as diffusers does.
        self._steps = {"encode": steps[:resamples], "decode": tuple(reversed(steps))[:resamples]}

    def picture_channels(self, direction: Direction) -> int:
        """Channels of the picture that the encoder takes or the decoder makes. Raises ProgramError."""
        # Each direction checks only its own channels, because a VAE that only decodes (Bria Fibo) may have an
        # encoder that fits no picture.
        name = "in_channels" if direction == "encode" else "out_channels"
        channels = self.in_channels if direction == "encode" else self.out_channels
        if channels % self.patch**2:
            raise ProgramError(
                f"{name}={channels} with patch_size={self.patch}",
                f"a patch folds {self.patch}^2 pixels into channels",
                f"give a multiple of {self.patch**2}",
            )
        return channels // self.patch**2

    def temporal_steps(self, direction: Direction) -> tuple[bool, ...]:
        """For each resampling in the order of the ops: whether it also doubles or halves the frames."""
        return self._steps[direction]

    @property
    def spatial(self) -> int:
        return self.patch << (len(self.dim_mult) - 1)

    def program(self, direction: Direction, ops: Sequence[Op]) -> Program:
        temporal = 2 ** sum(self.temporal_steps(direction))
        portions_from, portions = _portions(ops) if direction == "decode" else (len(ops), 1)
        return Program(
            direction=direction,
            ops=tuple(ops),
            z_dim=self.z_dim,
            picture_channels=self.picture_channels(direction),
            patch=self.patch,
            spatial=self.spatial,
            temporal=temporal,
            latents_per_chunk=1 if direction == "decode" else ENCODE_CHUNK // temporal,
            portions_from=portions_from,
            portions=portions,
        )


def _portions(ops: Sequence[Op]) -> tuple[int, int]:
    """The first op of a decoder that processes a later chunk in portions, and the number of portions.

    It is the first op after the last doubling of frames at which no open shortcut needs the undivided chunk.
    """
    doublings = [index for index, op in enumerate(ops) if isinstance(op, TimeUp)]
    start = doublings[-1] + 1 if doublings else 0
    while sum(op.opens is not None for op in ops[:start]) > sum(op.closes for op in ops[:start]):
        start += 1
    frames = ops[-1].target.frames
    return (start, frames // _PORTION) if frames > _PORTION and frames % _PORTION == 0 else (len(ops), 1)
