"""How fast the devices of a group and their links are: what the clock reckons with. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from cosmos3_pipeline.vae.clock import Link, timeline
from cosmos3_pipeline.vae.costs import RooflineCosts
from cosmos3_pipeline.vae.lowering import Repeated
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.program import Program


class ClipSeconds(NamedTuple):
    """Seconds of a clip by the clock, and how many of them the ranks spend on messages that nothing hides."""

    seconds: float
    on_links: float


@dataclass(frozen=True)
class Rates:
    """The device of each rank, and the links between ranks: FLOPs, bytes and seconds.

    latency_s: from the start of a message to its first byte.
    launch_s: of the host, for each kernel. 0 on a CPU.
    ranks_per_node: ranks of one node are connected by links, and ranks of different nodes by the network.
    """

    flops_per_s: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    network_bytes_per_s: float
    latency_s: float
    launch_s: float
    ranks_per_node: int

    def costs(self, program: Program, shape: LatentShape) -> RooflineCosts:
        """The seconds of each op on a clip of `shape`."""
        return RooflineCosts(program, shape, self.flops_per_s, self.memory_bytes_per_s, launch_s=self.launch_s)

    def link(self, source: int, target: int) -> Link:
        """The way from one rank to another."""
        apart = source // self.ranks_per_node != target // self.ranks_per_node
        return Link(self.latency_s, self.network_bytes_per_s if apart else self.link_bytes_per_s)

    def of_clip(self, clip: Repeated) -> ClipSeconds:
        """The seconds of a lowered clip."""
        costs = self.costs(clip.short.program, clip.short.shape)
        alone = clip.total(lambda low: timeline(low, costs).seconds)
        if clip.short.ranks == 1:
            return ClipSeconds(alone, 0.0)
        seconds = clip.total(lambda low: timeline(low, costs, self.link).seconds)
        return ClipSeconds(seconds, max(0.0, seconds - alone))
