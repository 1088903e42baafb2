"""Builds a VAE's program op by op: the ops of its blocks, and the ops between blocks. Imports no torch."""

from __future__ import annotations

from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.vae.ops import (
    Attention,
    AverageDown,
    Conv,
    Duplicates,
    NormSilu,
    Op,
    Patchify,
    ShortcutBegin,
    SpatialDown,
    SpatialUp,
    TensorSpec,
    TimeDown,
    TimeUp,
    Unpatchify,
    Weight,
    conv_weights,
)


class ProgramError(Refusal):
    """A VAE config from which no program can be built."""


class Builder:
    """Appends `ops` while keeping track of the tensor between them (`at`) and of the open shortcuts."""

    def __init__(self, source: TensorSpec) -> None:
        self.at = source
        self.ops: list[Op] = []
        self._open: list[TensorSpec] = []

    def _step(
        self, *, channels: int | None = None, scale: int | None = None, frames: int | None = None
    ) -> TensorSpec:
        at = self.at
        return TensorSpec(channels or at.channels, scale or at.scale, frames or at.frames)

    def _add(self, op: Op) -> None:
        self.ops.append(op)
        self.at = op.target

    def conv(self, name: str, channels: int, kernel: tuple[int, int, int], *, adds_shortcut: bool = False) -> None:
        weights = conv_weights(name, channels, self.at.channels, kernel)
        target = self._step(channels=channels)
        if adds_shortcut:
            self._open.pop()
        self._add(
            Conv(
                name=name,
                source=self.at,
                target=target,
                weights=weights,
                kernel=kernel,
                adds_shortcut=adds_shortcut,
            )
        )

    def norm(self, name: str) -> None:
        gamma = Weight(f"{name}.gamma", (self.at.channels, 1, 1, 1))
        self._add(NormSilu(name=name, source=self.at, target=self.at, weights=(gamma,)))

    def keep(self, name: str, *, channels: int | None = None) -> None:
        """Open a shortcut that keeps the input, or a convolution of it to `channels`."""
        kept = self._step(channels=channels)
        weights = conv_weights(name, channels, self.at.channels, (1, 1, 1)) if channels else ()
        self._open.append(kept)
        self._add(ShortcutBegin(name=name, source=self.at, target=self.at, weights=weights, kept=kept))

    def residual(self, name: str, channels: int) -> None:
        """norm, SiLU, conv, norm, SiLU, conv, and the shortcut around them (`WanResidualBlock`)."""
        self.keep(f"{name}.conv_shortcut", channels=channels if channels != self.at.channels else None)
        self.norm(f"{name}.norm1")
        self.conv(f"{name}.conv1", channels, (3, 3, 3))
        self.norm(f"{name}.norm2")
        self.conv(f"{name}.conv2", channels, (3, 3, 3), adds_shortcut=True)

    def attention(self, name: str) -> None:
        width = self.at.channels
        weights = (
            Weight(f"{name}.norm.gamma", (width, 1, 1)),
            *conv_weights(f"{name}.to_qkv", 3 * width, width, (1, 1)),
            *conv_weights(f"{name}.proj", width, width, (1, 1)),
        )
        self._add(Attention(name=name, source=self.at, target=self.at, weights=weights))

    def mid(self, name: str) -> None:
        self.residual(f"{name}.resnets.0", self.at.channels)
        self.attention(f"{name}.attentions.0")
        self.residual(f"{name}.resnets.1", self.at.channels)

    def up(self, name: str, channels: int, *, doubles_time: bool, duplicates: bool) -> None:
        """Double rows and columns, and frames with `doubles_time`; `duplicates` closes the shortcut around it."""
        width, kept = self.at.channels, self._open.pop() if duplicates else None
        if doubles_time:
            weights = conv_weights(f"{name}.time_conv", 2 * width, width, (3, 1, 1))
            target = self._step(frames=2 * self.at.frames)
            self._add(TimeUp(name=f"{name}.time_conv", source=self.at, target=target, weights=weights))
        weights = conv_weights(f"{name}.resample.1", channels, width, (3, 3))
        target = self._step(channels=channels, scale=2 * self.at.scale)
        self._add(
            SpatialUp(
                name=f"{name}.resample",
                source=self.at,
                target=target,
                weights=weights,
                duplicates=None if kept is None else _duplicates(name, kept, channels, 2 if doubles_time else 1),
            )
        )

    def down(self, name: str, *, halves_time: bool) -> None:
        width = self.at.channels
        weights = conv_weights(f"{name}.resample.1", width, width, (3, 3))
        target = self._step(scale=self.at.scale // 2)
        self._add(SpatialDown(name=f"{name}.resample", source=self.at, target=target, weights=weights))
        if halves_time:
            weights = conv_weights(f"{name}.time_conv", width, width, (3, 1, 1))
            target = self._step(frames=self.at.frames // 2)
            self._add(TimeDown(name=f"{name}.time_conv", source=self.at, target=target, weights=weights))

    def average_down(self, name: str, factor_t: int, factor_s: int) -> None:
        kept, at = self._open.pop(), self.at
        if kept.channels * factor_t * factor_s**2 % at.channels:
            raise ProgramError(
                f"{name} goes from {kept.channels} to {at.channels} channels",
                f"it averages {kept.channels} x {factor_t * factor_s**2} / {at.channels} values, which is not "
                "whole",
                "give base_dim and dim_mult whose widths divide",
            )
        self._add(AverageDown(name=name, source=at, target=at, kept=kept, factor_t=factor_t, factor_s=factor_s))

    def patchify(self, patch: int) -> None:
        target = self._step(channels=self.at.channels * patch**2, scale=self.at.scale // patch)
        self._add(Patchify(name="patchify", source=self.at, target=target, patch=patch))

    def unpatchify(self, patch: int) -> None:
        target = self._step(channels=self.at.channels // patch**2, scale=self.at.scale * patch)
        self._add(Unpatchify(name="unpatchify", source=self.at, target=target, patch=patch))


def _duplicates(name: str, kept: TensorSpec, channels: int, factor_t: int) -> Duplicates:
    """The shortcut around the upsampling `name` to `channels`, which doubles rows and columns."""
    factor = factor_t * 4
    if channels * factor % kept.channels:
        raise ProgramError(
            f"the shortcut around {name} goes from {kept.channels} to {channels} channels",
            f"it copies each channel {channels} x {factor} / {kept.channels} times, which is not whole",
            "give base_dim and dim_mult whose widths divide",
        )
    return Duplicates(kept, factor_t, 2, copies=channels * factor // kept.channels)
