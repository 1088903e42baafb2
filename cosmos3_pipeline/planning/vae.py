"""The encoding and decoding stages of a plan: what a strategy says that each rank does, and its time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from cosmos3_pipeline.config.plain import plain
from cosmos3_pipeline.config.plugins import build_strategy
from cosmos3_pipeline.config.schema import Config, Device, Dtype, TaskName, VaeConfig
from cosmos3_pipeline.denoise.cost import Wire
from cosmos3_pipeline.planning.actions import action_of
from cosmos3_pipeline.planning.geometry import chunks_of, clean_frames, clip_of, encoded_of, replica_ranks
from cosmos3_pipeline.planning.hardware import Accelerator, accelerator_of
from cosmos3_pipeline.planning.stage import RankStage
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.plugins import discover
from cosmos3_pipeline.vae.program import Direction, Program, program_for
from cosmos3_pipeline.vae.strategy import Planned, Strategy, StrategyPlan

REFERENCE = "replicated"  # what runs where a direction's flag is off
ELEMENT_BYTES = {Dtype.float32: 4, Dtype.bfloat16: 2}


@dataclass(frozen=True)
class VaeStage:
    """One direction of the VAE over the ranks of a clip."""

    program: Program
    shape: LatentShape
    plan: StrategyPlan

    @property
    def traffic_bytes(self) -> int:
        """Bytes that the ops of the whole clip read and write: every op's input and output once."""
        first = sum(op.source.elements(self.shape, first=True) for op in self.program.ops)
        first += sum(op.target.elements(self.shape, first=True) for op in self.program.ops)
        later = self.program.chunks(self.shape) - 1
        if later:
            rest = sum(op.source.elements(self.shape, first=False) for op in self.program.ops)
            first += later * (rest + sum(op.target.elements(self.shape, first=False) for op in self.program.ops))
        return first * self.shape.element_bytes

    @property
    def fill(self) -> float:
        """Time over the slowest rank's busy time: where ranks own runs of ops, some wait for others."""
        return self.plan.until_end / max(share.flops for share in self.plan.shares)

    def bounds(
        self, rank: int, accelerator: Accelerator, dtype: Dtype, *, crosses_nodes: bool
    ) -> dict[str, float]:
        """Estimated seconds of `rank` by what would bound it alone: compute, memory, link."""
        share = self.plan.shares[rank]
        rate = accelerator.flops_per_s[dtype] * accelerator.efficiency["vae"]
        part = share.flops / self.program.flops(self.shape)
        return {
            "compute": self.fill * share.flops / rate,
            "memory": self.fill * self.traffic_bytes * part / accelerator.memory_bytes_per_s,
            "link": accelerator.wire_seconds(share.sent_bytes, share.sent_messages, crosses_nodes=crosses_nodes),
        }

    def stage(self, cfg: Config, rank: int, *, weights: int, text: int, inputs: int) -> RankStage:
        """The stage on `rank`, which holds so many bytes of weights, of prompts and of the clip that it reads."""
        share = self.plan.shares[rank]
        crosses = len(self.plan.shares) > cfg.topology.ranks_per_node
        return RankStage(
            flops=share.flops,
            weight_bytes=weights,
            text_bytes=text,
            activation_bytes=share.activation_bytes + inputs,
            sent=Wire(share.sent_bytes, share.sent_messages),
            seconds=self.bounds(rank, accelerator_of(cfg), cfg.model.vae_dtype, crosses_nodes=crosses),
            share={
                "ops": list(share.ops),
                "rows": list(share.rows),
                "cols": list(share.cols),
                # on each chunk, if not always all
                "runs": [list(run) for run in share.runs],
            },
        )


@dataclass(frozen=True)
class VaePlan(VaeStage):
    """A direction as a run does it: with what the ranks are given, the assignment that was planned.

    Where a clip is made in chunks, `for_the_next` is decoding one with whose end another begins: its frames go to
    the root as they are passed on. Of a transfer, `beginnings` are the frames with which the first chunk and a
    later one begin, each encoded by itself (None: no frame).
    """

    strategy: Strategy
    beginnings: tuple[VaeStage | None, VaeStage | None] = (None, None)
    for_the_next: VaeStage | None = None


def directions(cfg: Config) -> list[Direction]:
    """Encode where there is something to condition on (and its frames exist), and decode where a clip is made."""
    if cfg.task.name is TaskName.transfer:
        return ["encode", "decode"]
    latent_frames = clip_of(cfg).latent_frames
    frames = clean_frames(cfg.task.condition_latent_frames, latent_frames)
    encodes = bool(frames) and min(frames) >= 0 and max(frames) < latent_frames
    action = action_of(cfg.task)
    decodes = action is None or action.shows
    found: list[Direction] = ["encode"] if encodes else []
    return [*found, "decode"] if decodes else found


def is_parallel(vae: VaeConfig, direction: Direction) -> bool:
    """The flag of `direction`."""
    return vae.parallel_encode if direction == "encode" else vae.parallel_decode


def settings_of(vae: VaeConfig, direction: Direction) -> dict[str, Any]:
    """The node of `direction`: the class of a strategy, `_target_`, and its settings."""
    return vae.encode if direction == "encode" else vae.decode


def reference() -> Strategy:
    """The strategy that the others are compared with, and that runs a direction whose flag is off."""
    built = discover().strategies[REFERENCE]()
    assert isinstance(built, Strategy)
    return built


def strategy_of(cfg: Config, direction: Direction) -> Strategy:
    """The strategy that `cfg` runs `direction` with: its own where the flag is on, else the reference."""
    if not is_parallel(cfg.vae, direction):
        return reference()
    built = build_strategy(settings_of(cfg.vae, direction))
    assert isinstance(built, Strategy)
    return built


def vae_plan(cfg: Config, direction: Direction, strategy: Strategy) -> VaePlan:
    """What `strategy` does with the clip of `cfg`. Encoding goes as far as the last conditioned latent frame.

    Raises Refusal for what the strategy cannot honour, and for an impossible VAE.
    """
    clip = encoded_of(cfg) if direction == "encode" else clip_of(cfg)
    shape = LatentShape(
        *(1, clip.latent_frames, clip.latent_rows, clip.latent_cols, ELEMENT_BYTES[cfg.model.vae_dtype]),
        on_host=cfg.topology.device == Device.cpu,
    )
    ranks = replica_ranks(cfg.topology)
    key = repr((direction, plain(cfg.model.vae), shape, ranks, type(strategy), strategy))
    if key not in _made:
        program = program_for(direction, plain(cfg.model.vae))
        plan = strategy.plan(program, shape, ranks)
        given = strategy
        if plan.assignment is not None and type(strategy).runner is Strategy.runner:
            given = Planned(plan.assignment, shape, strategy.name)
        if len(_made) == MOST_MADE:
            _made.clear()
        _made[key] = VaePlan(program, shape, plan, given)
    planned = _made[key]
    return _in_chunks(cfg, direction, planned)


def _in_chunks(cfg: Config, direction: Direction, planned: VaePlan) -> VaePlan:
    """With what the chunks of a clip need beside the whole chunk."""
    shape, chunks = planned.shape, chunks_of(cfg)

    def another(**changes: Any) -> VaeStage:
        other = replace(shape, **changes)
        ranks = len(planned.plan.shares)
        return VaeStage(planned.program, other, planned.strategy.plan(planned.program, other, ranks))

    if direction == "decode":
        if chunks.count == 1 or not chunks.overlap:
            return planned
        as_floats = chunks.passed == "float"
        return replace(planned, for_the_next=another(picture_bytes=shape.element_bytes) if as_floats else planned)
    if cfg.task.name is not TaskName.transfer:
        return planned
    lengths = [chunks.clean_latents(number, clip_of(cfg).temporal) for number in (0, 1)]
    first, later = (another(frames=frames) if frames else None for frames in lengths)
    return replace(planned, beginnings=(first, later if chunks.count > 1 else None))


# Plans by everything that they depend on: the jobs of a sweep and the cases of a review have many in common.
MOST_MADE = 64
_made: dict[str, VaePlan] = {}
