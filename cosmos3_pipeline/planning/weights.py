"""The placement of the transformer's weights: the bytes that a rank holds, copies and gathers in each stage."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from cosmos3_pipeline.checkpoint.weights import Part, Slab
from cosmos3_pipeline.config.schema import Config, Placement
from cosmos3_pipeline.denoise.cost import Wire
from cosmos3_pipeline.planning.geometry import replica_ranks
from cosmos3_pipeline.planning.transformer import TransformerSize

# Layers on the device at once while layers are streamed or gathered: the one that computes, and the next.
PASSING = 2


@dataclass(frozen=True)
class WeightsPlan:
    """The placement that a plan has chosen; `placement` is never `auto`.

    resident_layers: layers of the generation pathway that stay on the device while the others are streamed.
    keep_text: whether the text pathway stays on the device.
    stays: whether the generation pathway stays while the VAE decodes, for the next prompt or chunk.
    chosen: the reason, if `auto` chose.
    """

    placement: Placement
    resident_layers: int
    keep_text: bool
    stays: bool
    chosen: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "placement": self.placement.value}


RESIDENT = WeightsPlan(Placement.resident, resident_layers=0, keep_text=False, stays=False)


@dataclass(frozen=True)
class WeightsCost:
    """The weights that a rank holds, copies and gathers, in bytes.

    text_bytes, vision_bytes: held during the text stage, and during denoising.
    host_bytes: wait in the memory of an accelerator's host.
    text_read: copied to the device for the text stage.
    copied: copied from the host each time that denoising goes through the layers.
    gathered: sent to the other ranks each time that denoising goes through the layers.
    gathered_ahead: sent once more, because the last step also prefetches the first layer.
    """

    text_bytes: int
    vision_bytes: int
    host_bytes: int
    text_read: int
    copied: int
    gathered: Wire
    gathered_ahead: Wire

    @classmethod
    def of(
        cls,
        plan: WeightsPlan,
        size: TransformerSize,
        *,
        modalities: Collection[str],
        ranks: int,
        element_bytes: int,
        on_cpu: bool,
    ) -> WeightsCost:
        """The cost of one rank in a replica of `ranks`, which denoises `modalities`."""
        text, vision = size.slabs(Part.TEXT), size.slabs(Part.VISION)
        text_read = sum(slab.elements for slab in text) * element_bytes
        held = passing(text, 1) * element_bytes
        outside = size.outside_bytes(element_bytes, modalities)
        copied, host, gathered, ahead = 0, 0, Wire(), Wire()
        if plan.placement is Placement.sharded:
            shares = [slab.share(ranks) * element_bytes for slab in vision]
            layers = sum(shares) + passing(vision, ranks) * element_bytes
            gathered = Wire(sum(shares) * (ranks - 1), len(shares) * (ranks - 1))
            ahead = Wire(shares[0] * (ranks - 1), ranks - 1) if len(shares) > 1 else Wire()
        elif plan.placement is Placement.streamed and plan.resident_layers < len(vision) - 1:
            each = vision[0].elements * element_bytes  # all layers of this pathway are alike
            moving = len(vision) - plan.resident_layers
            layers = plan.resident_layers * each + PASSING * each
            copied = moving * each
            host = 0 if on_cpu else moving * _pinned(each)
        else:
            layers = sum(slab.elements for slab in vision) * element_bytes
        return cls(
            text_bytes=text_read if plan.keep_text else held,
            vision_bytes=outside + layers + (text_read if plan.keep_text else 0),
            host_bytes=host,
            text_read=text_read,
            copied=copied,
            gathered=gathered,
            gathered_ahead=ahead,
        )


def _pinned(nbytes: int) -> int:
    """Host bytes of pinned memory for `nbytes`. PyTorch's allocator rounds up to a power of two."""
    return 1 << (nbytes - 1).bit_length()


def passing(slabs: tuple[Slab, ...], ranks: int) -> int:
    """Elements of the layers that are on the device at once while all layers are streamed or gathered."""
    return min(PASSING, len(slabs)) * max(slab.share(ranks) * ranks for slab in slabs)


def choices(cfg: Config) -> list[WeightsPlan]:
    """The placements from which `weights=auto` chooses, fastest first, or the one that is asked for.

    `resident_layers` -1 means as many as fit.
    """
    asked = cfg.weights
    layers = -1 if asked.resident_layers is None else asked.resident_layers
    placements = [asked.placement]
    if asked.placement is Placement.auto:
        placements = [Placement.resident, Placement.streamed]
        if replica_ranks(cfg.topology) > 1:
            placements.insert(1, Placement.sharded)
    return [
        WeightsPlan(
            placement=placement,
            resident_layers=layers if placement is Placement.streamed else 0,
            keep_text=asked.keep_text,
            stays=False,
        )
        for placement in placements
    ]
