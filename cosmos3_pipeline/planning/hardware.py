"""Speed and memory of one rank's device: `topology.accelerator` in bytes, FLOP/s and seconds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cosmos3_pipeline.config.schema import Config, Device, Dtype
from cosmos3_pipeline.vae.rates import Rates

GIGA, TERA, MICRO = 1e9, 1e12, 1e-6


@dataclass(frozen=True)
class Accelerator:
    """The device of one rank: bytes, FLOP/s, bytes/s, seconds.

    `overhead_s` is the time of a run outside its stages. `efficiency` is the share of the peak FLOP/s that each
    kind of model (`transformer`, `vae`) reaches.
    """

    name: str
    memory_bytes: float
    flops_per_s: dict[Dtype, float]
    memory_bytes_per_s: float
    link_bytes_per_s: float
    network_bytes_per_s: float
    host_bytes_per_s: float
    latency_s: float
    launch_s: float
    overhead_s: float
    efficiency: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "flops_per_s": {dtype.value: rate for dtype, rate in self.flops_per_s.items()}}

    def wire_seconds(self, sent_bytes: float, messages: float, *, crosses_nodes: bool) -> float:
        """Seconds for one rank to send `sent_bytes` in `messages` while it does nothing else."""
        rate = self.network_bytes_per_s if crosses_nodes else self.link_bytes_per_s
        return sent_bytes / rate + messages * self.latency_s


def accelerator_of(cfg: Config) -> Accelerator:
    """The accelerator of one rank of `cfg`. On cpu the ranks of a node share its memory and bandwidth."""
    node, on_cpu = cfg.topology.accelerator, cfg.topology.device == Device.cpu
    sharing = cfg.topology.ranks_per_node if on_cpu else 1
    threads = cfg.topology.threads_per_rank if on_cpu else 1
    return Accelerator(
        name=node.name,
        memory_bytes=node.memory_gb * GIGA / sharing,
        flops_per_s={
            Dtype.bfloat16: node.bf16_tflops * TERA * threads,
            Dtype.float32: node.fp32_tflops * TERA * threads,
        },
        memory_bytes_per_s=node.memory_gb_per_s * GIGA / sharing,
        link_bytes_per_s=node.link_gb_per_s * GIGA,
        network_bytes_per_s=node.network_gb_per_s * GIGA,
        host_bytes_per_s=node.host_gb_per_s * GIGA / sharing,
        overhead_s=node.overhead_s,
        latency_s=node.latency_us * MICRO,
        launch_s=node.launch_us * MICRO,
        efficiency={"transformer": node.transformer_efficiency, "vae": node.vae_efficiency},
    )


def vae_rates(cfg: Config) -> Rates:
    """The rates of one rank of `cfg` at the VAE."""
    accelerator = accelerator_of(cfg)
    return Rates(
        flops_per_s=accelerator.flops_per_s[cfg.model.vae_dtype] * accelerator.efficiency["vae"],
        memory_bytes_per_s=accelerator.memory_bytes_per_s,
        link_bytes_per_s=accelerator.link_bytes_per_s,
        network_bytes_per_s=accelerator.network_bytes_per_s,
        latency_s=accelerator.latency_s,
        launch_s=accelerator.launch_s,
        ranks_per_node=cfg.topology.ranks_per_node,
    )
